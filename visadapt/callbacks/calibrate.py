"""Shows adapters the gradient of their layers' weights before a run begins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning as L
from torch import Tensor

from visadapt.callbacks.exact_resume import random_state, set_random_state
from visadapt.core.calibrate import calibrate, waiting


class Calibrate(L.Callback):
    """Goes through the first training batches once and gives adapters that wait for it (LoRASB) ∂L/∂W of their layers.

    Losses are those of the task's training step. Afterwards the batches come again, as the first that are trained on,
    with the same random state as without this callback. Adapters that were loaded or resumed do not wait. Each task
    adds the callback by itself where a method asks for it; name it in ``trainer.callbacks`` to change its option.

    Args:
        batches: How many of the first batches of an epoch; the authors of LoRA-SB take some 50 samples.

    Raises:
        ValueError: ``batches`` is below 1; later: as ``core.calibrate.calibrate``.
    """

    def __init__(self, batches: int = 8) -> None:
        if batches < 1:
            raise ValueError(f"trainer.callbacks: Calibrate: batches={batches}, at least 1")
        self.batches = batches

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate what waits, after a checkpoint was loaded."""
        if not waiting(pl_module):
            return
        module: Any = pl_module
        state = random_state()
        module.log = module.log_dict = _say_nothing  # these are no steps, so they are not in the run's curves
        try:
            calibrate(pl_module, self._losses(trainer, module))
        finally:
            del module.log, module.log_dict
            set_random_state(state)

    def _losses(self, trainer: L.Trainer, module: Any) -> Iterator[Tensor]:
        count = min(self.batches, trainer.num_training_batches)
        loader: Any = trainer.train_dataloader
        for index, batch in enumerate(islice(loader, int(count))):
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            with trainer.precision_plugin.train_step_context():
                found = module.training_step(batch, index)
            yield found["loss"] if isinstance(found, dict) else found


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of Lightning's logging."""
