"""Tucker products: a small core tensor multiplied by one matrix along each of its modes."""

from __future__ import annotations

import torch
from torch import Tensor


def mode_product(core: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Product along one mode, core ×_mode matrix: (…, r_mode, …) and (n, r_mode) -> (…, n, …)."""
    return torch.tensordot(matrix, core, dims=([1], [mode])).movedim(0, mode)


def tucker(core: Tensor, *matrices: Tensor | None) -> Tensor:
    """Tucker product core ×₀ M₀ ×₁ M₁ …; a mode whose matrix is None keeps its size.

    The last modes go first: kernels are the smallest, so the intermediate tensors stay small.

    Raises:
        ValueError: there is not one matrix (or None) for each mode.
    """
    if len(matrices) != core.dim():
        raise ValueError(f"a core with {core.dim()} modes needs {core.dim()} matrices, got {len(matrices)}")
    with torch.autocast(core.device.type, enabled=False):  # small, and rounded once by whoever uses it
        for mode in reversed(range(core.dim())):
            matrix = matrices[mode]
            core = core if matrix is None else mode_product(core, matrix, mode)
        return core
