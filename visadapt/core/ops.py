"""The linear operation of each layer kind with any weight, and its canonical weight layout.

Canonical: (outputs, inputs per group, *kernel), which Linear and ConvNd have already;
ConvTransposeNd stores (inputs, outputs per group, *kernel).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def is_linear_op(layer: nn.Module) -> bool:
    """Whether adapters can be grafted on this layer (lazy layers have no shape yet)."""
    return isinstance(layer, KINDS) and not isinstance(layer, nn.modules.lazy.LazyModuleMixin)


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer computes exactly its class's own operation (a quantised Linear does not)."""
    forward = getattr(type(layer), "_base", type(layer)).forward
    return any(forward is kind.forward for kind in KINDS)


def shape_of(layer: nn.Module) -> tuple[int, int, tuple[int, ...], int]:
    """Outputs, inputs per group, kernel and groups, from declared attributes (packed weights lie)."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features, (), 1
    assert isinstance(layer, _ConvNd)
    return layer.out_channels, layer.in_channels // layer.groups, tuple(layer.kernel_size), layer.groups


def stride_of(layer: nn.Module) -> int:
    """Input positions per application of the kernel."""
    if not isinstance(layer, _ConvNd) or isinstance(layer, _ConvTransposeNd):
        return 1
    return math.prod(layer.stride)


def _swap(layer: nn.Module, weight: Tensor) -> Tensor:
    # (g·a, b, *k) -> (g·b, a, *k): its own inverse with the roles of a and b exchanged.
    if not isinstance(layer, _ConvTransposeNd):
        return weight
    g, b, kernel = layer.groups, weight.shape[1], weight.shape[2:]
    return weight.reshape(g, -1, b, *kernel).transpose(1, 2).reshape(g * b, -1, *kernel)


def canonical(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight as the layer stores it -> (outputs, inputs per group, *kernel)."""
    return _swap(layer, weight)


def native(layer: nn.Module, weight: Tensor) -> Tensor:
    """(outputs, inputs per group, *kernel) -> a weight as the layer stores it."""
    return _swap(layer, weight)


def channel_dim(layer: nn.Module) -> int:
    """The dimension of the outputs that holds channels, from the end (unbatched inputs work)."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(shape_of(layer)[2])


class Conv:
    """The fixed numbers of a convolution whose input is batched and padded already (`prepare`)."""

    def __init__(self, layer: _ConvNd, padding: Any, output_padding: Any, unbatched: bool) -> None:
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.transposed, self.dims = isinstance(layer, _ConvTransposeNd), len(layer.kernel_size)
        self.padding, self.output_padding, self.unbatched = padding, output_padding, unbatched

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution of a prepared input with a native weight."""
        return torch.ops.aten.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups,
        )  # fmt: skip

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> list[Tensor]:
        """Gradients for (input, weight, bias) as the mask asks."""
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups, mask,
        )  # fmt: skip

    def backward_input(self, grad: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        """The gradient for an input of that shape, which is all that it depends on."""
        # Never read. On a CPU a dense tensor costs no page, where an expanded one would be copied out.
        x = grad.new_empty(shape) if grad.device.type == "cpu" else grad.new_empty(1).expand(shape)
        return self.backward(grad, x, weight, [True, False, False])[0]


def prepare(layer: _ConvNd, x: Tensor, output_size: list[int] | None = None) -> tuple[Conv, Tensor]:
    """A convolution and its input, batched, with padding modes other than zeros applied."""
    dims, padding, output_padding = len(layer.kernel_size), layer.padding, layer.output_padding
    unbatched = x.dim() == dims + 1
    x = x.unsqueeze(0) if unbatched else x
    if isinstance(layer, _ConvTransposeNd):
        if output_size is not None:
            args = (layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation)
            output_padding = tuple(layer._output_padding(x, output_size, *args))  # type: ignore[arg-type]
    elif layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * dims
    return Conv(layer, padding, output_padding, unbatched), x


def apply(
    layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None, output_size: list[int] | None = None
) -> Tensor:
    """The layer's operation (its stride, dilation, padding mode) with a native weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    assert isinstance(layer, _ConvNd)
    if isinstance(layer, _ConvTransposeNd):
        conv, x = prepare(layer, x, output_size)
        numbers = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
        y = getattr(F, f"conv_transpose{conv.dims}d")(x, weight, bias, *numbers)  # aten's own has no autocast
        return y.squeeze(0) if conv.unbatched else y
    return layer._conv_forward(x, weight, bias)  # type: ignore[operator]


def pointwise(layer: nn.Module, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A matrix (n, channels) applied to the channels of an output of the layer."""
    if isinstance(layer, nn.Linear):
        return F.linear(y, weight, bias)
    size = y.shape[1 + channel_dim(layer) :]
    flat = y.reshape(-1, weight.shape[1], size.numel())  # (batch, channels, positions), unbatched: batch 1
    # A batched product: the gradient of a thin 1×1 convolution's weight is several times slower.
    out = weight.expand(len(flat), -1, -1).bmm(flat)
    out = out if bias is None else out + bias[:, None]
    return out.view(*y.shape[: channel_dim(layer)], -1, *size)
