"""SIGTERM (a scheduler's warning) saves the run before it leaves."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint

from visadapt.callbacks.last_checkpoint import LastCheckpoint

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports for a program that SIGTERM ended


class SaveOnSignal(Checkpoint):
    """On SIGTERM: finish the current optimiser step, save ``last.ckpt``, name it in one line, and exit.

    Any process may be the one that is signalled: the processes agree after each step, and save together.
    Lightning's own handler is replaced while training: it starts a collective inside the signal handler,
    which meets whatever collective the other processes are in (a hang, or mixed-up gradients), and it saves
    nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: Any = None
        self._step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take SIGTERM over from Lightning (signals belong to the main thread)."""
        self.received, self._step = False, trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave after a complete optimiser step: in its middle an accumulated gradient would be lost."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._leave_if_asked(trainer)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """A long validation must not outlast the grace period; a resumed run goes back and finishes it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._leave_if_asked(trainer)

    def _leave_if_asked(self, trainer: L.Trainer) -> None:
        if not self._agreed(trainer):
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        savers = [c for c in callbacks if isinstance(c, LastCheckpoint)] or [LastCheckpoint()]
        path = savers[0].save(trainer)
        trainer.strategy.barrier("saved on SIGTERM")
        if trainer.is_global_zero:
            where = f"at step {trainer.global_step}; resume with --ckpt_path {path}"
            print(f"\nvisadapt: stopped by SIGTERM {where}", file=sys.stderr, flush=True)
        # The first process watches the others and would kill itself over a non-zero exit of theirs.
        raise SystemExit(EXIT_CODE if trainer.is_global_zero else 0)

    def _agreed(self, trainer: L.Trainer) -> bool:
        """Whether any process was signalled, decided alike on all."""
        if trainer.world_size == 1 or not dist.is_initialized():
            return self.received
        flag = torch.tensor(int(self.received), device=trainer.strategy.root_device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signal back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signal back."""
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
