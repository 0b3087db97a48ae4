"""HRA: a chain of reflections of a layer's inputs."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from visadapt.core.adapter import WeightMap, kaiming
from visadapt.core.site import Site
from visadapt.maths.rotation import reflections


class HRA(WeightMap):
    """W' = W · H_1 H_2 … H_rank,  H_i = I − 2 u_i u_iᵀ / ‖u_i‖²  (Householder reflections).

    The u_i are the rows of U (rank, in · kernel), equal in pairs at start, so that each pair is the identity. The chain
    is I − Uᵀ T U with a triangular T (compact WY form): two thin products on x and no weight formed, on vectors; a
    convolution is the matrix (out, in · kernel), so that whole patches are reflected.

    Yuan, Liu & Xu 2024, arXiv 2405.17484, code: github.com/DaShenZi721/HRA.

    Args:
        rank: number of reflections, even.
        orthogonality: weight of ‖U Uᵀ − I‖² (rows of length 1) in `penalty()`, the paper's λ.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("vectors",)

    rank: int = 8
    orthogonality: float = 0.0

    def refuse(self, layer: Site) -> str | None:
        """An odd chain cannot start at the identity."""
        even = self.rank > 0 and self.rank % 2 == 0
        return None if even else f"rank={self.rank}: reflections start in pairs, give a positive even number"

    def build(self, layer: Site) -> None:
        """Create U."""
        half = kaiming(layer, self.rank // 2, math.prod(layer.in_shape))
        self.vectors = nn.Parameter(half.data.repeat_interleave(2, 0))

    def new_weight(self, weight: Tensor) -> Tensor:
        """W − (W Uᵀ) V."""
        exact = torch.promote_types(weight.dtype, self.vectors.dtype)
        u, v = (t.to(exact) for t in reflections(self.vectors))
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1).to(exact)
            return torch.addmm(matrix, matrix @ u.t(), v, alpha=-1).view_as(weight).to(weight.dtype)

    def turn(self, x: Tensor, layer: Site) -> Tensor | None:
        """X − Uᵀ (V x), for vectors x."""
        if len(layer.in_shape) > 1:
            return None
        u, v = (t.to(x.dtype) for t in reflections(self.vectors))
        flat = x.reshape(-1, x.shape[-1])
        return torch.addmm(flat, flat @ v.t(), -u).view_as(x)  # subtracts in the product, forward and backward

    def penalty(self) -> Tensor | None:
        """How far the vectors are from orthogonal."""
        if self.orthogonality == 0:
            return None
        u = self.vectors / self.vectors.norm(dim=1, keepdim=True)
        return self.orthogonality * (u @ u.t() - torch.eye(len(u), dtype=u.dtype, device=u.device)).square().sum()
