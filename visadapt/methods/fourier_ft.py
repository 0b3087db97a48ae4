"""FourierFT: a few coefficients of the update's Fourier transform."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from visadapt.core.adapter import Delta, zeros
from visadapt.core.site import Site
from visadapt.maths.seeded import generator


class FourierFT(Delta):
    """ΔW = alpha · Re(ifft2(S)),  S zero but for `count` trained coefficients at random places.

    Coefficients are real and zero at start; their places, drawn without repetition from (out, in), are the same in all
    layers of a shape and come from `seed`, not from the file. ifft2 divides by out · in. A convolution is the matrix
    (out, in · kernel).

    Gao et al. 2024, arXiv 2405.03003, code: github.com/Chaos96/fourierft. Differs from it: coefficients drawn from
    N(0, 1) are not the identity at start (`start="normal"`).

    Args:
        count: number of coefficients, at most out · in · kernel.
        alpha: the scale.
        start: what the coefficients are at start.
        seed: of the places.
    """

    count: int = 1000
    alpha: float = 150.0
    start: Literal["zero", "normal"] = "zero"
    seed: int = 0

    def refuse(self, layer: Site) -> str | None:
        """Options without meaning."""
        if self.start not in ("zero", "normal"):
            return f"start={self.start!r}: use 'zero' or 'normal'"
        return None if self.count > 0 else f"count={self.count}: give at least one coefficient"

    def build(self, layer: Site) -> None:
        """Choose the places and create the coefficients."""
        self._shape, self._columns = (layer.width, *layer.in_shape), math.prod(layer.in_shape)
        size = layer.width * self._columns
        count = min(self.count, size)

        def make() -> Tensor:
            order = torch.randperm(size, generator=generator(self.seed, layer.width, self._columns))
            return order[:count].to(layer.device)

        self.places: Tensor
        self.halves: Tensor
        key = f"{layer.width} {self._columns} {count} {self.seed} {layer.device}"
        self.register_buffer("places", self.share(f"places {key}", make), persistent=False)
        self.register_buffer("halves", self.share(f"halves {key}", self._symmetric), persistent=False)
        self.spectrum = zeros(layer, count)
        if self.start == "normal":
            nn.init.normal_(self.spectrum)

    def _symmetric(self) -> Tensor:
        """Where the coefficients and their mirror images, at −u and −v, lie in the left half of the grid (2, n)."""
        u, v = self.places // self._columns, self.places % self._columns
        mirrored = torch.stack([torch.stack([u, v]), torch.stack([-u % self._shape[0], -v % self._columns])])
        half = self._columns // 2 + 1
        which = torch.arange(len(self.places), device=u.device).expand(2, -1)
        inside = mirrored[:, 1] < half
        return torch.stack([which[inside], (mirrored[:, 0] * half + mirrored[:, 1])[inside]])

    def delta(self) -> Tensor:
        """The formula: Re(ifft2(S)) is the real transform of (S + mirrored S) / 2, of which one half is enough."""
        with torch.autocast(self.spectrum.device.type, enabled=False):
            which, where = self.halves
            values = self.spectrum[which] * (self.alpha / 2)
            flat = values.new_zeros(self._shape[0] * (self._columns // 2 + 1)).index_add(0, where, values)
            grid = flat.view(self._shape[0], -1)
            return torch.fft.irfft2(grid, s=(self._shape[0], self._columns)).reshape(self._shape)
