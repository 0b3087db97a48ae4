"""y = gain ⊙ (W ∗ x + up · (down ∗ x)) + b on a frozen W: one autograd Function for every such update.

Gradients (g = ∂L/∂y; matrix notation, the same with convolutions):
    z = down x                 (positions, r); saved, or made in backward where the forward pass merges
    ∂up = gain ⊙ (gᵀ z)        ∂gain = Σ g ⊙ (y − b) / gain
    ∂z = g (gain ⊙ up)         ∂down = (∂z)ᵀ x        ∂x = g (gain ⊙ W) + (∂z) down
(where the forward pass merges and down is frozen: ∂x = g W', without ∂z)
Saved for backward: x (or what it can be recomputed from, core/lean.py), z, and the output y where
there is a gain; never anything of the size of W. The in-place update of the base output, the
row-major up-factor and reductions without einsum are worth 10-20 % of a step each on their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visadapt.core import ops
from visadapt.core.lean import Recipe, recipe

Rows = tuple[int, int] | None


@dataclass
class Part:
    """One update: down (r, *in_shape), up (rows, r), gain (rows,) or None, on some output rows."""

    down: Tensor
    up: Tensor
    gain: Tensor | None = None
    rows: Rows = None


def merged_is_cheaper(positions: int, weight: Tensor) -> bool:
    """Whether the forward pass is cheaper through W + up · down than by two more thin products.

    Merging saves 2·N·r·(I + O) operations and costs 2·r·I·O and a copy of W; measured, it wins from
    about 1.5 N*, N* = 2IO/(I + O). It rounds ΔW to W's precision, which only true fp32 or fp64 products stand
    (TF32 loses 3 % of the update, bf16 23 %).
    """
    inputs, outputs = weight[0].numel(), weight.shape[0]
    exact = weight.dtype == torch.float64 or (
        weight.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        and not (weight.is_cuda and torch.backends.cuda.matmul.allow_tf32)
    )  # fmt: skip
    return exact and positions > 3 * inputs * outputs / (inputs + outputs)


def update(
    layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Part],
    output_size: list[int] | None = None, lean: bool = False,
) -> Tensor:  # fmt: skip
    """The output of the layer with all updates of `parts`, which must own disjoint rows or have no gain.

    Args:
        layer: gives the operation; its own weight is not read.
        x: input.
        weight: frozen base weight as the layer stores it.
        bias: bias or None.
        parts: updates.
        output_size: as in ConvTranspose's forward.
        lean: recompute x in backward where its producer keeps what that takes.
    """
    if torch.compiler.is_compiling() or weight.requires_grad:
        return _composed(layer, x, weight, bias, parts, output_size)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.is_floating_point() else x.dtype
    made = recipe(x, dtype) if lean and x.requires_grad else None
    cast = [t.to(dtype) for t in (x, weight)]
    bias = None if bias is None else bias.to(dtype)
    flat = [t for p in parts for t in (p.down.to(dtype), p.up.to(dtype), None if p.gain is None else p.gain.to(dtype))]
    rows = [p.rows for p in parts]
    with torch.autocast(kind, enabled=False):
        if isinstance(layer, nn.Linear):
            out: Tensor = LinearUpdate.apply(made, rows, *cast, bias, *flat)  # type: ignore[no-untyped-call]
            return out
        conv, padded = ops.prepare(layer, cast[0], output_size)  # type: ignore[arg-type]
        made = made if padded is cast[0] else None  # the recipe gives the unpadded tensor
        flat[0::3] = [ops.native(layer, down) for down in flat[0::3] if down is not None]
        out = ConvUpdate.apply(conv, made, rows, padded, cast[1], bias, *flat)  # type: ignore[no-untyped-call]
        return out.squeeze(0) if conv.unbatched else out


def _composed(
    layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Part], size: list[int] | None
) -> Tensor:
    # The same formula in single operations: for the compiler, which fuses them, and for a trained W.
    gained, channel = any(p.gain is not None for p in parts), ops.channel_dim(layer)
    shape = (-1, *[1] * (-1 - channel))
    y = ops.apply(layer, x, weight, None if gained else bias, size)
    for p in parts:
        z = ops.apply(layer, x, ops.native(layer, p.down).to(x.dtype), None, size)
        side = ops.pointwise(layer, z, p.up.to(z.dtype)).to(y.dtype)
        part = side + (y if p.rows is None else y.narrow(channel, p.rows[0], p.rows[1] - p.rows[0]))
        part = part if p.gain is None else part * p.gain.view(shape).to(y.dtype)
        y = part if p.rows is None else torch.slice_scatter(y, part, channel, *p.rows)
    return y if bias is None or not gained else y + bias.view(shape).to(y.dtype)


class _Update(torch.autograd.Function):
    """Shared bookkeeping: what is saved, and how it comes back."""

    @staticmethod
    def keep(ctx: Any, made: Recipe | None, rows: list[Rows], x: Tensor, y: Tensor, rest: list[Tensor | None]) -> None:
        """Save x or its recipe's sources, y where a gain needs it, then z, weight, bias and the factors."""
        ctx.made, ctx.rows, ctx.shape = made, rows, x.shape
        ctx.train_down = any(ctx.needs_input_grad[-len(rest[3:]) :][0::3])
        if not ctx.train_down:  # LoRA-FA: only the shape of x is needed
            made = ctx.made = None
        kept: tuple[Tensor | None, ...] = (x if ctx.train_down else None,) if made is None else made.sources
        if made is not None:
            made.sources = ()  # kept by autograd alone, which lets go of them in backward
        ctx.count = len(kept)
        ctx.save_for_backward(*kept, y if any(gain is not None for gain in rest[5::3]) else None, *rest)

    @staticmethod
    def restore(ctx: Any) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """The input x (its shape alone where down is frozen), y (or None) and the rest.

        Raises:
            RuntimeError: a later layer wrote into the output in place.
        """
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "a tensor that an adapter keeps for its gradient was overwritten in place; methods with a "
                "magnitude (DoRA) keep the layer's output, so set inplace=False on the activation behind the layer"
            ) from error
        y, rest = saved[ctx.count], saved[ctx.count + 1 :]
        if not ctx.train_down:
            return rest[1].new_empty(1).expand(ctx.shape), y, rest
        return saved[0] if ctx.made is None else ctx.made.run(saved[: ctx.count]), y, rest


def _slice(rows: Rows) -> slice:
    return slice(None) if rows is None else slice(*rows)


def _over(dots: Tensor, gain: Tensor) -> Tensor:
    """Their quotient; zero where the gain is, as it is for rows of zeros."""
    return dots / torch.where(gain == 0, 1, gain)


def _join(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _gained(tensor: Tensor, gains: Sequence[Tensor | None], rows: list[Rows], dim: int) -> Tensor:
    """The tensor with the outputs in a dimension times their gains."""
    shape = [1] * tensor.dim()
    shape[dim] = -1
    if gains[0] is not None and rows == [None]:
        return tensor * gains[0].view(shape)
    tensor = tensor.clone()
    for gain, r in zip(gains, rows):
        if gain is not None:
            start, stop = r or (0, tensor.shape[dim])
            tensor.narrow(dim, start, stop - start).mul_(gain.view(shape))
    return tensor


def _carry(
    grad: Tensor, weight: Tensor, gains: Sequence[Tensor | None], rows: list[Rows], axis: int = 0
) -> tuple[Tensor, Tensor]:
    """The incoming gradient (N, out, …) and the weight, the smaller of them with the gains; `axis` has its outputs."""
    if all(gain is None for gain in gains):
        return grad, weight
    if grad.numel() < weight.numel():
        return _gained(grad, gains, rows, 1), weight
    return grad, _gained(weight, gains, rows, axis)


def _merge(weight: Tensor, downs: Any, ups: Any, gains: Any, rows: list[Rows]) -> Tensor:
    merged = weight.clone()
    for down, up, gain, r in zip(downs, ups, gains, rows):
        part = merged[_slice(r)].addmm_(up, down)
        if gain is not None:
            part.mul_(gain[:, None])
    return merged


def _column_dots(a: Tensor, b: Tensor) -> Tensor:
    # Σ_n a[n] ⊙ b[n]; on a CPU in pieces that stay in the cache, which halves the traffic.
    if a.device.type != "cpu":
        return (a * b).sum(0)
    total = a.new_zeros(a.shape[1])
    for i in range(0, len(a), 128):
        total += (a[i : i + 128] * b[i : i + 128]).sum(0)
    return total


class LinearUpdate(_Update):
    """The update of a Linear: (*, in) -> (*, out)."""

    @staticmethod
    def forward(  # type: ignore[override]  # noqa: D102
        ctx: Any, made: Recipe | None, rows: list[Rows], x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any
    ) -> Tensor:
        downs, ups, gains = flat[0::3], flat[1::3], flat[2::3]
        flat_x = x.reshape(-1, x.shape[-1])
        gained = any(gain is not None for gain in gains)
        merges = merged_is_cheaper(len(flat_x), weight)
        # With x kept for ∂down, z waits until backward.
        z = None if merges and any(ctx.needs_input_grad[5::3]) else flat_x @ _join(downs).t()
        if merges:
            y = F.linear(x, _merge(weight, downs, ups, gains, rows), bias)
        else:
            y = F.linear(x, weight, None if gained else bias)
            assert z is not None
            flat_y = y.view(-1, y.shape[-1])
            for up, gain, r, part_z in zip(ups, gains, rows, z.split([up.shape[1] for up in ups], 1)):
                part = flat_y[:, _slice(r)].addmm_(part_z, up.t().contiguous())  # (r, rows): along memory
                if gain is not None:
                    part.mul_(gain)
            if gained and bias is not None:
                y.add_(bias)
        _Update.keep(ctx, made, rows, x, y, [z, weight, bias, *flat])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # noqa: D102
        with torch.autocast(grad.device.type, enabled=False):
            x, y, (z, weight, bias, *flat) = _Update.restore(ctx)
            downs, ups, gains = flat[0::3], flat[1::3], flat[2::3]
            g, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            down = _join(downs)
            z = flat_x @ down.t() if z is None else z
            grad_bias = g.sum(0) if bias is not None and ctx.needs_input_grad[4] else None
            sizes = [up.shape[1] for up in ups]
            grads: list[Tensor | None] = []
            # ∂z is for ∂down and for ∂x; where down is frozen the merged weight may give ∂x alone.
            merges = not ctx.train_down and merged_is_cheaper(len(g), weight)
            grad_z = torch.empty_like(z)
            for up, gain, rows, part_z, part_gz in zip(ups, gains, ctx.rows, z.split(sizes, 1), grad_z.split(sizes, 1)):
                part, grad_gain = g[:, _slice(rows)], None
                if gain is None:
                    grad_up = part_z.t().contiguous() @ part  # (r, rows); the thin factor is copied: faster
                else:
                    # One more row of ones gives Σ g in the same pass.
                    grad_up, total = (torch.cat([part_z, z.new_ones(len(z), 1)], 1).t().contiguous() @ part).split(
                        (up.shape[1], 1)
                    )
                    # Σ g ⊙ u with u = (y − b) / gain, from the output that the next layer keeps anyway.
                    dots = _column_dots(part, y.reshape(len(g), -1)[:, _slice(rows)])
                    grad_gain = _over(dots if bias is None else dots - total[0] * bias[_slice(rows)], gain)
                    grad_up, up = grad_up * gain, up * gain[:, None]
                if not merges:
                    torch.mm(part, up, out=part_gz)
                grads += [None, grad_up.t(), grad_gain]
            if ctx.train_down:
                grads[0::3] = (grad_z.t().contiguous() @ flat_x).split(sizes)
            grad_x = None
            if ctx.needs_input_grad[2] and merges:
                grad_x = (g @ _merge(weight, downs, ups, gains, ctx.rows)).view(x.shape)
            elif ctx.needs_input_grad[2]:
                g, weight = _carry(g, weight, gains, ctx.rows)
                grad_x = (g @ weight).addmm_(grad_z, down).view(x.shape)
            return None, None, grad_x, None, grad_bias, *grads


class ConvUpdate(_Update):
    """The update of an ungrouped convolution: (N, in, *size) -> (N, out, *size')."""

    @staticmethod
    def forward(  # type: ignore[override]  # noqa: D102
        ctx: Any, conv: ops.Conv, made: Recipe | None, rows: list[Rows], x: Tensor, weight: Tensor,
        bias: Tensor | None, *flat: Any,
    ) -> Tensor:  # fmt: skip
        downs, ups, gains = flat[0::3], flat[1::3], flat[2::3]
        gained = any(gain is not None for gain in gains)
        y = conv(x, weight, None if gained else bias)
        z = conv(x, _join(downs, int(conv.transposed)))
        n, positions = y.shape[0], math.prod(y.shape[2:])
        flat_y, sizes = y.view(n, y.shape[1], positions), [up.shape[1] for up in ups]
        for up, gain, r, part_z in zip(ups, gains, rows, z.view(n, z.shape[1], positions).split(sizes, 1)):
            part = flat_y[:, _slice(r)].baddbmm_(up.expand(n, -1, -1), part_z)
            if gain is not None:
                part.mul_(gain[:, None])
        if gained and bias is not None:
            flat_y.add_(bias[:, None])
        ctx.conv = conv
        _Update.keep(ctx, made, rows, x, y, [z, weight, bias, *flat])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # noqa: D102
        with torch.autocast(grad.device.type, enabled=False):
            conv, need_x = ctx.conv, ctx.needs_input_grad[3]
            x, y, (z, weight, bias, *flat) = _Update.restore(ctx)
            downs, ups, gains = flat[0::3], flat[1::3], flat[2::3]
            n, channels = grad.shape[:2]
            g = grad.reshape(n, channels, math.prod(grad.shape[2:]))
            grad_bias = g.sum((0, 2)) if bias is not None and ctx.needs_input_grad[5] else None
            sizes = [up.shape[1] for up in ups]
            grads: list[Tensor | None] = []
            grad_z: list[Tensor] = []
            for up, gain, rows, part_z in zip(ups, gains, ctx.rows, z.view(n, z.shape[1], g.shape[2]).split(sizes, 1)):
                part, grad_gain = g[:, _slice(rows)], None
                if gain is None:
                    grad_up = torch.bmm(part, part_z.transpose(1, 2)).sum(0)
                else:
                    with_ones = torch.cat([part_z, z.new_ones(n, 1, part_z.shape[2])], 1)  # also gives Σ g
                    grad_up, total = torch.bmm(part, with_ones.transpose(1, 2)).sum(0).split((up.shape[1], 1), 1)
                    part_y = y.reshape(g.shape)[:, _slice(rows)]
                    dots = sum((a * b).sum(1) for a, b in zip(part, part_y))  # by image: in the cache
                    grad_gain = _over(dots if bias is None else dots - total[:, 0] * bias[_slice(rows)], gain)
                    grad_up, up = grad_up * gain[:, None], up * gain[:, None]
                grad_z.append(torch.bmm(up.t().expand(n, -1, -1), part))
                grads += [None, grad_up, grad_gain]
            axis = int(conv.transposed)
            # aten skips the gradients that the mask leaves out; the base weight's is never formed.
            joined = _join(grad_z, 1).view_as(z)
            grad_x, grad_down, _ = conv.backward(joined, x, _join(downs, axis), [need_x, ctx.train_down, False])
            if ctx.train_down:
                grads[0::3] = grad_down.split(sizes, axis)
            if need_x:
                grad, weight = _carry(grad, weight, gains, ctx.rows, axis)
                grad_x = grad_x.add_(conv.backward_input(grad, x.shape, weight))
            return None, None, None, grad_x if need_x else None, None, grad_bias, *grads
