"""ALLoRA: rows of the update learn fast while they are small."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from visadapt.core.adapter import LowRank, kaiming, zeros
from visadapt.core.site import Site


class ALLoRA(LowRank):
    """ΔW = B A,  ∂L/∂B_i ← c_i · ∂L/∂B_i,  c_i = 1 / √(‖(B A)_i‖ + 1/η²).

    B (out, rank) zero, A (rank, in, *kernel) kaiming-uniform at start, without scale and dropout; i is a row. The norm
    is √(B_i A Aᵀ B_iᵀ), from products of the size rank. While B is zero, c_i = η.

    Huang et al. 2024, arXiv 2410.09692; there is no official code. The formula is put together from what reviews of the
    paper quote: take it as a reading of it. The paper multiplies the gradient that reaches the update's output, which
    scales that of A, too; here that of B alone, exactly. Adam divides gradients by their size, so that only changes
    of c_i count with it: `scales="step"` multiplies the step of B instead, as a learning rate for each row.

    Args:
        rank: inner dimension.
        eta: η, the largest c_i.
        scales: what is multiplied, the gradient of B or the optimiser's step of B.
    """

    eta: float = 1.0
    scales: Literal["gradient", "step"] = "gradient"

    def build(self, layer: Site) -> None:
        """Create A and B."""
        self.down = kaiming(layer, self.rank, *layer.in_shape)
        self.up = zeros(layer, layer.width, self.rank)
        self._before: tuple[Tensor, Tensor] | None = None

    def refuse(self, layer: Site) -> str | None:
        """A bound that bounds nothing."""
        return None if self.eta > 0 else f"eta={self.eta}: the largest factor is above 0"

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.down, self.up

    @torch.no_grad()
    def factor(self) -> Tensor:
        """The numbers c (out,)."""
        a = self.down.flatten(1)
        square = ((self.up @ (a @ a.t())) * self.up).sum(1)
        return (square.clamp_min(0).sqrt() + self.eta**-2).rsqrt()

    @torch.no_grad()
    def after_backward(self) -> None:
        """Scale the gradient, or remember where the step of B begins."""
        if self.scales == "step":
            self._before = self.up.detach().clone(), self.factor()
        elif self.up.grad is not None:
            self.up.grad.mul_(self.factor()[:, None])

    @torch.no_grad()
    def after_step(self) -> None:
        """Go c_i times as far."""
        if self._before is not None:
            (start, c), self._before = self._before, None
            self.up.copy_(start + c[:, None] * (self.up - start))
