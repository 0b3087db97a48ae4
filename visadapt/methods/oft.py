"""OFT and BOFT: rotations of a layer's inputs, in blocks or as a butterfly of blocks."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from visadapt.core.adapter import WeightMap, zeros
from visadapt.core.site import Site
from visadapt.maths.rotation import butterfly, cayley, rotate


class OFT(WeightMap):
    """W' = W · diag(R_1, R_2, …),  R_i = (I + Q_i)(I − Q_i)⁻¹,  Q_i = −Q_iᵀ.

    The R_i (block, block) are rotations of neighbouring inputs; the upper triangles of the Q_i, (inputs / block,
    block (block − 1) / 2), are zero at start. Angles between the rows of W stay. On vectors x is rotated and no weight
    is formed; a convolution is the matrix (out, in · kernel), so that whole patches are rotated.

    Qiu, Liu et al. 2023, arXiv 2306.07280, code: github.com/Zeju1997/oft. Its bound on ‖Q‖ (COFT) and blocks that
    share a rotation are not here.

    Args:
        block: side of a rotation; the largest divisor of in · kernel up to it.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("angles",)

    block: int = 32

    def _sides(self, layer: Site) -> list[int]:
        """Sides of the rotations, one for each factor of the butterfly; empty if there is none."""
        size = math.prod(layer.in_shape)
        return [n for n in range(min(self.block, size), 1, -1) if size % n == 0][:1]

    def refuse(self, layer: Site) -> str | None:
        """Inputs that cannot be cut into blocks."""
        size = math.prod(layer.in_shape)
        return None if self._sides(layer) else f"its {size} inputs have no divisor from 2 to block={self.block}"

    def build(self, layer: Site) -> None:
        """Create the triangles."""
        sides = self._sides(layer)
        self._side = sides[0]
        blocks = math.prod(layer.in_shape) // self._side
        self.angles = zeros(layer, len(sides), blocks, self._side * (self._side - 1) // 2)

    def _blocks(self) -> Tensor:
        """The rotations of neighbouring inputs (n, side, side)."""
        return butterfly(cayley(self.angles, self._side))

    def new_weight(self, weight: Tensor) -> Tensor:
        """The formula: each row of W goes through the transposed rotations."""
        exact = torch.promote_types(weight.dtype, self.angles.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            rows = rotate(weight.flatten(1).to(exact), self._blocks().transpose(1, 2).to(exact))
        return rows.view_as(weight).to(weight.dtype)

    def turn(self, x: Tensor, layer: Site) -> Tensor | None:
        """The rotations on vectors x."""
        if len(layer.in_shape) > 1:
            return None
        return rotate(x, self._blocks().to(x.dtype))


class BOFT(OFT):
    """W' = W · B_0 B_1 … B_m−1,  factor B_j a rotation in blocks that pairs half-blocks at a distance of 2ʲ.

    With as many factors as the logarithm of the number of half-blocks every input reaches every other one: a dense
    rotation for the parameters of thin ones. B_0 alone is OFT. The factors are multiplied first, so that x is rotated
    once, in blocks of block · 2ᵐ⁻¹ inputs. Where in · kernel is not a multiple of 2ᵐ there are as many factors as it
    allows.

    Liu, Qiu et al. 2024, arXiv 2311.06243, code: github.com/wy1iu/butterfly-oft. Differs from PEFT: distances go on to
    double behind the second factor, as in the paper's figure; no trained gain on outputs (IA3 and SSF have it).

    Args:
        block: side of a rotation, even with several factors; the largest that fits.
        factors: m, at most.
    """

    block: int = 8
    factors: int = 2

    def _sides(self, layer: Site) -> list[int]:
        """As many factors as halve the inputs evenly, all with the largest side that fits."""
        size = math.prod(layer.in_shape)
        for count in range(self.factors, 1, -1):
            for half in range(min(self.block, size) // 2, 0, -1):
                if size % (half * 2**count) == 0:
                    return [2 * half] * count
        return super()._sides(layer) if self.factors > 0 else []
