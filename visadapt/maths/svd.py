"""Singular value decomposition that comes out the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor


def signed_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin U (m, n), σ (n,) and Vᵀ (n, k), on the CPU in float64.

    A singular pair is defined up to its sign; here the entry of largest size in each column of U is
    positive. Pairs of equal singular values stay free up to a rotation.
    """
    u, sigma, vt = torch.linalg.svd(matrix.detach().to("cpu", torch.float64), full_matrices=False)
    largest = u.abs().argmax(0, keepdim=True)
    sign = torch.where(u.gather(0, largest)[0] < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, sigma, vt * sign[:, None]
