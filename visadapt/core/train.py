"""What training asks of adapters: hooks, penalties, and one optimiser group for every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visadapt.core.adapter import Adapter, Moments
from visadapt.core.layer import Grafted
from visadapt.core.model import adapters


def before_step(model: nn.Module, step: int, total: int | None = None) -> None:
    """Before the forward passes of optimiser step `step` (from 0) of `total`; None where the end is not known."""
    for adapter in _with_hook(model, "before_step"):
        adapter.before_step(step, total)


def after_backward(model: nn.Module) -> None:
    """With all gradients of the step in place, before the optimiser uses them."""
    for adapter in _with_hook(model, "after_backward"):
        adapter.after_backward()


def after_step(model: nn.Module, moments: Moments = lambda parameter: {}) -> None:
    """After the optimiser has stepped.

    Args:
        model: the adapted model.
        moments: `visadapt.optim.moments.of(optimizer)`, for methods that move components about (BeamLoRA).
    """
    for adapter in _with_hook(model, "after_step"):
        adapter.after_step()
    sets: dict[tuple[str, type[Adapter]], list[Adapter]] = {}
    for adapter in adapters(model).values():
        sets.setdefault((adapter.name, type(adapter)), []).append(adapter)
    for (_, method), members in sets.items():
        method.after_step_together(members, moments)


def ensemble(model: nn.Module, run: Callable[[], Tensor], passes: int) -> Tensor:
    """The mean of the outputs of so many random forms of the adapters (LoRA Dropout), without gradients.

    Args:
        model: the adapted model.
        run: calls the model.
        passes: how many forms.

    Raises:
        ValueError: no adapter has random forms, or the output is no tensor.
    """
    drawing = _with_hook(model, "draw")
    if not drawing:
        raise ValueError("an ensemble needs adapters with random forms (LoRADropout); the model has none")
    try:
        with torch.no_grad():
            total: Tensor | float = 0.0
            for number in range(passes):
                for adapter in drawing:
                    adapter.draw(number)
                output = run()
                if not isinstance(output, Tensor):
                    raise ValueError(f"an ensemble averages tensors, the output is a {type(output).__name__}")
                total = total + output / passes
    finally:
        for adapter in drawing:
            adapter.draw(None)
    return total  # type: ignore[return-value]


def next_task(model: nn.Module) -> None:
    """Between two tasks of a sequence: what was learned is kept, and there is room for the next."""
    for adapter in _with_hook(model, "next_task"):
        adapter.next_task()


def watched(model: nn.Module, hook: Literal["begin_task", "end_task"]) -> bool:
    """Whether an adapter asks for the inputs of its layer at that time."""
    return bool(_with_hook(model, hook))


@torch.no_grad()
def tell_inputs(model: nn.Module, hook: Literal["begin_task", "end_task"], run: Callable[[], Any]) -> None:
    """Run the model over the images of a task and give each adapter that asks for it the Gram matrix of its inputs.

    Args:
        model: the adapted model.
        hook: which of their hooks is called.
        run: calls the model on all images.
    """
    asking = {id(a): a for a in _with_hook(model, hook)}
    layers: dict[nn.Module, list[Adapter]] = {}
    for module in model.modules():
        if isinstance(module, Grafted) and (
            mine := [asking[id(a)] for a in module.adapters.values() if id(a) in asking]
        ):
            layers[module] = mine
    grams: dict[tuple[nn.Module, bool], Tensor] = {}

    def add(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        for first in {a.first_token for a in layers[layer]}:
            x = given[0].flatten(1, -2) if given[0].dim() > 2 else given[0][:, None]
            x = (x[:, 0] if first else x.flatten(0, 1)).double()
            grams[layer, first] = x.t() @ x + grams.get((layer, first), 0.0)

    handles = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for layer, mine in layers.items():
        for adapter in mine:
            getattr(adapter, hook)(grams[layer, adapter.first_token])


def penalty(model: nn.Module) -> Tensor:
    """The sum of what the adapters ask to add to the loss; a 0-d tensor, 0 without any."""
    terms = [t for t in (a.penalty() for a in _with_hook(model, "penalty")) if t is not None]
    if terms:
        return torch.stack([t.reshape(()) for t in terms]).sum()
    first = next(model.parameters(), None)
    return torch.zeros((), device=None if first is None else first.device)


@contextmanager
def training_only(model: nn.Module, factor: Literal["up", "down"]) -> Iterator[None]:
    """What is computed inside gives a gradient to one factor of each adapter alone.

    Break-for-Make (arXiv 2403.19456) trains the two factors with different pictures; two losses, each computed inside
    with its own factor, may be added and have one backward. Parameters that are no adapter's are left alone.

    Args:
        model: the adapted model; its forward passes must not be computed again in backward (gradient checkpointing).
        factor: tensors whose names begin so, as `up`, `up_a` do.
    """
    still = [
        p
        for adapter in adapters(model).values()
        for name, p in adapter.named_parameters()
        if p.requires_grad and not name.split(".")[-1].startswith(factor)
    ]
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)


def _with_hook(model: nn.Module, hook: str) -> list[Adapter]:
    return [a for a in adapters(model).values() if getattr(type(a), hook) is not getattr(Adapter, hook)]


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    up_lr_ratio: float = 1.0,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Every trainable tensor in exactly one optimiser group.

    Args:
        model: the adapted model.
        lr: learning rate.
        weight_decay: for matrices; magnitudes, gains, biases and norms get none.
        up_lr_ratio: learning rate of `up` factors over that of the others (LoRA+: Hayou, Ghosh & Yu 2024,
            arXiv 2402.12354, recommends about 16 for large models).
        rates: learning rates of parts, by the name of a set of adapters or by the path of a module; a set goes
            before a path, and a longer path before a shorter one.

    Raises:
        ValueError: nothing is trainable, or a key of `rates` is no set and no path of anything that trains.
    """
    spared = {
        id(p) for a in adapters(model).values() for n, p in a.named_parameters() if n.split(".")[-1] in a.no_decay
    }
    spared |= {id(p) for n, p in model.named_parameters() if p.dim() <= 1 and ".adapters." not in f".{n}"}
    ups = {id(p) for a in adapters(model).values() for n, p in a.named_parameters() if n.split(".")[0].startswith("up")}
    own = _own_rates(model, rates or {})
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            fast = up_lr_ratio != 1 and id(parameter) in ups
            key = (id(parameter) not in spared, fast, own.get(id(parameter), lr))
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError("nothing is trainable: give `adapters`, or unfreeze the head or the whole model")
    return [
        {"params": params, "lr": rate * (up_lr_ratio if fast else 1), "weight_decay": weight_decay if decays else 0.0}
        for (decays, fast, rate), params in groups.items()
    ]


def _own_rates(model: nn.Module, rates: Mapping[str, float]) -> dict[int, float]:
    """Learning rates of the trainable tensors that `rates` mean, by identity."""
    sets = {id(p): a.name for a in adapters(model).values() for p in a.parameters()}
    found, used = {}, set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        paths = [key for key in rates if f"{name}.".startswith(f"{key}.")]
        named = sets.get(id(parameter))
        key = named if named in rates else max(paths, key=len, default=None)
        used |= {*paths, named}
        if key is not None:
            found[id(parameter)] = rates[key]
    if unused := [key for key in rates if key not in used]:
        parts = sorted({*sets.values(), *(n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad)})
        raise ValueError(f"rates: nothing that trains is called '{unused[0]}'; there are {', '.join(parts)}")
    return found
