"""Compacter: a bottleneck whose matrices are sums of Kronecker products with shared factors."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visadapt.core.adapter import FeatureMap, normal, zeros
from visadapt.core.site import Site


class Compacter(FeatureMap):
    """y' = y + H_uᵀ gelu(H_dᵀ y + d) + u,  H = Σ_i A_i ⊗ (S_i T_i),  i = 1 … n.

    H_d (out, rank) and H_u (rank, out). A (n, n, n) is one tensor for both matrices and all layers of the set; S_i
    (rows / n, inner) and T_i (inner, columns / n) belong to the layer. A ~ N(0, 1/n), S and T are Glorot-uniform, T of
    H_u, d (rank,) and u (out,) zero at start. It is not linear, so it cannot be merged. On a convolution it is 1×1.

    Karimi Mahabadi, Henderson & Ruder 2021, arXiv 2106.04647, code: github.com/rabeehk/compacter. Put it on the layers
    that end a block (`attn.proj`, `mlp.fc2`; the latter alone is Compacter++). Differs from the paper, which has
    A ~ N(0, (10⁻⁴)²): here T of H_u is zero, which is the identity exactly. It also trains layer norms.

    Args:
        rank: width of the bottleneck.
        parts: n, where it divides out and rank; else their largest common divisor below it.
        inner: inner dimension of S_i T_i.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("down_bias", "up_bias")

    rank: int = 24
    parts: int = 4
    inner: int = 1

    def refuse(self, layer: Site) -> str | None:
        """Numbers without meaning."""
        good = min(self.rank, self.parts, self.inner) > 0
        return None if good else f"rank={self.rank}, parts={self.parts}, inner={self.inner}: give positive numbers"

    def build(self, layer: Site) -> None:
        """Take A from the set, or create it, and create the layer's own."""
        common = math.gcd(layer.width, self.rank)
        n = max(d for d in range(1, min(common, self.parts) + 1) if common % d == 0)
        self.slow: nn.Parameter = self.share(f"A {n}", lambda: normal(layer, n, n, n, std=n**-0.5))
        self.down_left, self.down_right = _pair(layer, n, layer.width, self.rank, self.inner)
        self.up_left, right = _pair(layer, n, self.rank, layer.width, self.inner)
        self.up_right = zeros(layer, *right.shape)
        self.down_bias, self.up_bias = zeros(layer, self.rank), zeros(layer, layer.width)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """H_dᵀ (rank, out) and H_uᵀ (out, rank); block (p, q) of H is Σ_i A_i[p, q] S_i T_i."""
        pairs = (self.down_left, self.down_right), (self.up_left, self.up_right)
        down, up = (torch.einsum("ipq,iab->qbpa", self.slow, left @ right) for left, right in pairs)
        return down.flatten(2).flatten(0, 1), up.flatten(2).flatten(0, 1)

    def forward(self, x: Tensor, y: Tensor, layer: Site) -> Tensor:
        """Both matrices are as small as the bottleneck, so they are formed."""
        down, up = self.matrices()
        z = F.gelu(layer.pointwise(y, down, self.down_bias), approximate="tanh")
        return y + layer.pointwise(z, up, self.up_bias).to(y.dtype)


def _pair(layer: Site, n: int, rows: int, columns: int, inner: int) -> tuple[nn.Parameter, nn.Parameter]:
    """S (n, rows / n, inner) and T (n, inner, columns / n), each Glorot-uniform with gain √2."""
    made = [torch.empty(n, rows // n, inner), torch.empty(n, inner, columns // n)]
    for tensor in made:
        for part in tensor:
            nn.init.xavier_uniform_(part, gain=2**0.5)
    left, right = (nn.Parameter(t.to(layer.device, layer.dtype)) for t in made)
    return left, right
