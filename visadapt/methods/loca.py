"""LoCA: a few coefficients of the update's cosine transform, and where they are."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from visadapt.core.adapter import Delta, zeros
from visadapt.core.site import Site
from visadapt.maths.cosine import cosine_table, sparse_idct


class LoCA(Delta):
    """ΔW = alpha · C_outᵀ S C_in,  S zero but for `count` trained values at trained places, C the orthonormal DCT-II.

    Values a (count,) are zero, places l (2, count) ~ U(0, 1) at start, shares of (out − 1, in − 1). They are rounded;
    values at the same place add. For the first `moving` steps of training, `value_steps` in which values train and
    `place_steps` in which places do follow each other; then places stay and values train. A place's gradient is a
    central difference of the spectrum of ∂L/∂ΔW. A convolution is the matrix (out, in · kernel). A file holds a and l:
    3 · count numbers a layer, of which the paper counts the values.

    Du et al. 2025, arXiv 2502.06820, code: github.com/TL-UESTC/LoCA. Its phases count forward passes, here optimiser
    steps; its places have a learning rate of their own (10⁻⁴), here that of the set.

    Args:
        count: number of values.
        alpha: the scale.
        moving: steps with phases; None means a tenth of all steps, none where their number is not known.
        value_steps: length of a phase of values.
        place_steps: length of a phase of places.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("places",)
    takes_turns: ClassVar[bool] = True

    count: int = 1000
    alpha: float = 1.0
    moving: int | None = None
    value_steps: int = 10
    place_steps: int = 20

    def refuse(self, layer: Site) -> str | None:
        """Numbers without meaning."""
        if self.count < 1:
            return f"count={self.count}: give at least one value"
        if self.value_steps < 1 or self.place_steps < 0 or (self.moving or 0) < 0:
            return (
                f"value_steps={self.value_steps}, place_steps={self.place_steps}, moving={self.moving}: values train "
                "first and for at least one step, the others are not negative"
            )
        return None

    def build(self, layer: Site) -> None:
        """Take the tables of the transform from the set, or make them, and create values and places."""
        self._shape = (layer.width, *layer.in_shape)
        self.row_table: Tensor
        self.column_table: Tensor
        self.register_buffer("row_table", self._table(layer, layer.width), persistent=False)
        self.register_buffer("column_table", self._table(layer, math.prod(layer.in_shape)), persistent=False)
        self.spectrum = zeros(layer, self.count)
        self.places: nn.Parameter = zeros(layer, 2, self.count)
        nn.init.uniform_(self.places)

    def _table(self, layer: Site, size: int) -> Tensor:
        key = f"cosines {size} {layer.device} {layer.dtype}"
        return self.share(key, lambda: cosine_table(size).to(layer.device, layer.dtype))

    def before_step(self, step: int, total: int | None) -> None:
        """Say what trains in this step; an optimiser leaves the other, which has no gradient."""
        moving = (total or 0) // 10 if self.moving is None else self.moving
        values = step >= moving or step % (self.value_steps + self.place_steps) < self.value_steps
        for tensor, trains in ((self.spectrum, values), (self.places, not values)):
            if tensor.requires_grad != trains:
                tensor.requires_grad_(trains).grad = None

    @torch.no_grad()
    def after_step(self) -> None:
        """Places stay within the matrix."""
        self.places.clamp_(0, 1)

    def delta(self) -> Tensor:
        """The formula, as one product or as outer products, whichever is cheaper."""
        with torch.autocast(self.spectrum.device.type, enabled=False):
            change = sparse_idct(self.spectrum * self.alpha, self.places, self.row_table, self.column_table)
        return change.view(self._shape)
