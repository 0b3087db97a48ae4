"""Some parameters as views of one flat parameter, with their gradients and optimiser states."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

PER_TENSOR = ("step", "mu_product")  # state of elementwise rules with one value per tensor, not per element


class Buffer:
    """Some parameters of one group, and the flat parameter they are views of.

    They are ordered by shape: equal shapes are joined by one ``cat`` of the tensors as they are, four times
    cheaper than one of 1,200 reshaped ones.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = sorted(parameters, key=lambda p: (p.dim(), *p.shape))
        self.flat = nn.Parameter(_flatten_dense_tensors([p.detach() for p in self.parameters]))
        self.grad = torch.zeros_like(self.flat)
        self.views = self.split(self.flat.detach())
        self.grad_views = self.split(self.grad)
        self.skipped: list[int] = []
        self.runs = list(self._runs())
        for parameter, view in zip(self.parameters, self.views):
            parameter.data = view

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of ``flat`` in the shapes of the parameters."""
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters)]

    def _runs(self) -> Iterator[tuple[slice, Tensor]]:
        """Neighbours of equal shape, with their gradients as one stacked view."""
        start = offset = 0
        for shape, same in groupby(self.parameters, key=lambda p: p.shape):
            count = len(list(same))
            size = count * shape.numel()
            yield slice(start, start + count), self.grad[offset : offset + size].view(count, *shape)
            start, offset = start + count, offset + size

    def check(self) -> None:
        """Refuse to step parameters that were moved or cast away from the buffer (ends are enough: all move).

        Raises:
            RuntimeError: they were.
        """
        for i in (0, -1):
            if self.parameters[i].data_ptr() != self.views[i].data_ptr():
                raise RuntimeError(
                    "the parameters were moved or cast after the optimiser was made: "
                    "call `model.to(...)` first, then make the optimiser"
                )

    def gather(self) -> None:
        """Copy the gradients into the buffer and let the parameters' gradients be views of it."""
        grads = [p.grad for p in self.parameters]
        new = [i for i, g in enumerate(grads) if g is not self.grad_views[i]]
        if not new:
            return
        self.skipped = [i for i in new if grads[i] is None]
        present = [g for g in grads if g is not None]
        if len(new) == len(present) == len(grads):
            for run, stacked in self.runs:
                if stacked.dim() == 1:
                    torch.stack(present[run], out=stacked)
                else:
                    torch.cat(present[run], out=stacked.flatten(0, 1))
        else:
            for i in new:
                g = grads[i]
                self.grad_views[i].zero_() if g is None else self.grad_views[i].copy_(g)
        for i in new:
            if grads[i] is not None:
                self.parameters[i].grad = self.grad_views[i]
        self.flat.grad = None if len(self.skipped) == len(grads) else self.grad


def follows(state: Any, flat: Tensor) -> bool:
    """Whether a state tensor has one value per element (moments), not one per tensor (step counts)."""
    return isinstance(state, Tensor) and state.shape == flat.shape


def joined(buffer: Buffer, of: dict[int, dict[str, Any] | None]) -> dict[str, Any] | None:
    """One state for the buffer from those of its parameters; a parameter that never stepped has zeros.

    Raises:
        ValueError: a state has another shape than its parameter (the fused kernel would write past its end).
    """
    ones = [of[id(p)] for p in buffer.parameters]
    first = next((one for one in ones if one), None)
    if first is None:
        return None
    one_state: dict[str, Any] = {}
    for key, value in first.items():
        if isinstance(value, Tensor) and key not in PER_TENSOR:
            parts = [one[key] if one else torch.zeros_like(p) for one, p in zip(ones, buffer.parameters)]
            if any(part.shape != p.shape for part, p in zip(parts, buffer.parameters)):
                raise ValueError(f"the optimiser state '{key}' has other shapes than the parameters: other rank?")
            one_state[key] = torch.cat([part.reshape(-1).to(value.device) for part in parts])
        else:
            one_state[key] = value
    return one_state
