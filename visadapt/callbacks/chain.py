"""Chains of updates: every so many steps what was learned is kept apart and a fresh update begins."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from visadapt.callbacks.adapter_ema import AdapterEMA
from visadapt.core.model import adapters
from visadapt.core.stack import TaskStack
from visadapt.core.train import next_task
from visadapt.maths.seeded import generator


class Chain(L.Callback):
    """Begins a new link (RAC-LoRA) or round (XGBLoRA) of the adapters every ``every`` optimiser steps.

    The function stays the same, the factors that train start anew, and so does the state of the optimiser, of a trained
    head as well, and averages of the trained tensors; the learning rate goes on along its schedule. Any method that
    keeps the updates of finished tasks can form a chain. Checkpoints say how many links are finished.

    Args:
        every: Optimiser steps of one link.
        seed: Source of what a link starts from, the same in every process.

    Raises:
        ValueError: ``every`` is below 1; later: no adapter keeps finished updates, or has room for all links.
    """

    def __init__(self, every: int, seed: int = 0) -> None:
        if every < 1:
            raise ValueError(f"trainer.callbacks: Chain: every={every}, at least 1")
        self.every, self.seed = every, seed
        self._stepped = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run that cannot end."""
        self._stepped = trainer.global_step
        stacks = _stacks(pl_module)
        if not stacks:
            raise ValueError("trainer.callbacks: Chain needs adapters that form chains (RACLoRA, XGBLoRA)")
        room = min(a.tasks for a in stacks)
        total = trainer.estimated_stepping_batches
        links = -(-int(total) // self.every) if total != float("inf") else 0
        if links > room:
            raise ValueError(
                f"trainer.callbacks: Chain: {int(total)} steps are {links} links of every={self.every}, the adapters "
                f"have room for tasks={room}; give them more, or longer links"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin a link after the last step of another, unless the run is over."""
        step = trainer.global_step
        if step == self._stepped:
            return
        self._stepped = step
        if step % self.every == 0 and step < trainer.estimated_stepping_batches:
            with torch.random.fork_rng():
                torch.manual_seed(generator(self.seed, "link", step).initial_seed())
                next_task(pl_module)
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, AdapterEMA):
                    callback.restart()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """How many links each adapter has finished."""
        checkpoint["links"] = [a.done for a in _stacks(pl_module)]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        for adapter, done in zip(_stacks(pl_module), checkpoint.get("links", [])):
            adapter.done = done


def _stacks(pl_module: L.LightningModule) -> list[TaskStack]:
    return [a for a in adapters(pl_module).values() if isinstance(a, TaskStack)]
