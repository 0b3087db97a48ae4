"""LoHa: a Hadamard product of two low-rank matrices."""

from __future__ import annotations

import math

from torch import Tensor

from visadapt.core.adapter import LowRank, normal, zeros
from visadapt.core.site import Site


class LoHa(LowRank):
    """ΔW = s · (B₁ A₁) ∘ (B₂ A₂),  s = alpha / rank.

    A₁, A₂ (rank, in, *kernel) ~ N(0, 1), B₁ (out, rank) ~ N(0, 0.1²), B₂ (out, rank) zero at start;
    a convolution is the matrix (out, in · kernel). ΔW has rank up to rank²: it is the product of the
    row-wise Khatri-Rao products up[o, (p, q)] = B₁[o, p] B₂[o, q] and down[(p, q), i] = A₁[p, i] A₂[q, i],
    which makes LoHa a LoRA of rank rank², in the forward pass and in an exported file.

    Hyeon-Woo, Ye-Bin & Oh 2022 (FedPara), arXiv 2108.06098; initial values and scale of LyCORIS'
    LoHa: Yeh et al. 2024, arXiv 2309.14859, code: github.com/KohakuBlueleaf/LyCORIS (4.1.3).

    Differs from LyCORIS: no Tucker form of convolutions, and a merge applies the scale once.

    Args:
        rank: inner dimension of each of the two products; ΔW reaches rank².
        alpha: numerator of the scale; None means `rank`, a scale of 1.
    """

    alpha: float | None = None

    def build(self, layer: Site) -> None:
        """Create A₁, B₁, A₂ and B₂."""
        self.down_a = normal(layer, self.rank, *layer.in_shape)
        self.up_a = normal(layer, layer.width, self.rank, std=0.1)
        self.down_b = normal(layer, self.rank, *layer.in_shape)
        self.up_b = zeros(layer, layer.width, self.rank)
        # Above this rank two thin products cost more than one with the dense ΔW and its gradient.
        fan_in = math.prod(layer.in_shape)
        self._thin = self.rank**2 * (fan_in + layer.width) <= fan_in * layer.width

    @property
    def fusable(self) -> bool:
        """Whether the two factors are cheaper than a dense ΔW."""
        return self._thin

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """The Khatri-Rao products (rank², in, *kernel) and s·(out, rank²)."""
        down = (self.down_a.unsqueeze(1) * self.down_b.unsqueeze(0)).flatten(0, 1)
        up = ((self.up_a * self.scale).unsqueeze(2) * self.up_b.unsqueeze(1)).flatten(1)
        return down, up

    def delta(self) -> Tensor:
        """The formula itself: two products of inner dimension rank instead of one of rank²."""
        a = (self.up_a * self.scale) @ self.down_a.flatten(1)
        return (a * (self.up_b @ self.down_b.flatten(1))).view(-1, *self.down_a.shape[1:])

    def side(self, x: Tensor, layer: Site) -> Tensor:
        """ΔW ∗ x, dense where the rank is large."""
        return super().side(x, layer) if self._thin else layer.op(x, self.delta())
