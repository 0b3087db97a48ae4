"""Controlled LoRA: directions that the update shall not touch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from visadapt.core.site import Site
from visadapt.core.stack import TaskStack


class CLoRA(TaskStack):
    """ΔW = Σ_k<t B_k A_k + B A,  loss + control/2 · (‖A V‖² + ‖Bᵀ U‖²).

    The columns of V (in, k) and U (out, k) are orthonormal and fixed: the penalty keeps inputs along V from having an
    effect and outputs along U from moving. They are random, as in the released code, or, in a sequence, the row and
    column spaces of the earlier tasks' updates (our reading; in the first task there are none, and no penalty).

    Controlled LoRA 2025 (ACL), arXiv 2410.16801, code: github.com/sutakori/CLoRA. Differs from it: fewer random
    directions (its README has 512, of networks wider than those here), the same for all layers of a size.

    Args:
        rank: inner dimension of each task's update.
        tasks: how many tasks the sequence has at most.
        done: how many of them are finished.
        control: weight of the penalty, summed over the layers.
        directions: k, at most the smaller side of the weight; of random directions only.
        basis: where V and U come from.
        seed: source of random directions; they are made again from it and not stored.
    """

    control: float = 1.0
    directions: int = 64
    basis: Literal["random", "past"] = "random"
    seed: int = 0

    def build(self, layer: Site) -> None:
        """Create B and A, and the random directions."""
        super().build(layer)
        if self.basis == "random":
            fan_in = self.down[0].numel()
            count = min(self.directions, fan_in, layer.width)
            generator = torch.Generator().manual_seed(self.seed)
            for name, size in (("right", fan_in), ("left", layer.width)):
                fixed = torch.linalg.qr(torch.randn(size, count, generator=generator))[0]
                self.register_buffer(name, fixed.to(self.down), persistent=False)

    def penalty(self) -> Tensor | None:
        """Control/2 · (‖A V‖² + ‖Bᵀ U‖²)."""
        found = self._fixed()
        if found is None:
            return None
        right, left = found
        return self.control / 2 * ((self.down.flatten(1) @ right).square().sum() + (self.up.t() @ left).square().sum())

    def _fixed(self) -> tuple[Tensor, Tensor] | None:
        if self.basis == "random":
            return self.right, self.left  # type: ignore[return-value]
        if not self.done:
            return None
        if getattr(self, "_past", (0,))[0] != self.done:
            used = self.done * self.rank
            self._past = (self.done, _span(self.past_down[:used].flatten(1).t()), _span(self.past_up[:, :used]))
        return self._past[1:]  # type: ignore[return-value]


@torch.no_grad()
def _span(vectors: Tensor) -> Tensor:
    """An orthonormal basis (n, k) of what the columns (n, m) span."""
    u, sigma, _ = torch.linalg.svd(vectors, full_matrices=False)
    return u[:, sigma > 1e-6 * sigma.max().clamp_min(1e-30)]
