"""Learning-rate schedules as one closed formula of the step, so that resuming cannot drift."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import lightning as L
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a decay to ``final`` times the learning rate at the last step.

    Args:
        shape: How it decays after the warm-up.
        warmup: Share of all steps over which the rate rises linearly from (almost) zero.
        final: What is left of the learning rate at the end, as a factor.
    """

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1 or not 0 <= self.final <= 1:
            raise ValueError(f"schedule: 0 ≤ warmup < 1 and 0 ≤ final ≤ 1, not {self.warmup} and {self.final}")
        if self.shape not in ("cosine", "linear", "constant"):
            raise ValueError(f"schedule.shape: cosine, linear or constant, not '{self.shape}'")

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by at ``step`` (from 0) of ``total`` optimiser steps."""
        rising = round(self.warmup * total)
        if step < rising:
            return (step + 1) / (rising + 1)  # never 0: the first step should already learn
        if self.shape == "constant":
            return 1.0
        done = min(1.0, (step - rising) / max(1, total - rising))
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left

    def scheduler(self, optimizer: Optimizer, total: int) -> LambdaLR:
        """The schedule for ``total`` steps of ``optimizer``, to be stepped after each of them."""
        return LambdaLR(optimizer, lambda step: self.factor(step, total))


def total_steps(trainer: L.Trainer) -> int | None:
    """Optimiser steps of the whole run, from its configuration; None if it has no end that is known before.

    ``trainer.estimated_stepping_batches`` would do the same but sets up the training loader too early, and a
    resumed run then starts its epoch again from the first batch (Lightning issue 20550).

    Raises:
        ValueError: the training loader has no length and ``max_steps`` is not set.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        steps = steps_per_epoch(trainer)
        if steps is not None:
            limits.append(trainer.max_epochs * steps)
        elif not limits:
            raise ValueError("the training data has no length: set `trainer.max_steps`, the schedule needs an end")
    return min(limits, default=None)


def steps_per_epoch(trainer: L.Trainer) -> int | None:
    """Optimiser steps of one epoch of the training data at hand; None if they have no length."""
    source = trainer.fit_loop._data_source
    loader = source.dataloader() if source.is_module() else source.instance
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    return math.ceil(batches / trainer.accumulate_grad_batches)
