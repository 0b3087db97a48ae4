"""Adapters read from a file: a prototype and its tensors for each layer, grafted once all of them are sound."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from visadapt.core.adapter import Adapter
from visadapt.core.model import adapt, adapters

Made = tuple[Adapter, dict[str, Tensor]]  # a prototype and its tensors


def shaped(tensor: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """An fp32 tensor of a shape.

    Raises:
        ValueError: it holds another number of values.
    """
    if tensor.numel() != torch.Size(shape).numel():
        raise ValueError(f"has {what} of shape {tuple(tensor.shape)}, the layer needs {tuple(shape)}")
    return tensor.reshape(shape).float()


@torch.no_grad()
def graft_made(model: nn.Module, made: Mapping[str, Made], name: str) -> None:
    """Put what was read on the layers, as one set."""
    before = {id(a) for a in adapters(model).values()}
    for method in dict.fromkeys(type(prototype) for prototype, _ in made.values()):
        mine = {own: p.hparams() for own, (p, _) in made.items() if type(p) is method}
        first = next(iter(mine.values()))
        targets = {f"re:{re.escape(o)}": {k: v for k, v in h.items() if first[k] != v} for o, h in mine.items()}
        adapt(model, method(**first), targets, name)
    for path, adapter in adapters(model, name).items():
        if id(adapter) not in before:
            state = adapter.state_dict()
            for key, tensor in made[path.rpartition(".adapters.")[0]][1].items():
                state[key].copy_(tensor)
