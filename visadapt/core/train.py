"""What training asks of adapters: hooks, penalties, and one optimiser group for every tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visadapt.core.adapter import Adapter
from visadapt.core.model import adapters


def before_step(model: nn.Module, step: int) -> None:
    """Before the forward passes of optimiser step `step` (from 0)."""
    for adapter in _with_hook(model, "before_step"):
        adapter.before_step(step)


def after_backward(model: nn.Module) -> None:
    """With all gradients of the step in place, before the optimiser uses them."""
    for adapter in _with_hook(model, "after_backward"):
        adapter.after_backward()


def after_step(model: nn.Module) -> None:
    """After the optimiser has stepped."""
    for adapter in _with_hook(model, "after_step"):
        adapter.after_step()


def penalty(model: nn.Module) -> Tensor:
    """The sum of what the adapters ask to add to the loss; a 0-d tensor, 0 without any."""
    terms = [t for t in (a.penalty() for a in _with_hook(model, "penalty")) if t is not None]
    if terms:
        return torch.stack([t.reshape(()) for t in terms]).sum()
    first = next(model.parameters(), None)
    return torch.zeros((), device=None if first is None else first.device)


def _with_hook(model: nn.Module, hook: str) -> list[Adapter]:
    return [a for a in adapters(model).values() if getattr(type(a), hook) is not getattr(Adapter, hook)]


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, up_lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Every trainable tensor in exactly one optimiser group.

    Args:
        model: the adapted model.
        lr: learning rate.
        weight_decay: for matrices; magnitudes, gains, biases and norms get none.
        up_lr_ratio: learning rate of `up` factors over `lr` (LoRA+: Hayou, Ghosh & Yu 2024,
            arXiv 2402.12354, recommends about 16 for large models).

    Raises:
        ValueError: nothing is trainable.
    """
    spared = {
        id(p) for a in adapters(model).values() for n, p in a.named_parameters() if n.split(".")[-1] in a.no_decay
    }
    spared |= {id(p) for n, p in model.named_parameters() if p.dim() <= 1 and ".adapters." not in f".{n}"}
    ups = {id(p) for a in adapters(model).values() for n, p in a.named_parameters() if n.split(".")[0].startswith("up")}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            fast = up_lr_ratio != 1 and id(parameter) in ups
            groups.setdefault((id(parameter) not in spared, fast), []).append(parameter)
    if not groups:
        raise ValueError("nothing is trainable: give `adapters`, or unfreeze the head or the whole model")
    return [
        {"params": params, "lr": lr * (up_lr_ratio if fast else 1), "weight_decay": weight_decay if decays else 0.0}
        for (decays, fast), params in groups.items()
    ]
