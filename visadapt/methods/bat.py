"""Bat: block affine adaptation, guided by the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visadapt.core.adapter import WeightMap, zeros
from visadapt.core.site import Site


class Bat(WeightMap):
    """W'_ij = W_ij + W_ij · B_i + B_i,  W cut into blocks W_ij (rank, rank).

    B (out / rank, rank, rank) is zero at start: one B_i for each row of blocks, out · rank numbers in all, for an
    update of full rank. A convolution is the matrix (out, in · kernel). The weight is formed: all of W is in it.

    Kang & Yin 2024, arXiv 2409.15371 (the affine form of Bone), code: github.com/JL-er/MiSS.

    Args:
        rank: side of a block; None takes the largest common divisor of out and in · kernel up to 64.
    """

    rank: int | None = None

    def refuse(self, layer: Site) -> str | None:
        """Blocks that do not fill the weight."""
        sizes = layer.width, math.prod(layer.in_shape)
        if self.rank is not None and (self.rank < 1 or any(n % self.rank for n in sizes)):
            return f"rank={self.rank} does not divide the weight ({sizes[0]}, {sizes[1]}); give a common divisor"
        return None

    def build(self, layer: Site) -> None:
        """Create B."""
        common = math.gcd(layer.width, math.prod(layer.in_shape))
        side = self.rank or max(n for n in range(1, min(common, 64) + 1) if common % n == 0)
        self.block = zeros(layer, layer.width // side, side, side)

    def new_weight(self, weight: Tensor) -> Tensor:
        """The formula, all blocks at once; the same for weights as for the rows that belong to them."""
        count, side, _ = self.block.shape
        exact = torch.promote_types(weight.dtype, self.block.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            blocks = weight.reshape(count, side, -1, side).to(exact)
            b = self.block.to(exact)
            change = (blocks.flatten(1, 2) @ b).view_as(blocks) + b[:, :, None]
            return (blocks + change).reshape(weight.shape).to(weight.dtype)
