"""Evaluation with the mean output of several random forms of the adapters."""

from __future__ import annotations

from typing import Any

import lightning as L

from visadapt.core.train import ensemble


class Ensemble(L.Callback):
    """Validation, test and prediction average the model's output over so many masks of LoRA Dropout.

    Lin et al. 2024, arXiv 2404.09610, section "test-time ensemble". The cost is that of so many passes; without it the
    adapters act as the mean of all masks, in one. Training is not touched.

    Args:
        passes: Masks to average over; the paper trains and tests with about four.

    Raises:
        ValueError: Fewer than one pass; later: no adapter has masks, or the model's output is no tensor.
    """

    def __init__(self, passes: int = 4) -> None:
        if passes < 1:
            raise ValueError(f"trainer.callbacks: Ensemble: passes={passes}, at least 1")
        self.passes = passes

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model: Any = pl_module.model
        once = model.forward
        model.forward = lambda *args, **kwargs: ensemble(model, lambda: once(*args, **kwargs), self.passes)

    def _end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.model.__dict__.pop("forward", None)  # type: ignore[union-attr]

    on_validation_start = on_test_start = on_predict_start = _begin
    on_validation_end = on_test_end = on_predict_end = _end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A run that stops leaves the model as it was."""
        self._end(trainer, pl_module)
