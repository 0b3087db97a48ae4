"""VeRA: two trained vectors around random matrices that all layers share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from visadapt.core.adapter import LowRank, ones, zeros
from visadapt.core.site import Site
from visadapt.maths.seeded import generator


class VeRA(LowRank):
    """ΔW = diag(b) · B · diag(d) · A,  A and B random, frozen and the same in all layers.

    A (rank, in, *kernel) and B (out, rank) are kaiming-uniform, U(±√(6 / fan_in)) with fan_in the length of a row;
    sites of equal in or out share one tensor. They are not saved: `seed` and the shape give them again. d (rank,) is
    0.1, b (out,) zero at start. d is multiplied into B, so that only A ∗ x is kept for backward.

    Kopiczko, Blankevoort & Asano 2023, arXiv 2310.11454; its official code is not public, the start is that of
    PEFT's VeRA. Differs from PEFT: A and B are drawn for each shape, not cut out of the largest.

    Args:
        rank: inner dimension; large, as it costs rank + out numbers a layer.
        initial: value of d at start.
        seed: of A and B.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("inner", "outer")

    rank: int = 256
    initial: float = 0.1
    seed: int = 0

    def build(self, layer: Site) -> None:
        """Take A and B from the set, or draw them, and create d and b."""
        self.down: Tensor
        self.basis: Tensor
        self.register_buffer("down", self._drawn(layer, "A", self.rank, *layer.in_shape), persistent=False)
        self.register_buffer("basis", self._drawn(layer, "B", layer.width, self.rank), persistent=False)
        self.inner = nn.Parameter(self.initial * ones(layer, self.rank).data)
        self.outer = zeros(layer, layer.width)

    def _drawn(self, layer: Site, role: str, *shape: int) -> Tensor:
        def make() -> Tensor:
            drawn = torch.empty(shape)
            nn.init.kaiming_uniform_(drawn, generator=generator(self.seed, role, shape))
            return drawn.to(layer.device, layer.dtype)

        return self.share(f"{role} {shape} {self.seed} {layer.device} {layer.dtype}", make)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, and diag(b) B diag(d)."""
        return self.down, self.outer[:, None] * self.basis * self.inner
