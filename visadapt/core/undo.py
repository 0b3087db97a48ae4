"""Loading is all or nothing: what a load that fails has changed is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from visadapt.core.layer import prune
from visadapt.core.model import adapters, grafted


class Undo:
    """What a load replaces in a model, to be put back when it fails."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = {id(a) for a in adapters(model).values()}
        self.flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self.values: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def replace(self, tensor: Tensor, value: Tensor) -> None:
        """Copy new values, and keep the old ones."""
        self.values.append((tensor, tensor.clone()))
        tensor.copy_(value)

    @torch.no_grad()
    def back(self) -> None:
        """The model as it was."""
        for tensor, old in reversed(self.values):
            tensor.copy_(old)
        for _, layer in list(grafted(self.model)):
            prune(layer, [key for key, a in layer.adapters.items() if id(a) not in self.before])
        for n, p in self.model.named_parameters():
            p.requires_grad_(self.flags.get(n, p.requires_grad))


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[Undo]:
    """Leave the model as it was if the block fails."""
    undo = Undo(model)
    try:
        yield undo
    except BaseException:
        undo.back()
        raise
