"""Several losses in one training step, each with sets of adapters of its own that act and that learn."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.core.model import adapters
from visadapt.tasks.diffusion import Drawn, rows_of
from visadapt.tasks.video_sets import MOTION

Planned = tuple[str, frozenset[str], frozenset[str]]


@dataclass(frozen=True)
class Pass:
    """One loss of a step.

    Attributes:
        loss: A 0-d tensor with its graph.
        acting: Sets that acted on it.
        learning: Sets that learn from it.
        kind: What it is called in the logs.
    """

    loss: Tensor
    acting: frozenset[str]
    learning: frozenset[str]
    kind: str


class Sets:
    """The sets of a model, to be switched on and off for a while.

    Args:
        model: The adapted model; what trains of it besides adapters belongs to the set `temporal`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.adapters = list(adapters(model).values())
        owner = {id(p): adapter.name for adapter in self.adapters for p in adapter.parameters()}
        self.trained = [(owner.get(id(p), MOTION), p) for p in model.parameters() if p.requires_grad]
        self.names = frozenset({MOTION, *(adapter.name for adapter in self.adapters)})

    @contextmanager
    def only(self, acting: Collection[str], learning: Collection[str]) -> Iterator[None]:
        """Inside, the sets that are not ``acting`` are off, and what is not ``learning`` takes no gradient.

        What is computed inside has to have its backward pass inside the same again: gradient checkpointing computes
        it anew there.
        """
        off = [(adapter, adapter.strength) for adapter in self.adapters if adapter.name not in acting]
        still = [p for name, p in self.trained if name not in learning]
        for adapter, _ in off:
            adapter.strength = 0.0
        for parameter in still:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for adapter, before in off:
                adapter.strength = before
            for parameter in still:
                parameter.requires_grad_(True)


def one_set_each(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimiser groups of which each holds tensors of one set of adapters, or of none."""
    owner = {id(p): adapter.name for adapter in adapters(model).values() for p in adapter.parameters()}
    found = []
    for group in groups:
        by_set: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_set.setdefault(owner.get(id(parameter), ""), []).append(parameter)
        found += [group | {"params": parameters} for parameters in by_set.values()]
    return found


def plan(mode: str, own: str, names: frozenset[str], frames: int, skipped: bool) -> list[Planned]:
    """What is computed of clips in a step: kind of loss, the sets that act, and those that learn.

    Args:
        mode: As in ``Paths``; "second" is the second part of "sequential".
        own: The spatial set of the clips.
        names: All sets.
        frames: Of the clips; pictures have 1, and teach appearance alone.
        skipped: The spatial set rests in this step.

    Raises:
        ValueError: Pictures are to teach motion alone.
    """
    space, time = frozenset({own}), frozenset({MOTION})
    of_frames: Planned = ("appearance", space, space)
    of_clips: Planned = ("motion", time if skipped or mode == "temporal" else space | time, time)
    if mode == "single":
        return [("motion", names, names)]
    if mode == "spatial" or (mode == "dual" and frames == 1):
        return [of_frames]
    if frames == 1:
        raise ValueError("data: clips of one frame show no motion; set model.paths.mode: spatial, or more data.frames")
    return [of_frames, of_clips] if mode == "dual" and not skipped else [of_clips]


def backward(loss: Tensor, passes: Sequence[Pass], sets: Sets, asked: Tensor) -> None:
    """The gradients of a sum of passes, one pass after the other, and of what the adapters ask to add.

    Args:
        loss: The sum of the passes, perhaps scaled (by gradient scaling, or for accumulation).
        passes: Its terms.
        sets: Of the model.
        asked: The penalty, the same in all processes. Its gradients are added after those of the passes, which DDP has
            averaged by then: it takes one gradient of each tensor.
    """
    scales = torch.autograd.grad(loss, [one.loss for one in passes], retain_graph=True)
    for one, scale in zip(passes, scales, strict=True):
        with sets.only(one.acting, one.learning):
            one.loss.backward(scale)
    if asked.requires_grad:
        learning = [p for name, p in sets.trained if any(name in one.learning for one in passes)]
        added = torch.autograd.grad(asked, learning, scales[0], allow_unused=True)
        for parameter, gradient in zip(learning, added, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


@dataclass(frozen=True)
class Step:
    """A batch and all that chance decides of it.

    Attributes:
        batch: As the data give it.
        latents: (B, F, C, h, w).
        drawn: Times and noise.
        keep: Which captions are kept (B,).
        frame: The frame that the spatial set learns (B,).
        anchor: The frame that the others are debiased by (B,).
    """

    batch: dict[str, Any]
    latents: Tensor
    drawn: Drawn
    keep: Tensor
    frame: Tensor
    anchor: Tensor

    def rows(self, which: Tensor) -> Step:
        """Those of some clips, by number."""
        if len(which) == len(self.latents):
            return self
        tensors = [rows_of(tensor, which) for tensor in (self.keep, self.frame, self.anchor)]
        batch = {key: _rows(self.batch[key], which) for key in _SAID if key in self.batch}
        return Step(batch, rows_of(self.latents, which), self.drawn.rows(which), *tensors)


_SAID = ("captions", "text", "frame_captions", "frame_text")


def _rows(value: Any, which: Tensor) -> Any:
    if isinstance(value, Mapping):
        return {key: rows_of(tensor, which) for key, tensor in value.items()}
    return [value[index] for index in which.tolist()]
