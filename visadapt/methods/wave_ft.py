"""WaveFT: a few coefficients of the update's wavelet transform."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from visadapt.core.adapter import Delta, zeros
from visadapt.core.site import Site
from visadapt.maths.seeded import generator
from visadapt.maths.wavelet import HIGH, LOW, synthesis_taps


class WaveFT(Delta):
    """ΔW = alpha · Tᵀ S T,  S zero but for `count` trained coefficients at random places, T a wavelet transform.

    T is orthonormal, of one level and periodic; S has the four sub-bands as its quadrants and an even size, of which
    ΔW is the corner (out, in · kernel). Coefficients are zero at start; their places, drawn without repetition, are the
    same in all layers of a shape and come from `seed`, not from the file. Convolutions are matrices (out, in · kernel).

    Bilican et al. 2025, arXiv 2505.12532, code: github.com/Bilican/WaveFT. Differs from PEFT: odd sizes are padded
    by one row, not by the length of the filter on both sides.

    Args:
        count: number of coefficients, at most out · in · kernel.
        alpha: the scale; under Adam it multiplies the learning rate. PEFT has 25.
        wavelet: an orthonormal wavelet of PyWavelets.
        seed: of the places.
    """

    count: int = 2592
    alpha: float = 1.0
    wavelet: str = "haar"
    seed: int = 0

    def refuse(self, layer: Site) -> str | None:
        """Options without meaning."""
        return None if self.count > 0 else f"count={self.count}: give at least one coefficient"

    def build(self, layer: Site) -> None:
        """Choose the places and create the coefficients."""
        self._shape = (layer.width, *layer.in_shape)
        self._sizes = layer.width, math.prod(layer.in_shape)
        self._even = tuple(n + n % 2 for n in self._sizes)
        taps, self._offsets = synthesis_taps(self.wavelet)
        self.taps: Tensor
        self.places: Tensor
        self.register_buffer("taps", taps.to(layer.device, layer.dtype), persistent=False)
        count = min(self.count, math.prod(self._sizes))

        def make() -> Tensor:
            order = torch.randperm(math.prod(self._even), generator=generator(self.seed, *self._even))
            return order[:count].to(layer.device)

        key = f"places {self._even} {count} {self.seed} {layer.device}"
        self.register_buffer("places", self.share(key, make), persistent=False)
        self.spectrum = zeros(layer, count)

    def _along(self, grid: Tensor, size: int) -> Tensor:
        """Tᵀ of the first dimension, cut to its size: a product with two columns, which adds the bands as it goes."""
        bands = grid.unflatten(0, (2, -1))  # low, high
        taps = self.taps[:, :, [LOW, HIGH]]
        shifted = [(bands if d == 0 else bands.roll(-d, 1)).flatten(1) for d in self._offsets]
        phases = reduce(torch.add, [tap @ band for tap, band in zip(taps, shifted)])  # (phase, band) · (band, place)
        return phases.view_as(bands).transpose(0, 1).flatten(0, 1)[:size]

    def delta(self) -> Tensor:
        """The formula, one dimension after the other."""
        with torch.autocast(self.spectrum.device.type, enabled=False):
            flat = self.spectrum.new_zeros(math.prod(self._even))
            grid = flat.index_copy(0, self.places, self.spectrum * self.alpha).view(self._even)
            rows = self._along(grid, self._sizes[0])
            return self._along(rows.t(), self._sizes[1]).t().reshape(self._shape)
