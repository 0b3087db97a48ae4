"""WaRA: low-rank factors in the wavelet domain of the weight update."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from visadapt.core.adapter import LowRank, kaiming, zeros
from visadapt.core.site import Site
from visadapt.maths.wavelet import HIGH, LOW, synthesis_taps, synthesise

MODES = ("subband", "full", "shared", "activation")


class WaRA(LowRank):
    """ΔW = s · Σ_ij F_iᵀ (B_ij A_ij) F_j,  i, j ∈ {low, high},  s = alpha / rank.

    F_L, F_H (n/2, n) are the halves of an orthonormal wavelet analysis along outputs or inputs, so the
    sum is the inverse 2-D transform of four low-rank sub-bands B_ij (out/2, rank), A_ij (rank, in/2,
    *kernel); kernel axes are not transformed. More levels split the low-low band again. A is
    kaiming-uniform, B zero at start; odd sizes are padded with a zero and cropped. Synthesis is folded
    into the factors, which gives a LoRA of rank rank · (3 · levels + 1).

    Heidari et al. 2025, arXiv 2506.24092. Its code was not to be had, and the texts of its two
    versions differ; `mode` picks the reading (all but the first have one level). `subband`: the
    formula above, an own pair for each sub-band. `full`: F and one pair for all coefficients, Tᵀ B A T:
    a LoRA in a rotated basis, so with plain gradient descent it trains as LoRA does; only element-wise
    optimisers tell them apart. `shared`: one pair for all four sub-bands; with haar only every other
    row and column changes. `activation`: one pair for the sub-bands of the activations (first
    version's figure); with haar even and odd channels get the same update.
    The second version's transform of the token grid with one linear pair is exactly LoRA: use LoRA.

    Args:
        rank: inner dimension of each pair.
        alpha: numerator of the scale; None means `rank`, a scale of 1.
        wavelet: an orthonormal wavelet of PyWavelets.
        levels: depth of the decomposition.
        mode: which reading of the paper.
    """

    alpha: float | None = None
    wavelet: str = "haar"
    levels: int = 1
    mode: Literal["subband", "full", "shared", "activation"] = "subband"

    def build(self, layer: Site) -> None:
        """Create one pair of stacked factors per level, and the taps of its rows."""
        taps, self._offsets = synthesis_taps(self.wavelet)
        self._sizes, self._kernel = [(layer.width, layer.in_shape[0])], layer.in_shape[1:]
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for level in range(self.levels):
            out, in_ = (math.ceil(n / 2) for n in self._sizes[-1])
            self._sizes.append((out, in_))
            pairs = 1 if self.mode != "subband" else 4 if level == self.levels - 1 else 3
            rows = pairs * self.rank
            double = 2 if self.mode == "full" else 1  # both bands of one long column
            self.up.append(zeros(layer, double * out, rows))
            self.down.append(kaiming(layer, rows, double * in_, *self._kernel))
            self._set_taps(level, taps.to(layer.device, layer.dtype))

    def _set_taps(self, level: int, taps: Tensor) -> None:
        # The taps of each row: its band along outputs (up) and inputs (down), in the order LL, LH, HL, HH.
        if self.mode == "subband":
            r, inner = self.rank, self.rank * (3 * (self.levels - 1 - level) + 1)
            up = [LOW] * (inner + r) + [HIGH] * 2 * r
            down = [LOW] * inner + [HIGH] * r + [LOW] * r + [HIGH] * r
            pair = taps[:, :, up], taps[:, :, down]
        else:
            both = taps.sum(2, keepdim=True) if self.mode == "shared" else taps
            pair = both, both
        self.register_buffer(f"up_taps_{level}", pair[0], persistent=False)
        self.register_buffer(f"down_taps_{level}", pair[1], persistent=False)

    def refuse(self, layer: Site) -> str | None:
        """Unknown readings, depths and wavelets."""
        if self.mode not in MODES:
            grid = self.mode == "token_grid"
            why = "with one linear pair it is LoRA exactly; use LoRA" if grid else f"use one of {', '.join(MODES)}"
            return f"mode={self.mode!r}: {why}"
        if self.levels < 1 or (self.levels > 1 and self.mode != "subband"):
            return f"levels={self.levels}: at least 1, and more than 1 only with mode='subband'"
        try:
            synthesis_taps(self.wavelet)
        except ValueError as error:
            return str(error)
        return None

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """The pairs of all sub-bands, synthesised, side by side."""
        up, down = self._synthesised("up", 0), self._synthesised("down", 1)
        down = down.unflatten(2, self._kernel) if self._kernel else down[..., 0]
        return down, up[..., 0].t() * self.scale

    def _synthesised(self, name: str, axis: int) -> Tensor:
        """Rows of the folded factor, (rows, size, kernel taps)."""
        rows: Tensor | None = None
        for level in reversed(range(self.levels)):
            part = getattr(self, name)[level]
            part = part.t().unsqueeze(2) if name == "up" else part.reshape(*part.shape[:2], -1)
            part = part if rows is None else torch.cat([rows, part])  # what is deeper is the low-low band
            rows = self._join(part, getattr(self, f"{name}_taps_{level}"), self._sizes[level][axis])
        assert rows is not None
        return rows

    def _join(self, part: Tensor, taps: Tensor, size: int) -> Tensor:
        if self.mode in ("subband", "shared"):
            return synthesise(part, taps, self._offsets, size)
        low, high = part.chunk(2, 1) if self.mode == "full" else (part, part)
        low = synthesise(low, taps[:, :, :1], self._offsets, size)
        high = synthesise(high, taps[:, :, 1:], self._offsets, size)
        return low + high if self.mode == "full" else torch.cat([low, high])
