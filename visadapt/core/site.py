"""What a method sees of a layer: a linear map, whatever the layer kind, or some rows of one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visadapt.core import ops


class Site:
    """All outputs of a layer, or the rows [start, stop) of them.

    Attributes:
        in_shape: (inputs per group, *kernel).
        width: number of outputs.
        groups: 1 except for grouped convolutions.
    """

    def __init__(
        self, layer: nn.Module, param: str = "weight", rows: tuple[int, int] | None = None,
        output_size: list[int] | None = None,
    ) -> None:  # fmt: skip
        self.layer, self.param, self.rows, self._output_size = layer, param, rows, output_size
        if ops.is_linear_op(layer) and param == "weight":
            self.outputs, fan_in, kernel, self.groups = ops.shape_of(layer)
            self.in_shape: tuple[int, ...] = (fan_in, *kernel)
        else:
            self.outputs, self.in_shape, self.groups = stored(layer, param).shape[0], stored(layer, param).shape[1:], 1
        self.width = self.outputs if rows is None else rows[1] - rows[0]

    @property
    def device(self) -> torch.device:
        """Where the adapter's tensors belong."""
        return stored(self.layer, self.param).device

    @property
    def dtype(self) -> torch.dtype:
        """Adapters are fp32 on any base (bf16 moments lose small updates), fp64 on an fp64 base."""
        return torch.float64 if stored(self.layer, self.param).dtype == torch.float64 else torch.float32

    @property
    def weight(self) -> Tensor:
        """The frozen weight, canonical (width, *in_shape), detached."""
        weight = stored(self.layer, self.param).detach()
        return self.cut(ops.canonical(self.layer, weight) if ops.is_linear_op(self.layer) else weight)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (width,), or None."""
        bias = getattr(self.layer, "bias", None) if self.param == "weight" else None
        return None if bias is None else self.cut(bias.detach())

    @property
    def stride(self) -> int:
        """Input positions per application of the kernel: 1 for a Linear and for transposed convolutions."""
        return ops.stride_of(self.layer) if self.param == "weight" else 1

    @property
    def channel_dim(self) -> int:
        """The dimension of x and y that holds channels, from the end."""
        return ops.channel_dim(self.layer)

    def cut(self, tensor: Tensor) -> Tensor:
        """The site's rows of a tensor whose first dimension is the layer's outputs."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation (stride, dilation, padding mode; no bias) with a canonical weight."""
        return ops.apply(self.layer, x, ops.native(self.layer, weight).to(x.dtype), None, self._output_size)

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """(up · down) ∗ x without forming up · down, for down (r, *in_shape) and up (width, r)."""
        if self.groups > 1:  # one small kernel per group costs more than the dense one
            return self.op(x, (up @ down.flatten(1)).view(up.shape[0], *down.shape[1:]))
        return self.pointwise(self.op(x, down), up)

    def pointwise(self, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A matrix (n, channels) over the channels of y, at each position."""
        bias = None if bias is None else bias.to(y.dtype)
        return ops.pointwise(self.layer, y, weight.to(y.dtype), bias)

    def input_norms(self, x: Tensor) -> Tensor:
        """Norm of each input (in_shape[0],) over samples, positions and groups."""
        flat = x.detach().float().movedim(ops.channel_dim(self.layer), -1).flatten(0, -2)
        return flat.square().sum(0).view(self.groups, -1).sum(0).sqrt()

    def per_channel(self, vector: Tensor) -> Tensor:
        """A vector (width,) shaped to broadcast over the channels of y."""
        return vector.view(-1, *[1] * (-1 - ops.channel_dim(self.layer)))


class MatrixSite(Site):
    """The same map as one matrix (width, prod(in_shape)); x holds one-hot rows.

    Affine methods act at each position alone, so their merged weight is what they do here.
    """

    def __init__(self, site: Site, weight: Tensor, bias: Tensor | None) -> None:
        self.layer, self.param, self.rows = site.layer, site.param, site.rows
        self.in_shape, self.width, self.groups, self.outputs = site.in_shape, site.width, site.groups, site.outputs
        self._weight, self._bias = weight, bias

    @property
    def weight(self) -> Tensor:
        """The running weight."""
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        """The running bias."""
        return self._bias

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        """X · Wᵀ over the flattened weight."""
        return F.linear(x, weight.flatten(1).to(x.dtype))

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """(up · down) x."""
        return F.linear(self.op(x, down), up.to(x.dtype))

    def pointwise(self, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A matrix over the last dimension."""
        return F.linear(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype))

    def per_channel(self, vector: Tensor) -> Tensor:
        """Channels are the last dimension."""
        return vector


def stored(layer: nn.Module, param: str) -> Tensor:
    """The parameter itself, past any view of it.

    Raises:
        KeyError: the module holds no such tensor.
    """
    found: Tensor | None = layer._parameters.get(param)
    if found is None:
        found = layer._buffers.get(param)  # packed or frozen weights may be buffers
    if found is None:
        raise KeyError(f"{type(layer).__name__} holds no tensor named '{param}'")
    return found
