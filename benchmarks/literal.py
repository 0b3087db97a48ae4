"""Literal forms of the methods whose own code cannot be shipped: the published formula, computed as written.

Each replaces the layer, forms what its paper or official code forms in every forward pass (a dense update, a
second operation), and is a reference for both numbers and time. None of it is meant to be used.

Symbols: W is the frozen weight, flattened to (out, fan_in); x the input of the layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def draw(layer: nn.Module, *shape: int) -> nn.Parameter:
    """Gaussian factor in the layer's dtype and place, of variance 1 / last axis."""
    weight = layer.weight
    return nn.Parameter(torch.randn(shape, dtype=weight.dtype, device=weight.device) / math.sqrt(shape[-1]))


class Literal(nn.Module):
    """A frozen Linear or Conv2d and a literal adapter around it."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.out, *self.rest = layer.weight.shape
        self.fan_in = math.prod(self.rest)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's own operation with another weight of its shape, or of that shape flattened."""
        weight = weight.reshape(-1, *self.rest)
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, bias)
        return F.linear(x, weight, bias)


class FLoRA(Literal):
    """y = W x + ΔW x with ΔW = G ×₁ U ×₂ V (×₃ P ×₄ Q), one dense mode product after the other.

    As the official code does it (Si et al. 2024, arXiv:2405.14739): ΔW is formed, then a second operation of
    the layer's full size is run. core (r_out, r_in, s, …), up (out, r_out), inner (in, r_in), axes (k, s).
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int = 8, kernel_rank: int = 2, scale: float = 1.0) -> None:
        super().__init__(layer)
        fan_in, *kernel = self.rest
        ranks = [min(size, kernel_rank) for size in kernel]
        self.core = draw(layer, rank, rank, *ranks)
        self.up, self.inner = draw(layer, self.out, rank), draw(layer, fan_in, rank)
        self.axes = nn.ParameterList(draw(layer, size, r) for size, r in zip(kernel, ranks))

    def forward(self, x: Tensor) -> Tensor:
        delta = self.core
        for mode, factor in enumerate((self.up, self.inner, *self.axes)):
            delta = torch.tensordot(delta, factor, dims=([mode], [1])).movedim(-1, mode)
        return self.layer(x) + self.apply_weight(x, delta)


def synthesis(low: Tensor, high: Tensor, filters: tuple[Tensor, Tensor], dim: int) -> Tensor:
    """One level of the inverse orthonormal DWT along ``dim``, periodised: upsample by two, filter, add.

    Args:
        low: coarse coefficients, ``n / 2`` of them along ``dim``.
        high: detail coefficients, of the same shape.
        filters: the reconstruction filters (low-pass, high-pass), each (length,).
        dim: the axis to double.
    """
    low, high = low.movedim(dim, -1), high.movedim(dim, -1)
    taps = filters[0].numel()
    kernel = torch.stack([f.to(low) for f in filters])[:, None]  # (2, 1, taps)
    bands = torch.stack([low, high], -2).reshape(-1, 2, low.shape[-1])
    wide = F.conv_transpose1d(bands, kernel, stride=2)[:, 0]  # (rows, n + taps - 2)
    size = 2 * low.shape[-1]
    whole = wide.new_zeros(len(wide), size)
    for start in range(0, wide.shape[-1], size):  # what runs over the end comes in at the beginning
        part = wide[:, start : start + size]
        whole = whole + F.pad(part, (0, size - part.shape[-1]))
    shift = taps // 2 - 1  # PyWavelets centres the periodised filter
    return whole.roll(-shift, -1).reshape(*low.shape[:-1], size).movedim(-1, dim)


class WaRA(Literal):
    """y = W x + ΔW x with ΔW = IDWT2(B_b A_b for every sub-band b), the coefficients and ΔW materialised.

    Level j (from 1, the finest) stacks the factors of its sub-bands: up (out / 2^j, rows), down (rows,
    in / 2^j, *kernel), rank rows each for LH, HL, HH (first letter: band of the output axis), at the coarsest
    level LL before them. After arXiv:2506.24092 (2025), whose code was not to be had: a reading of its text.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int = 8, wavelet: str = "haar", levels: int = 1) -> None:
        super().__init__(layer)
        import pywt

        if self.out % 2**levels or self.rest[0] % 2**levels:
            raise ValueError(f"{2**levels} must divide the sizes of {tuple(layer.weight.shape)}")
        wave = pywt.Wavelet(wavelet)
        self.rank, self.levels = rank, levels
        self.register_buffer("low", torch.tensor(wave.rec_lo, dtype=layer.weight.dtype))
        self.register_buffer("high", torch.tensor(wave.rec_hi, dtype=layer.weight.dtype))
        self.up, self.down = nn.ParameterList(), nn.ParameterList()
        for level in range(1, levels + 1):
            rows = rank * len(self.bands(level))
            self.up.append(draw(layer, self.out >> level, rows))
            self.down.append(draw(layer, rows, self.rest[0] >> level, *self.rest[1:]))

    def bands(self, level: int) -> list[str]:
        """Names of a level's sub-bands in the order of their rows."""
        return [*(["LL"] if level == self.levels else []), "LH", "HL", "HH"]

    def blocks(self, level: int) -> dict[str, Tensor]:
        """The low-rank coefficients of each sub-band of a level, (out / 2^j, in / 2^j, *kernel)."""
        pairs = zip(self.up[level - 1].split(self.rank, 1), self.down[level - 1].split(self.rank), strict=True)
        products = [torch.tensordot(up, down, dims=1) for up, down in pairs]
        return dict(zip(self.bands(level), products, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        filters = (self.low, self.high)
        coarse = None
        for level in range(self.levels, 0, -1):
            band = self.blocks(level)
            coarse = band["LL"] if coarse is None else coarse
            low_rows = synthesis(coarse, band["LH"], filters, 1)
            high_rows = synthesis(band["HL"], band["HH"], filters, 1)
            coarse = synthesis(low_rows, high_rows, filters, 0)
        return self.layer(x) + self.apply_weight(x, coarse)


class SALT(Literal):
    """y = U Σ' Vᵀ x + b: the singular values in a dense n × n core, the weight rebuilt in each forward.

    W = U Σ Vᵀ; Σ' holds relu(α σ + β) for the first ``top`` values and, for the rest, Σ + X Y, as in the
    official code (Koleilat et al. 2025, arXiv:2503.16055), which has the relu on the whole core
    (``relu="full"``). The signs of U and V are ours: X and Y depend on them.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, top: int, rank: int = 8, relu: str = "diag") -> None:
        super().__init__(layer)
        if relu not in ("diag", "full"):
            raise ValueError(f"relu={relu!r}: use 'diag' or 'full'")
        self.relu = relu
        from visadapt.maths.svd import signed_svd

        weight = layer.weight.detach()
        basis = [t.to(weight) for t in signed_svd(weight.flatten(1))]
        for name, value in zip(("u", "s", "vh"), basis, strict=True):
            self.register_buffer(name, value)
        self.top = min(top, len(self.s))
        rest = len(self.s) - self.top
        self.alpha = nn.Parameter(torch.ones_like(self.s[: self.top]))
        self.beta = nn.Parameter(torch.zeros_like(self.alpha))
        self.x, self.y = draw(layer, rest, rank), draw(layer, rank, rest)

    def forward(self, x: Tensor) -> Tensor:
        top = self.alpha * self.s[: self.top] + self.beta
        rest = torch.diag(self.s[self.top :]) + self.x @ self.y
        core = torch.block_diag(torch.diag(top.relu() if self.relu == "diag" else top), rest)
        core = core.relu() if self.relu == "full" else core
        return self.apply_weight(x, self.u @ core @ self.vh, self.layer.bias)


class Hydra(Literal):
    """y = f + B_p (A_p x + a_p) + c_p + B_s (A_s f + a_s) + c_s with f = W x + b.

    The parallel and the sequential branch one layer after the other, with the biases of the official VTAB
    code (Kim et al. 2023, arXiv:2309.06922).
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int = 8) -> None:
        super().__init__(layer)
        self.parallel_down, self.parallel_up = draw(layer, rank, *self.rest), draw(layer, self.out, rank)
        self.sequential_down, self.sequential_up = draw(layer, rank, self.out), draw(layer, self.out, rank)
        self.parallel_down_bias, self.parallel_up_bias = draw(layer, rank), draw(layer, self.out)
        self.sequential_down_bias, self.sequential_up_bias = draw(layer, rank), draw(layer, self.out)

    def mix(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Multiply the channels of every position by ``weight``."""
        if isinstance(self.layer, nn.Conv2d):
            return F.conv2d(x, weight[:, :, None, None], bias)
        return F.linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        f = self.layer(x)
        z = self.apply_weight(x, self.parallel_down, self.parallel_down_bias)
        parallel = self.mix(z, self.parallel_up, self.parallel_up_bias)
        z = self.mix(f, self.sequential_down, self.sequential_down_bias)
        return f + parallel + self.mix(z, self.sequential_up, self.sequential_up_bias)


class SSF(Literal):
    """y = γ ∘ f + β with f = W x + b, per output channel (Lian et al. 2022, arXiv:2210.08823)."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__(layer)
        self.gamma, self.beta = draw(layer, self.out), draw(layer, self.out)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, 1, 1) if isinstance(self.layer, nn.Conv2d) else (-1,)
        return self.layer(x) * self.gamma.reshape(shape) + self.beta.reshape(shape)


FORMS: dict[str, type[Literal]] = {form.__name__: form for form in (FLoRA, WaRA, SALT, Hydra, SSF)}
