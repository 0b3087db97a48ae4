"""One-dimensional orthonormal wavelet synthesis as a few shifted, scaled copies (no dense matrix).

T (n, n) is the analysis matrix of PyWavelets in `periodization` mode, n even: rows 0 … n/2 − 1 are
the low band F_L, the others the high band F_H, and T Tᵀ = I. Synthesis is Tᵀ, one band at a time:

    (F_bᵀ c)[2i + p] = Σ_d taps[d, p, b] · c[i + offset_d]      p = 0, 1, indices modulo n/2
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW, HIGH = 0, 1


def synthesis_taps(name: str) -> tuple[Tensor, list[int]]:
    """Taps (offsets, 2 phases, 2 bands), float64, and the offsets, of a wavelet of PyWavelets.

    From the filter f of a band, of even length F: T[o, F/2 + 2o − j] = f[j], so
    taps[d, p] = f[F/2 − p + 2d].

    Raises:
        ValueError: there is no such wavelet, or its filters are not orthonormal.
    """
    import pywt

    if name not in pywt.wavelist(kind="discrete"):
        raise ValueError(f"no wavelet '{name}' in PyWavelets; try haar, db2, sym4 or coif1 (pywt.wavelist())")
    wavelet = pywt.Wavelet(name)
    filters = torch.tensor([wavelet.dec_lo, wavelet.dec_hi], dtype=torch.float64)
    if not wavelet.orthogonal or not _orthonormal(filters[LOW]):
        raise ValueError(
            f"wavelet '{name}' is not orthonormal, so it would change the size of the update; "
            "use haar, db*, sym* or coif*"
        )
    half = filters.shape[1] // 2
    offsets = [d for d in range(-half, half + 1) if any(0 <= half - p + 2 * d < 2 * half for p in (0, 1))]
    taps = torch.zeros(len(offsets), 2, 2, dtype=torch.float64)
    for row, d in enumerate(offsets):
        for p in (0, 1):
            j = half - p + 2 * d
            if 0 <= j < 2 * half:
                taps[row, p] = filters[:, j]
    return taps, offsets


def _orthonormal(low: Tensor) -> bool:
    # Σ h[j] h[j + 2k] = δ_k; `dmey` calls itself orthogonal and misses this by 2e-3.
    length = len(low)
    products = torch.stack([low[: length - 2 * k] @ low[2 * k :] for k in range(length // 2)])
    products[0] -= 1
    return bool(products.abs().max() < 1e-9)


def synthesise(bands: Tensor, taps: Tensor, offsets: list[int], size: int) -> Tensor:
    """Fᵀ of each row of coefficients.

    Args:
        bands: (rows, m, rest), coefficients of one band per row.
        taps: (offsets, 2, rows or 1), the taps of each row's band.
        offsets: as `synthesis_taps` gives them.
        size: 2m, or 2m − 1 where the signal was zero-padded to even length.

    Returns:
        (rows, size, rest).
    """
    rows, m, rest = bands.shape
    out: Tensor | None = None
    for tap, d in zip(taps, offsets):
        shifted = bands if d == 0 else bands.roll(-d, 1)
        term = shifted.unsqueeze(2) * tap.t()[:, None, :, None]  # (rows, m, phase, rest)
        out = term if out is None else out + term
    assert out is not None
    return out.reshape(rows, 2 * m, rest)[:, :size]
