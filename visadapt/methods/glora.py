"""GLoRA: gains, updates and prompts on weight and bias at once."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visadapt.core.adapter import FeatureMap, kaiming, zeros
from visadapt.core.site import Site

KINDS = {
    "gain": ("lora", "vector", "scalar", "none"), "update": ("lora", "vector", "scalar", "none"),
    "prompt": ("vector", "none"), "bias_gain": ("vector", "scalar", "none"), "shift": ("vector", "scalar", "none"),
}  # fmt: skip


class GLoRA(FeatureMap):
    """W' = W + W ∘ A + B,  b' = b + W C + D ∘ b + E.

    A and B (out, in · kernel) are each low-rank, one number for each output, one number, or absent; C (in · kernel,) is
    a prompt, D and E (out,) scale and shift the bias. All are zero at start (of a low-rank product, the left factor). W
    and b are the frozen ones, whatever other adapters do. Without a bias there is no D.

    Chavan, Liu et al. 2023, arXiv 2306.07967, code: github.com/Arnav0400/ViT-Slim (GLoRA). It searches a form of each
    term for each layer by evolution; here a mapping of targets gives them. Not here: C as a product of two factors,
    which a vector covers.

    Args:
        rank: inner dimension of low-rank terms.
        gain: form of A; "lora" forms W ∘ A in each step, the others do not.
        update: form of B.
        prompt: form of C.
        bias_gain: form of D.
        shift: form of E.
    """

    affine: ClassVar[bool] = True
    no_decay: ClassVar[tuple[str, ...]] = ("gain_row", "bias_gain_row", "shift_row")

    rank: int = 8
    gain: Literal["lora", "vector", "scalar", "none"] = "vector"
    update: Literal["lora", "vector", "scalar", "none"] = "lora"
    prompt: Literal["vector", "none"] = "vector"
    bias_gain: Literal["vector", "scalar", "none"] = "vector"
    shift: Literal["vector", "scalar", "none"] = "vector"

    def refuse(self, layer: Site) -> str | None:
        """Unknown forms, and nothing to train."""
        for name, kinds in KINDS.items():
            if getattr(self, name) not in kinds:
                return f"{name}={getattr(self, name)!r}: use {', '.join(kinds)}"
        used = [name for name in KINDS if getattr(self, name) != "none" and (name != "bias_gain" or _has_bias(layer))]
        return None if used else "all of its terms are 'none'; give one another form"

    def build(self, layer: Site) -> None:
        """Create the terms."""
        for name in ("gain", "update", "bias_gain", "shift"):
            kind = getattr(self, name)
            if kind == "lora":
                self.register_parameter(f"{name}_down", kaiming(layer, self.rank, *layer.in_shape))
                self.register_parameter(f"{name}_up", zeros(layer, layer.width, self.rank))
            elif kind != "none" and (name != "bias_gain" or _has_bias(layer)):
                self.register_parameter(f"{name}_row", zeros(layer, layer.width if kind == "vector" else 1))
        if self.prompt == "vector":
            self.prompt_column = zeros(layer, math.prod(layer.in_shape))

    def _product(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_parameter(f"{name}_down"), self.get_parameter(f"{name}_up")

    def _row(self, name: str, layer: Site) -> Tensor | None:
        row = self._parameters.get(f"{name}_row")
        return None if row is None else row.expand(layer.width)

    def forward(self, x: Tensor, y: Tensor, layer: Site) -> Tensor:
        """Y + (W ∘ A + B) ∗ x + W C + D ∘ b + E, term by term."""
        frozen = Site(layer.layer, layer.param, layer.rows)
        weight = frozen.weight
        if self.gain == "lora":
            down, up = self._product("gain")
            a = (up @ down.flatten(1)).view_as(weight)
            y = y + layer.op(x, weight * a.to(weight.dtype)).to(y.dtype)
        elif (gain := self._row("gain", layer)) is not None:
            base = layer.op(x, weight)
            y = y + (base * layer.per_channel(gain).to(base.dtype)).to(y.dtype)
        if self.update == "lora":
            y = y + layer.low_rank(x, *self._product("update")).to(y.dtype)
        elif (update := self._row("update", layer)) is not None:  # equal numbers along a row: a sum of inputs
            y = y + layer.low_rank(x, update.new_ones(1, *layer.in_shape), update[:, None]).to(y.dtype)
        constant = self.constant(frozen)
        return y if constant is None else y + layer.per_channel(constant).to(y.dtype)

    def constant(self, frozen: Site) -> Tensor | None:
        """W C + D ∘ b + E (out,), or None without any of them."""
        terms, bias = [], frozen.bias
        if self.prompt == "vector":
            with torch.autocast(self.prompt_column.device.type, enabled=False):
                terms.append(frozen.weight.flatten(1).to(self.prompt_column.dtype) @ self.prompt_column)
        scaled, shift = self._row("bias_gain", frozen), self._row("shift", frozen)
        if scaled is not None and bias is not None:
            terms.append(scaled * bias.to(scaled.dtype))
        if shift is not None:
            terms.append(shift)
        return torch.stack(terms).sum(0) if terms else None


def _has_bias(layer: Site) -> bool:
    return layer.bias is not None
