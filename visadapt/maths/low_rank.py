"""Low-rank matrices up · down, without forming them."""

from __future__ import annotations

from typing import Any

import torch
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


def absolute_sum(down: Tensor, up: Tensor, rows: int = 512) -> Tensor:
    """Σ |up·down|, with its gradient, so many rows of the product at a time.

    ∂/∂up = sign(up·down) downᵀ and ∂/∂down = upᵀ sign(up·down), both found with the value: the product is formed once
    and never kept.
    """
    return _AbsoluteSum.apply(down, up, rows)


class _AbsoluteSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, down: Tensor, up: Tensor, rows: int) -> Tensor:
        flat, total, of_up = down.flatten(1), up.new_zeros(()), []
        of_down = torch.zeros_like(flat)
        for part in up.split(rows):
            product = part @ flat
            total += product.abs().sum()
            sign = product.sign_()
            of_up.append(sign @ flat.t())
            of_down += part.t() @ sign
        ctx.save_for_backward(of_down.view_as(down), torch.cat(of_up))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        of_down, of_up = ctx.saved_tensors
        return grad * of_down, grad * of_up, None
