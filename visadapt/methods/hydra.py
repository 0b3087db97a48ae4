"""Hydra: a low-rank branch beside the layer and one behind it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from visadapt.core.adapter import FeatureMap, zeros
from visadapt.core.site import Site


class Hydra(FeatureMap):
    """y' = f + s · (B_p (A_p x + a_p) + c_p) + s · (B_s (A_s f + a_s) + c_s),  f = W x + b.

    Parallel branch A_p (r_p, in, *kernel), B_p (out, r_p); sequential branch A_s (r_s, out),
    B_s (out, r_s), which acts on f with its bias, not on the parallel branch, and is 1×1 on a
    convolution. A Xavier-uniform; B, a (r,) and c (out,) zero at start. Merged:
    W' = W + s (B_p A_p + B_s A_s W), b' = b + s (B_p a_p + c_p + B_s A_s b + B_s a_s + c_s).

    Kim et al. 2023, arXiv 2309.06922, code: github.com/extremebird/Hydra (4138457).

    Differs from the paper: its text has no biases, its VTAB code does (`bias`); no dropout between
    A and B; every layer merges by the formula above (the code's merge of attn.proj does not).

    Args:
        rank: r_p, inner dimension of the parallel branch; 0 leaves the sequential one alone.
        sequential_rank: r_s, inner dimension of the sequential branch; None means `rank`.
        scale: plain multiplier s (0.1 to 3 in the VTAB runs).
        bias: train a_p, c_p, a_s and c_s.
    """

    affine: ClassVar[bool] = True
    no_decay: ClassVar[tuple[str, ...]] = ("down_bias", "up_bias", "seq_down_bias", "seq_up_bias")

    rank: int = 8
    sequential_rank: int | None = None
    scale: float = 1.0
    bias: bool = True

    def build(self, layer: Site) -> None:
        """Create both branches."""
        r_p, r_s = self.rank, self._sequential
        if r_p:
            self.down, self.up = _xavier(layer, r_p, *layer.in_shape), zeros(layer, layer.width, r_p)
        if r_s:
            self.seq_down, self.seq_up = _xavier(layer, r_s, layer.width), zeros(layer, layer.width, r_s)
        if r_p and self.bias:
            self.down_bias, self.up_bias = zeros(layer, r_p), zeros(layer, layer.width)
        if r_s and self.bias:
            self.seq_down_bias, self.seq_up_bias = zeros(layer, r_s), zeros(layer, layer.width)

    @property
    def _sequential(self) -> int:
        return self.rank if self.sequential_rank is None else self.sequential_rank

    def refuse(self, layer: Site) -> str | None:
        """Nothing to train."""
        if self.rank < 0 or self._sequential < 0 or self.rank + self._sequential == 0:
            return "rank and sequential_rank are not negative, and one of them is at least 1"
        return None

    def refuse_merge(self, layer: Site) -> str | None:
        """The sequential branch mixes the channels of all groups."""
        if layer.groups > 1 and self._sequential:
            return (
                "Hydra's sequential branch mixes channels across the groups of this convolution, and no "
                "grouped weight does that; keep it as an adapter or use sequential_rank=0"
            )
        return super().refuse_merge(layer)

    def forward(self, x: Tensor, y: Tensor, layer: Site) -> Tensor:
        """Both branches on x and f; their biases are one constant per channel."""
        out = y
        if self.rank:
            out = out + layer.low_rank(x, self.down, self.up * self.scale).to(y.dtype)
        if self._sequential:
            z = layer.pointwise(y, self.seq_down)
            out = out + layer.pointwise(z, self.seq_up * self.scale).to(y.dtype)
        if self.bias:
            out = out + layer.per_channel(self.constant()).to(y.dtype)
        return out

    def constant(self) -> Tensor:
        """The constant s · (B_p a_p + c_p + B_s a_s + c_s), (out,)."""
        terms = []
        if self.rank:
            terms.append(self.up @ self.down_bias + self.up_bias)
        if self._sequential:
            terms.append(self.seq_up @ self.seq_down_bias + self.seq_up_bias)
        return torch.stack(terms).sum(0) * self.scale


def _xavier(layer: Site, *shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape, device=layer.device, dtype=layer.dtype)))
