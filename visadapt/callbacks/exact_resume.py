"""Bit-exact resume: the random state of every process, and checkpoint files that are whole or absent."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from visadapt.core.files import replacing


class ExactResume(L.Callback):
    """Saves and restores the random state (dropout, noise, mixup) of each process.

    Together with ``ExactLoader`` (order, position, augmentations) and the optimiser state that Lightning
    saves, a run that was killed continues with the same bits. Validation runs with a random state of its own,
    so it may run more or less often, or be interrupted, without changing the training.
    """

    def __init__(self) -> None:
        self._training_state: dict[str, Any] | None = None  # held back while validation runs
        self._restored: list[dict[str, Any]] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write checkpoints through ``AtomicFiles``, unless the user chose another way."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicFiles()

    def state_dict(self) -> dict[str, Any]:
        """The random state of every process; called on all of them."""
        own = self._training_state or random_state()
        if not (dist.is_available() and dist.is_initialized()):
            return {"ranks": [own]}
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, own)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the states until training starts."""
        self._restored = state_dict["ranks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore this process' state as the last thing before the first batch."""
        self._training_state = None
        states, self._restored = self._restored, None
        if states is None:
            return
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint was written by {len(states)} processes, this run has {trainer.world_size}: "
                "training continues from the same weights, but not bit for bit"
            )
            return
        set_random_state(states[trainer.global_rank])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Correct a count of Lightning 2.6.

        Under ``max_steps`` a run resumed from the end of an epoch ends that epoch, now empty, once more: it is
        counted twice, the order of the next one is skipped, and ``max_epochs`` is reached one epoch early.
        """
        progress = trainer.fit_loop.epoch_progress
        for counts in (progress.current, progress.total):
            counts.processed = counts.completed + 1  # type: ignore[attr-defined]  # always true here

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hold the training's state."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._training_state = random_state()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from the held state."""
        if self._training_state is not None:
            set_random_state(self._training_state)
            self._training_state = None


def random_state() -> dict[str, Any]:
    """State of the torch (CPU, current CUDA device), numpy and Python generators, safe for weights_only."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    words = torch.from_numpy(keys.astype(np.int64))  # type: ignore[attr-defined]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(internal), gauss],
        "numpy": [str(name), words, int(position), int(has_gauss), float(cached)],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Inverse of ``random_state``."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


class AtomicFiles(TorchCheckpointIO):
    """Writes beside the file and renames, so that a kill during a save leaves the previous checkpoint.

    Lightning writes to the system's temporary folder and moves; onto another file system that is a copy, and
    a kill leaves half a file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save to ``path``, whole or not at all; remote paths (``s3://…``) as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
