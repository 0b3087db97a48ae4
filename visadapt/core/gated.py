"""Low-rank updates with a number for each component: it is scaled by it, and taken off where it is zero."""

from __future__ import annotations

from torch import Tensor, nn

from visadapt.core.adapter import LowRank, kaiming, zeros
from visadapt.core.site import Site


class Gated(LowRank):
    """ΔW = s · up · diag(gates) · down,  s = alpha / rank; states `gates`.

    Args:
        rank: number of components.
        alpha: numerator of the scale; None means `rank`.
    """

    alpha: float | None = None

    def build(self, layer: Site) -> None:
        """Create down (rank, in, *kernel) kaiming-uniform and up (out, rank) zero."""
        self.down: nn.Parameter = kaiming(layer, self.rank, *layer.in_shape)
        self.up: nn.Parameter = zeros(layer, layer.width, self.rank)

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def gates(self) -> Tensor:
        """One number for each component (rank,)."""
        raise NotImplementedError(f"{type(self).__name__} must state gates()")

    def factors(self) -> tuple[Tensor, Tensor]:
        """Down, and up with gates and scale in it: smaller than the output."""
        return self.down, self.up * (self.scale * self.gates())

    def components(self, rank: int | None) -> tuple[Tensor, Tensor]:
        """Those with the largest gates, without gates of zero; at least one."""
        gates = self.gates().abs()
        kept = gates.argsort(descending=True, stable=True)[:rank]
        kept = kept[(gates[kept] > 0).nonzero()[:, 0]] if bool(gates.any()) else kept[:1]
        kept = kept.sort().values
        down, up = self.factors()
        return down[kept], up[:, kept]
