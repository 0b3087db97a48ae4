"""Calls the adapters' training hooks at the right moments, also under gradient accumulation."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.optim import Optimizer

from visadapt.core.train import after_backward, after_step, before_step
from visadapt.optim.moments import of


class AdapterSteps(L.Callback):
    """``before_step``, ``after_backward`` and ``after_step``, once per optimiser step.

    With accumulation several batches make one step: ``before_step`` runs before the first of them,
    ``after_step`` once ``global_step`` has changed. Which step of how many it is says ``step_now`` of the task.
    """

    def __init__(self) -> None:
        self._announced: int | None = None
        self._stepped: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run; the step of a resumed one is known by now."""
        self._announced, self._stepped = None, trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Announce a step before its first batch."""
        if self._announced != trainer.global_step:
            self._announced = trainer.global_step
            counted = getattr(pl_module, "step_now", None)
            before_step(pl_module, *((trainer.global_step, None) if counted is None else counted()))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """All gradients are there (averaged over the processes), clipping is still to come."""
        after_backward(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a batch that made the optimiser step."""
        if self._stepped != trainer.global_step:
            self._stepped = trainer.global_step
            after_step(pl_module, of(*trainer.optimizers))
