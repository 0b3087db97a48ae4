"""Kronecker products: how sizes are split, and L ⊗ (B A) applied to rows without forming it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors m ≤ n of a size, as LyCORIS 4.1 chooses them.

    A positive `factor` that divides the size is one of the two; otherwise m is the largest divisor up to √size and up
    to a positive `factor`.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    top = math.isqrt(size) if factor < 0 else min(math.isqrt(size), factor)
    m = next(m for m in range(max(top, 1), 0, -1) if size % m == 0)
    return m, size // m


def kron(left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker product of (o1, i1) and (o2, i2, *kernel), (o1 · o2, i1 · i2, *kernel)."""
    return torch.kron(left[(..., *(None,) * (right.dim() - 2))], right.contiguous())


def beside_identity(whole: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor (o, i, *kernel) as up (o, q) times down (q, i, *kernel), one of the two an identity, q the shorter."""
    matrix = whole.flatten(1)
    q = min(matrix.shape)
    eye = torch.eye(q, dtype=whole.dtype, device=whole.device)
    up, down = (eye, matrix) if q == len(matrix) else (matrix, eye)
    return up, down.view(q, *whole.shape[1:])


def kron_apply(
    x: Tensor, left: Tensor, down: Tensor, up: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """(left ⊗ (up · down)) x for rows x (…, i1·i2): seen as i1 rows of i2, right factors act within them, left across.

    Args:
        x: (…, i1 · i2).
        left: (o1, i1).
        down: (q, i2).
        up: (o2, q), or None for the identity (o2 = q).
        weight: frozen weight (o1 · o2, i1 · i2) of a Linear, whose output W x + b is then added to in place; and so is
            the gradient for x.
        bias: of that Linear.

    Returns:
        (…, o1 · o2).
    """
    if torch.compiler.is_compiling():
        z = left @ (x.unflatten(-1, (left.shape[1], -1)) @ down.t())
        z = (z if up is None else z @ up.t()).flatten(-2)
        return z if weight is None else F.linear(x, weight, bias) + z
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        given = [None if t is None else t.to(dtype) for t in (x, left, down, up, weight, bias)]
        out: Tensor = KronApply.apply(*given)  # type: ignore[no-untyped-call]
    return out


def _across(z: Tensor, rows: int) -> Tensor:
    """(N · rows, q) -> (rows, N · q): what the left factor multiplies as one matrix."""
    return z.view(-1, rows, z.shape[1]).transpose(0, 1).reshape(rows, -1)


def _within(m: Tensor, width: int) -> Tensor:
    """(rows, N · q) -> (N · rows, q): the inverse."""
    return m.view(len(m), -1, width).transpose(0, 1).reshape(-1, width)


class KronApply(torch.autograd.Function):
    """Keeps x alone for backward: what lies between is q / i2 of its size and made again.

    With z = x downᵀ, m = left z, y = m upᵀ and g = ∂L/∂y, each seen as in `kron_apply`:
        ∂up = gᵀ m,  ∂m = g up,  ∂left = ∂m zᵀ,  ∂z = leftᵀ ∂m,  ∂down = ∂zᵀ x,  ∂x = ∂z down
    """

    @staticmethod
    def forward(  # type: ignore[override]  # noqa: D102
        ctx: Any, x: Tensor, left: Tensor, down: Tensor, up: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        z = x.reshape(-1, down.shape[1]) @ down.t()
        m = _within(left @ _across(z, left.shape[1]), len(down))
        ctx.save_for_backward(x, left, down, up, weight)
        if weight is None:
            return (m if up is None else m @ up.t()).view(*x.shape[:-1], -1)
        y = F.linear(x, weight, bias)
        flat = y.view(-1, m.shape[1] if up is None else len(up))
        flat.add_(m) if up is None else flat.addmm_(m, up.t())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # noqa: D102
        with torch.autocast(grad.device.type, enabled=False):
            x, left, down, up, weight = ctx.saved_tensors
            flat, q = x.reshape(-1, down.shape[1]), len(down)
            z = _across(flat @ down.t(), left.shape[1])
            g, grad_up = grad.reshape(-1, q if up is None else len(up)), None
            if up is not None:
                grad_up = g.t() @ _within(left @ z, q)
                g = g @ up
            g = _across(g, len(left))
            grad_z = _within(left.t() @ g, q)
            grad_x = None
            if ctx.needs_input_grad[0]:
                base = None if weight is None else (grad.reshape(-1, len(weight)) @ weight).view(flat.shape)
                grad_x = (grad_z @ down if base is None else base.addmm_(grad_z, down)).view(x.shape)
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[5] else None
            return grad_x, g @ z.t(), grad_z.t() @ flat, grad_up, None, grad_bias
