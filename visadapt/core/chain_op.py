"""y = W ∗ x + up · (kernel ∗ (inner · x)) + b on a frozen convolution: the update of Tucker cores.

`inner` (q, in) and `up` (rows, r) are 1×1, `kernel` (r, q, *kernel) is a small convolution of the
layer's stride, dilation and padding. As in `linear_op`, one autograd Function adds in place to the
base output and to the gradient for x, which single operations would each pass over again.

Gradients (g = ∂L/∂y, u = inner · x, z = kernel ∗ u):
    ∂up = g zᵀ,  ∂z = upᵀ g,  (∂u, ∂kernel) = those of the small convolution for ∂z,
    ∂inner = ∂u xᵀ,  ∂x = Wᵀ ∗ g + innerᵀ ∂u
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visadapt.core import ops

Chain = tuple[Tensor, Tensor, Tensor]


def can_chain(layer: nn.Module) -> bool:
    """Whether the fused operation applies: an ungrouped convolution, frozen, outside the compiler."""
    if isinstance(layer, nn.Linear) or layer.groups != 1 or torch.compiler.is_compiling():
        return False
    return not layer.weight.requires_grad  # type: ignore[return-value]


def chain_update(
    layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, chain: Chain,
    rows: tuple[int, int] | None, output_size: list[int] | None,
) -> Tensor:  # fmt: skip
    """The output of the convolution with one update by (inner, kernel, up), on some of its output rows."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    inner, kernel, up = (t.to(dtype) for t in chain)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        conv, padded = ops.prepare(layer, x.to(dtype), output_size)  # type: ignore[arg-type]
        fixed = (conv, slice(None) if rows is None else slice(*rows))
        kernel = ops.native(layer, kernel)
        y: Tensor = ChainUpdate.apply(*fixed, padded, weight.to(dtype), bias, inner, kernel, up)  # type: ignore[no-untyped-call]
    return y.squeeze(0) if conv.unbatched else y


class ChainUpdate(torch.autograd.Function):
    """The update of an ungrouped convolution: (N, in, *size) -> (N, out, *size')."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, conv: ops.Conv, rows: slice, x: Tensor, weight: Tensor, bias: Tensor | None, inner: Tensor,
        kernel: Tensor, up: Tensor,
    ) -> Tensor:  # fmt: skip
        """The base output, to which the update is added in place."""
        n = len(x)
        y = conv(x, weight, bias)
        u = inner.expand(n, -1, -1).bmm(x.flatten(2)).view(n, -1, *x.shape[2:])
        z = conv(u, kernel).flatten(2)
        y.view(n, y.shape[1], -1)[:, rows].baddbmm_(up.expand(n, -1, -1), z)
        ctx.conv, ctx.rows = conv, rows
        ctx.save_for_backward(x, weight, inner, kernel, up, u, z)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        """Gradients for x, bias and the three factors; the base weight's is never formed."""
        x, weight, inner, kernel, up, u, z = ctx.saved_tensors
        conv, n = ctx.conv, len(x)
        with torch.autocast(grad.device.type, enabled=False):
            g = grad.reshape(n, grad.shape[1], -1)
            grad_bias = g.sum((0, 2)) if ctx.needs_input_grad[4] else None
            g = g[:, ctx.rows]
            grad_up = g.bmm(z.transpose(1, 2)).sum(0)
            grad_z = up.t().expand(n, -1, -1).bmm(g).view(n, -1, *grad.shape[2:])
            grad_u, grad_kernel, _ = conv.backward(grad_z, u, kernel, [True, True, False])
            grad_u = grad_u.flatten(2)
            grad_inner = grad_u.bmm(x.flatten(2).transpose(1, 2)).sum(0)
            grad_x = None
            if ctx.needs_input_grad[2]:
                grad_x = conv.backward(grad, x, weight, [True, False, False])[0]
                grad_x.view(n, x.shape[1], -1).baddbmm_(inner.t().expand(n, -1, -1), grad_u)
        return None, None, grad_x, None, grad_bias, grad_inner, grad_kernel, grad_up
