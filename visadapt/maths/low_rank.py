"""Low-rank matrices up · down, without forming them."""

from __future__ import annotations

from torch import Tensor


def inner(down: Tensor, up: Tensor, down_too: Tensor, up_too: Tensor) -> Tensor:
    """⟨up·down, up'·down'⟩ = Σ (upᵀ up') ⊙ (down down'ᵀ), in O(r r' (in + out)).

    Args:
        down: (r, in, *kernel).
        up: (out, r).
        down_too: (r', in, *kernel).
        up_too: (out, r').
    """
    return ((up.t() @ up_too) * (down.flatten(1) @ down_too.flatten(1).t())).sum()


def norm(down: Tensor, up: Tensor) -> Tensor:
    """‖up·down‖ (Frobenius)."""
    return inner(down, up, down, up).clamp_min(0).sqrt()
