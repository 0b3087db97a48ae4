"""Hyper-parameters that bring each method as close to a number of trained parameters as it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import visadapt as va
from benchmarks._hosts import share

LINKS = 5  # of chains
RANKS = [*range(1, 33), *(round(32 * 1.05**i) for i in range(1, 72))]  # to 1,024, in steps of 5 % from 32 on
COUNTS = [*RANKS, *(round(1024 * 1.03**i) for i in range(1, 180))]  # to 200,000
SIDES = [2**i for i in range(1, 8)]
NONE = [0]
Sizes = Sequence[int]
Options = Callable[[int, int], dict[str, Any]]


def rank(size: int, steps: int) -> dict[str, Any]:
    """The rule: the rank decides."""
    return {"rank": size}


def alone(size: int, steps: int) -> dict[str, Any]:
    """A method for sequences of tasks, on one task."""
    return {"rank": size, "tasks": 1}


def chain(size: int, steps: int) -> dict[str, Any]:
    """A method for chains; its links have a fifth of the steps each."""
    return {"rank": size, "tasks": LINKS}


# Method → its sizes, in the order in which the parameters grow, and what a size and the number of steps mean to it.
KNOBS: dict[str, tuple[Sizes, Options]] = {
    "IA3": (NONE, lambda size, steps: {}),
    "SSF": (NONE, lambda size, steps: {}),
    "RandLoRA": (RANKS[::-1], rank),  # fewer columns need more bases
    "VeRA": ([size for size in RANKS if size <= 256], rank),  # products of its rank with all tokens: slow beyond
    "DualLoRA": (RANKS, lambda size, steps: {"rank": size, "bases": size, "tasks": 1}),
    "LoKr": (RANKS, lambda size, steps: {"rank": size, "factor": 2}),  # its own split has no room for so many
    "NICE": (list(range(64, 0, -1)), lambda size, steps: {"reduction": size}),
    "Bat": (SIDES, rank),
    "OFT": (SIDES, lambda size, steps: {"block": size}),
    "BOFT": (SIDES, lambda size, steps: {"block": size}),
    "HRA": (RANKS, lambda size, steps: {"rank": 2 * size}),
    "Compacter": (RANKS, lambda size, steps: {"rank": 64, "inner": size}),  # by its rank alone: thousands of units
    "FourierFT": (COUNTS, lambda size, steps: {"count": size}),
    "WaveFT": (COUNTS, lambda size, steps: {"count": size}),
    "LoCA": (COUNTS, lambda size, steps: {"count": size}),
    "DVLoRA": (RANKS, lambda size, steps: {"rank": size, "warmup": steps // 2}),
    "PRILoRA": (RANKS, lambda size, steps: {"rank": size, "interval": max(1, steps // 5)}),
    **dict.fromkeys(("SDLoRA", "OLoRA", "InfLoRA", "DualLoRA", "NonCollisionLoRA", "CLoRA", "CoDyRA"), (RANKS, alone)),
    **dict.fromkeys(("RACLoRA", "XGBLoRA"), (RANKS, chain)),
}


def prototype(method: str, size: int, steps: int) -> va.Adapter:
    """The method at a size, for a run of so many steps."""
    return va.METHODS[method](**KNOBS.get(method, (RANKS, rank))[1](size, steps))


def parameters(model: nn.Module, targets: Sequence[str], method: va.Adapter) -> int | None:
    """How many values the method trains on these layers; None where it refuses one of them."""
    try:
        adapted = va.adapt(share(model), method, list(targets))
    except ValueError:
        return None
    return count(adapted)


def count(model: nn.Module) -> int:
    """Trained values of all adapters of a model, shared ones once."""
    found = {id(p): p.numel() for a in va.adapters(model).values() for p in a.parameters()}
    return sum(found.values())


def nearest(method: str, model: nn.Module, targets: Sequence[str], budget: int, steps: int) -> va.Adapter:
    """The prototype whose number of parameters is nearest to the budget.

    Raises:
        ValueError: the method refuses every size; says why.
    """
    sizes = KNOBS.get(method, (RANKS, rank))[0]

    def at(place: int) -> int | None:
        if place not in known:
            known[place] = parameters(model, targets, prototype(method, sizes[place], steps))
        return known[place]

    known: dict[int, int | None] = {}
    if len(sizes) <= len(SIDES):
        for place in range(len(sizes)):
            at(place)
    else:
        _bisect(at, len(sizes) - 1, budget)
    usable = {place: number for place, number in known.items() if number}
    if not usable:
        va.adapt(share(model), prototype(method, sizes[0], steps), list(targets))  # raises with the reason
        raise ValueError(f"{method} trains nothing on {', '.join(targets)}")
    best = min(usable, key=lambda place: (abs(usable[place] - budget), place))
    return prototype(method, sizes[best], steps)


def _bisect(at: Callable[[int], int | None], last: int, budget: int) -> None:
    """Ask for the counts on both sides of the budget; a size that is refused counts as too small."""
    low, high, step = 0, 0, 1
    while high < last and (at(high) or 0) < budget:
        low, high, step = high, min(last, high + step), step * 2
    at(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (at(middle) or 0) < budget else (low, middle)
    at(low)
