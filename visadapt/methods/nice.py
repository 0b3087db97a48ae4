"""NICE: an invertible adapter of additive couplings."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from visadapt.core.adapter import FeatureMap, kaiming, zeros
from visadapt.core.site import Site


class NICE(FeatureMap):
    """y' = [o₁, o₂],  o₁ = y₁ + F(y₂),  o₂ = y₂ + G(o₁), which can be undone.

    y₁ and y₂ are the first ⌊out / 2⌋ outputs and the others; F and G are bottlenecks U gelu(D · + d) + u, D
    kaiming-uniform, U, d and u zero at start. It is not linear, so it cannot be merged. In language models it follows
    the input embedding and its inverse precedes the output embedding; here it follows any layer (`patch_embed.proj`),
    and `inverse`, y₂ = o₂ − G(o₁) and y₁ = o₁ − F(y₂), is there for a decoder.

    Couplings: Dinh, Krueger & Bengio 2015, arXiv 1410.8516. As an adapter: Pfeiffer et al. 2020 (MAD-X),
    arXiv 2005.00052, code: github.com/adapter-hub/adapters. Differs from it: exactly the identity at start, and gelu
    instead of relu.

    Args:
        reduction: width of y₁ or y₂ over that of the bottleneck.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("down_bias_f", "up_bias_f", "down_bias_g", "up_bias_g")

    reduction: int = 2

    def refuse(self, layer: Site) -> str | None:
        """One output cannot be split."""
        if self.reduction < 1:
            return f"reduction={self.reduction}: give at least 1"
        return None if layer.width > 1 else "it has one output, and a coupling needs two"

    def build(self, layer: Site) -> None:
        """Create F and G."""
        first = layer.width // 2
        second = layer.width - first
        self._sizes = [first, second]
        for name, inputs, outputs in (("f", second, first), ("g", first, second)):
            width = max(1, inputs // self.reduction)
            self.register_parameter(f"down_{name}", kaiming(layer, width, inputs))
            self.register_parameter(f"down_bias_{name}", zeros(layer, width))
            self.register_parameter(f"up_{name}", zeros(layer, outputs, width))
            self.register_parameter(f"up_bias_{name}", zeros(layer, outputs))

    def _net(self, name: str, y: Tensor, layer: Site) -> Tensor:
        down, down_bias, up, up_bias = (
            self.get_parameter(f"{part}_{name}") for part in ("down", "down_bias", "up", "up_bias")
        )
        return layer.pointwise(F.gelu(layer.pointwise(y, down, down_bias)), up, up_bias).to(y.dtype)

    def forward(self, x: Tensor, y: Tensor, layer: Site) -> Tensor:
        """The couplings."""
        dim = layer.channel_dim
        one, two = y.split(self._sizes, dim)
        one = one + self._net("f", two, layer)
        return torch.cat([one, two + self._net("g", one, layer)], dim)

    def inverse(self, y: Tensor, layer: Site) -> Tensor:
        """The y that `forward` made this one of."""
        dim = layer.channel_dim
        one, two = y.split(self._sizes, dim)
        two = two - self._net("g", one, layer)
        return torch.cat([one - self._net("f", two, layer), two], dim)
