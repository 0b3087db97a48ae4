"""(IA)³: a trained gain for each output or each input of a layer."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from visadapt.core.adapter import WeightMap, ones
from visadapt.core.site import Site


class IA3(WeightMap):
    """W' = diag(l) · W  (`axis="out"`) or W · diag(l)  (`axis="in"`).

    l is one at start. The paper scales keys and values, which are outputs, and the inner activation of the
    feed-forward block, which is the input of its second layer; on a timm ViT:

        targets={"attn.qkv:k": {}, "attn.qkv:v": {}, "mlp.fc2": {"axis": "in"}}

    On a convolution l scales channels.

    Liu, Tam, Muqeeth et al. 2022, arXiv 2205.05638, code: github.com/r-three/t-few, whose layers have no bias.
    Differs from PEFT: a bias is not scaled; SSF does that.

    Args:
        axis: whether outputs or inputs are scaled.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("gain",)

    axis: Literal["out", "in"] = "out"

    def refuse(self, layer: Site) -> str | None:
        """An unknown option, and inputs that several groups do not share."""
        if self.axis not in ("out", "in"):
            return f"axis={self.axis!r}: use 'out' or 'in'"
        if self.axis == "in" and layer.groups > 1:
            return "the inputs of a grouped convolution have no common gain; use axis='out'"
        return None

    def build(self, layer: Site) -> None:
        """Create l."""
        self.gain = ones(layer, layer.width if self.axis == "out" else layer.in_shape[0])

    def new_weight(self, weight: Tensor) -> Tensor:
        """The formula itself."""
        kept = 0 if self.axis == "out" else 1
        shape = [-1 if d == kept else 1 for d in range(weight.dim())]
        return (weight * self.gain.view(shape)).to(weight.dtype)

    def scaled_factors(self, layer: Site) -> tuple[Tensor, Tensor, Tensor] | None:
        """The gain alone: the factors are one row and one column of zeros (a convolution needs an output)."""
        if self.axis == "in":
            return None
        none = self.gain.new_zeros(1, *layer.in_shape)
        return none, none.new_zeros(layer.width, 1), self.gain

    def turn(self, x: Tensor, layer: Site) -> Tensor | None:
        """The gain on x instead of W, for vectors x."""
        return x * self.gain.to(x.dtype) if self.axis == "in" and len(layer.in_shape) == 1 else None
