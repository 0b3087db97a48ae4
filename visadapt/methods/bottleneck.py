"""Bottleneck adapters: a small non-linear network behind a layer or beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from visadapt.core.adapter import FeatureMap, kaiming, zeros
from visadapt.core.site import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Bottleneck(FeatureMap):
    """y' = y + s · (U f(D h + d) + u),  h = y (`place="sequential"`) or h = x (`place="parallel"`).

    D (rank, out) or (rank, in, *kernel) is kaiming-uniform, U (out, rank), d (rank,) and u (out,) are zero at start. It
    is not linear, so it cannot be merged and stays as a cost. The sequential form sees the layer's output, the parallel
    one its input: put it on the layers that end a block (`attn.proj`, `mlp.fc2`). On a convolution D has the layer's
    kernel and stride beside it, and is 1×1 behind it.

    Sequential: Houlsby et al. 2019, arXiv 1902.00751, code: github.com/google-research/adapter-bert (behind attention
    and feed-forward, before the residual), and Pfeiffer et al. 2020, arXiv 2005.00052, code:
    github.com/adapter-hub/adapters (behind the feed-forward alone; there after the residual, whose sum no layer has,
    here before it, as Houlsby's). Parallel: AdaptFormer, Chen et al. 2022, arXiv 2205.13535, code:
    github.com/ShoufaChen/AdaptFormer (s = 0.1). Differs from AdaptFormer: beside one layer, not the whole feed-forward
    block, and no dropout. Differs from the others: exactly the identity at start.

    Args:
        rank: width of the bottleneck.
        place: whether it sees the layer's output or its input.
        activation: f.
        scale: plain multiplier s.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("down_bias", "up_bias")

    rank: int = 8
    place: Literal["sequential", "parallel"] = "sequential"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    scale: float = 1.0

    def refuse(self, layer: Site) -> str | None:
        """Unknown options, and inputs that the groups of a convolution do not share."""
        if self.place not in ("sequential", "parallel"):
            return f"place={self.place!r}: use 'sequential' or 'parallel'"
        if self.activation not in ACTIVATIONS:
            return f"activation={self.activation!r}: use {', '.join(ACTIVATIONS)}"
        if self.place == "parallel" and layer.groups > 1:
            return "a bottleneck beside a grouped convolution has no kernel of its shape; use place='sequential'"
        return None

    def build(self, layer: Site) -> None:
        """Create D, d, U and u."""
        inputs = (layer.width,) if self.place == "sequential" else layer.in_shape
        self.down, self.up = kaiming(layer, self.rank, *inputs), zeros(layer, layer.width, self.rank)
        self.down_bias, self.up_bias = zeros(layer, self.rank), zeros(layer, layer.width)

    def forward(self, x: Tensor, y: Tensor, layer: Site) -> Tensor:
        """The formula, s with the smaller tensors."""
        if self.place == "sequential":
            z = layer.pointwise(y, self.down, self.down_bias)
        else:
            z = layer.op(x, self.down)
            z = z + layer.per_channel(self.down_bias).to(z.dtype)
        side = layer.pointwise(ACTIVATIONS[self.activation](z), self.up * self.scale, self.up_bias * self.scale)
        return y + side.to(y.dtype)
