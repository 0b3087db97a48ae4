"""Layers that keep less for backward than torch's own, with the same outputs and gradients.

* A frozen convolution keeps nothing: ∂x = Wᵀ ∗ g needs only the shape of x, which torch keeps whole.
* SiLU behind a norm keeps the norm's input, which the norm keeps anyway, and makes its own input again.
* Gated GELU, h ⊙ gelu(gate) of one projection, keeps that projection and not gelu(gate).

`lean(model)` turns the layers of a model into these where they are; names, parameters and `isinstance`
stay as they were. Each decides at run time: where its own weight trains, under gradient checkpointing or the
compiler it is torch's own. An adapted convolution is the adapter's affair (`linear_op`), which finds here
how its input is made (`lean.recipe`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visadapt.core import ops
from visadapt.core.lean import NORM, Recipe, active, keeps_little, recipe


class _FrozenConv(torch.autograd.Function):
    """y = W ∗ x + b on frozen W and b; in autocast W is cast here, and kept as it is stored."""

    @staticmethod
    def forward(ctx: Any, conv: ops.Conv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.conv, ctx.shape = conv, x.shape
        ctx.save_for_backward(weight)
        return conv(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, ctx.conv.backward_input(grad, ctx.shape, ctx.saved_tensors[0].to(grad.dtype)), None, None


class _SiLU(torch.autograd.Function):
    """x · sigmoid(x), where x can be made again from what its producer keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Recipe, *sources: Tensor) -> Tensor:  # type: ignore[override]
        ctx.make = make
        ctx.remake = lambda *kept: F.silu(make.run(kept))
        ctx.save_for_backward(*sources)
        return F.silu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x = ctx.make.run(ctx.saved_tensors)
        return torch.ops.aten.silu_backward(grad, x), None, *[None] * len(ctx.saved_tensors)


class _GatedGELU(torch.autograd.Function):
    """(h, gate) -> h · gelu(gate), the halves of the last dimension."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:  # type: ignore[override]
        ctx.remake = _gated_gelu
        ctx.save_for_backward(both)
        return _gated_gelu(both)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (both,) = ctx.saved_tensors
        h, gate = both.chunk(2, dim=-1)
        found = torch.empty_like(both)
        first, second = found.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=first)
        torch.ops.aten.gelu_backward.grad_input(grad * h, gate, grad_input=second)
        return found


def _gated_gelu(both: Tensor) -> Tensor:
    h, gate = both.chunk(2, dim=-1)
    return h * F.gelu(gate)


class LeanConv2d(nn.Conv2d):
    """A convolution that keeps nothing of its input while its weight and bias are frozen."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Here and not in `forward`: for adapters the layer stays one that computes its class's own operation.
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trains or not keeps_little(input):
            return super()._conv_forward(input, weight, bias)
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        if not torch.is_autocast_enabled(kind) and weight.dtype != dtype:
            return super()._conv_forward(input, weight, bias)  # torch's own error
        with torch.autocast(kind, enabled=False):
            conv, x = ops.prepare(self, input.to(dtype))
            y: Tensor = _FrozenConv.apply(conv, x, weight, bias)  # type: ignore[no-untyped-call]
        return y.squeeze(0) if conv.unbatched else y


def _noted(y: Tensor, kind: str, layer: Any) -> Tensor:
    """The output of a norm, whose node in the graph is told what it lacks to make the output again."""
    node: Any = y.grad_fn if active() else None
    if node is not None and node.name() == kind:
        node.metadata[NORM] = (layer.bias, layer.eps)
    return y


class LeanGroupNorm(nn.GroupNorm):
    """GroupNorm whose output can be made again."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalised groups (N, C, *)."""
        return _noted(super().forward(input), "NativeGroupNormBackward0", self)


class LeanLayerNorm(nn.LayerNorm):
    """LayerNorm whose output can be made again in one pass."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalised last dimensions."""
        return _noted(super().forward(input), "NativeLayerNormBackward0", self)


class LeanSiLU(nn.SiLU):
    """SiLU that makes its input again where that input's producer keeps what this takes."""

    def forward(self, input: Tensor) -> Tensor:
        """The product x · sigmoid(x)."""
        made = recipe(input, input.dtype) if keeps_little(input) and not self.inplace else None
        if made is None:
            return super().forward(input)
        sources, made.sources = made.sources, ()  # kept by autograd alone
        y: Tensor = _SiLU.apply(input, made, *sources)  # type: ignore[no-untyped-call]
        return y


class GatedGELU(nn.Module):
    """proj(x) = (h, gate) -> h · gelu(gate), Shazeer 2020, arXiv 2002.05202 (GEGLU), with the exact GELU.

    Args:
        proj: Linear (in -> 2 · out).
    """

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        """(*, in) -> (*, out)."""
        both = self.proj(x)
        if not keeps_little(both):
            return _gated_gelu(both)
        y: Tensor = _GatedGELU.apply(both)  # type: ignore[no-untyped-call]
        return y


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: LeanConv2d, nn.GroupNorm: LeanGroupNorm, nn.LayerNorm: LeanLayerNorm, nn.SiLU: LeanSiLU,
}  # fmt: skip


def lean(model: nn.Module) -> nn.Module:
    """Turn convolutions, norms and SiLUs of exactly torch's classes into lean ones, in place.

    Adapters are grafted afterwards: a layer that has some is another class and stays as it is.
    """
    for module in model.modules():
        if type(module) in _KINDS and "forward" not in module.__dict__:
            module.__class__ = _KINDS[type(module)]
    return model
