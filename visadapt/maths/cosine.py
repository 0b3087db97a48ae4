"""A matrix from a few coefficients of its cosine transform, with gradients for their places."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def cosine_table(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix (size, size), in fp64: C x are the coefficients of x, C Cᵀ = I."""
    i, j = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    table = (math.pi * (2 * j + 1) * i / (2 * size)).cos() * (2 / size) ** 0.5
    table[0] /= 2**0.5
    return table


def sparse_idct(values: Tensor, places: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """C_outᵀ S C_in with S zero but for `values` at `places`; values at the same place add.

    The gradient of a place, which moves in whole steps, is the central difference a/2 · (K[l + 1] − K[l − 1]), with
    K = C_out G C_inᵀ and G the gradient of the matrix; at a border the missing neighbour is the place itself, and the
    difference is cut to [−1, 1] (LoCA, arXiv 2502.06820).

    Args:
        values: (k,).
        places: (2, k), row and column as shares of (out − 1) and (in − 1), cut to [0, 1].
        rows: C_out (out, out).
        columns: C_in (in, in).

    Returns:
        (out, in).
    """
    out: Tensor = _SparseIDCT.apply(values, places, rows, columns)  # type: ignore[no-untyped-call]
    return out


class _SparseIDCT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        u, v = (places.clamp(0, 1) * places.new_tensor([[len(rows) - 1], [len(columns) - 1]])).round().long()
        ctx.save_for_backward(values, u, v, rows, columns)
        if len(values) > len(rows) + len(columns):  # cheaper than the outer products
            grid = values.new_zeros(len(rows), len(columns)).index_put_((u, v), values, accumulate=True)
            return rows.t() @ grid @ columns
        return (rows[u].t() * values) @ columns[v]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        values, u, v, rows, columns = ctx.saved_tensors
        k = rows @ grad @ columns.t()
        grad_places = None
        if ctx.needs_input_grad[1]:
            last, end = len(rows) - 1, len(columns) - 1
            down = k[(u + 1).clamp_max(last), v] - k[(u - 1).clamp_min(0), v]
            right = k[u, (v + 1).clamp_max(end)] - k[u, (v - 1).clamp_min(0)]
            steps = (torch.stack([down, right]) * values / 2).clamp(-1, 1)
            grad_places = steps * steps.new_tensor([[last], [end]])
        return k[u, v] if ctx.needs_input_grad[0] else None, grad_places, None, None
