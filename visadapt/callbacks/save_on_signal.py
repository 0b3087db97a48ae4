"""SIGTERM (a scheduler's warning) and Ctrl-C save the run before it leaves."""

from __future__ import annotations

import os
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

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class SaveOnSignal(Checkpoint):
    """On SIGTERM or Ctrl-C: finish the current optimiser step, save ``last.ckpt``, name it in one line, and exit.

    Any process may be the one that is signalled: the processes agree after each step, and save together.
    Lightning's own handler is replaced while training: it starts a collective inside the signal handler,
    which meets whatever collective the other processes are in (a hang, or mixed-up gradients), and it saves
    nothing. A second Ctrl-C does not wait for the step.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal
        self._previous: dict[int, Any] = {}
        self._speaker = 0  # the process that tells of Ctrl-C
        self._step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over from Lightning (they belong to the main thread)."""
        self.received, self._step = 0, trainer.global_step
        self._speaker = os.getpid() if trainer.is_global_zero else 0
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Also in the workers of a loader, which inherit it and so outlive the first Ctrl-C of a terminal."""
        if number == signal.SIGINT and self.received == number:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.getpid() == self._speaker:
            os.write(2, b"\nvisadapt: saving after this step; Ctrl-C again stops at once\n")  # print may be under way
        self.received = max(number, self.received)

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
        number = self._agreed(trainer)
        if not number:
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        savers = [c for c in callbacks if isinstance(c, LastCheckpoint)] or [LastCheckpoint()]
        path = savers[0].save(trainer)
        trainer.strategy.barrier("saved on a signal")
        if trainer.is_global_zero:
            where = f"at step {trainer.global_step}; resume with --ckpt_path {path}"
            print(f"\nvisadapt: stopped by {SIGNALS[signal.Signals(number)]} {where}", file=sys.stderr, flush=True)
        # The first process watches the others and would kill itself over a non-zero exit of theirs.
        raise SystemExit(128 + number if trainer.is_global_zero else 0)

    def _agreed(self, trainer: L.Trainer) -> int:
        """Number of the signal that any process received, 0 without one; decided alike on all."""
        if trainer.world_size == 1 or not dist.is_initialized():
            return self.received
        flag = torch.tensor(self.received, device=trainer.strategy.root_device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag.item())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
