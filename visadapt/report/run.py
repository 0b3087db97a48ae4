"""The callback that leaves a finished run behind: adapter file, pictures, model card and the table."""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from visadapt.report import plots, results
from visadapt.report.card import PICTURES, card
from visadapt.report.facts import ADAPTER, RunFacts, adapter_sets, versions, write_text
from visadapt.report.kind import Kind, kind_of
from visadapt.report.table import print_summary


class RunReport(Callback):
    """Watches ``fit`` and writes the results of the run when it ends; rank 0 only.

    It draws no random numbers and changes no state of the model, so a run with it is the same run. What was
    seen before training and the curves travel in the checkpoint: a resumed run reports the whole of it.

    Args:
        run_dir: Folder for the files.
        name: What the run is called; the folder above ``run_dir`` names it otherwise.
        images: Samples in the picture of predictions; None takes what suits the kind of task.
        samples: Most samples of the held-out set to predict, spread evenly over it; None likewise.
        tensorboard_images: How often in a run the picture goes to TensorBoard.
    """

    def __init__(
        self,
        run_dir: str,
        name: str = "",
        images: int | None = None,
        samples: int | None = None,
        tensorboard_images: int = 4,
    ) -> None:
        self.run_dir, self.name = Path(run_dir), name
        self._most = (images, samples)
        self.tensorboard_images = tensorboard_images
        self.history: list[dict[str, float]] = []
        self._validated = False
        self.before: dict[str, Any] = {}
        self.seconds = 0.0
        self._steps: deque[float] = deque(maxlen=1000)
        self._started = self._step_started = 0.0
        self._resumed_from: str | None = None
        self._loss: Any = 0.0  # a tensor on the device: adding to it does not wait for the GPU
        self._batches = 0
        self._kind: Kind

    def state_dict(self) -> dict[str, Any]:
        """Curves, first predictions and time so far, as plain data and tensors."""
        return {"history": self.history, "before": self.before, "seconds": self._elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the curves and first predictions of the run that is resumed."""
        self.history = [dict(row) for row in state["history"]]
        self.before = dict(state["before"])
        self.seconds = state["seconds"]

    def on_fit_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Remember what the model predicts before the first step."""
        self._started = time.perf_counter()
        self._resumed_from = str(trainer.ckpt_path) if trainer.ckpt_path else None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._kind = kind_of(pl_module, *self._most)
        if self._reports(trainer) and not self.before:
            self.before = self._kind.look(trainer, pl_module)
        self._kind.before = self.before

    def on_train_batch_start(self, trainer: Any, pl_module: L.LightningModule, *args: Any) -> None:
        """Start the clock of a step."""
        self._step_started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        """Stop the clock of a step (data loading is not in it); add its loss to the epoch's mean."""
        self._steps.append(time.perf_counter() - self._step_started)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor):
            self._loss, self._batches = self._loss + loss.detach(), self._batches + 1

    def on_validation_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Remember that there are new values; keep a file of the model, if its kind of task wants that."""
        self._validated = not trainer.sanity_checking
        if self._started and self._reports(trainer) and not trainer.fast_dev_run:
            name = self._kind.keeps(pl_module)
            if name is not None:
                self._save(trainer, pl_module, name)

    def on_train_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Add a point to the curves; now and then a picture for TensorBoard."""
        # Lightning keeps the values of the last validation until the next one.
        stale = () if self._validated else ("val/",)
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if "/" in k and not k.startswith(stale)}
        self._validated = False
        if self._batches:
            values["train/loss"] = float(self._loss) / self._batches
        self._loss, self._batches = 0.0, 0
        epoch = float(trainer.current_epoch)
        self.history = [row for row in self.history if row["epoch"] != epoch]
        self.history.append({"epoch": epoch, **values})
        every = max(1, (trainer.max_epochs or 1) // self.tensorboard_images)
        if self._reports(trainer) and (trainer.current_epoch + 1) % every == 0:
            self._to_tensorboard(trainer, self._kind.picture(trainer, pl_module))

    def on_fit_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Write everything; a run that stopped on an error leaves only its checkpoints and metrics."""
        self.seconds, self._started = self._elapsed(), 0.0
        if trainer.fast_dev_run or not self._reports(trainer):
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        model = results.network(pl_module)
        facts = self._facts(trainer, pl_module)
        if facts.trainable:
            facts.adapter_bytes = self._save(trainer, pl_module, ADAPTER)
        if any(len(row) > 1 for row in self.history):
            levels = self._kind.levels(facts.figures)
            plots.save(plots.learning_curves(self.history, levels), self.run_dir / "learning_curves.png")
        self._to_tensorboard(trainer, self._kind.draw(trainer, self.run_dir, facts.class_names))
        facts.save(self.run_dir)
        pictures = [name for name in PICTURES if (self.run_dir / name).is_file()]
        write_text(self.run_dir / "README.md", card(facts, pictures, peft=results.in_peft(model)))
        print_summary(facts, self.run_dir)

    def _elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self._started if self._started else 0.0)

    def _reports(self, trainer: Any) -> bool:
        """Rank 0, with the whole model: a sharded one cannot run on one rank alone."""
        sharded = type(trainer.strategy).__name__ in ("FSDPStrategy", "ModelParallelStrategy")
        if sharded and trainer.is_global_zero:
            rank_zero_warn("sharded model: no pictures and no adapter file; make them from the checkpoint")
        return trainer.is_global_zero and not sharded and not trainer.sanity_checking

    def _save(self, trainer: Any, pl_module: L.LightningModule, name: str) -> int:
        """Write an adapter file into the run's folder; its size in bytes."""
        import visadapt as va

        self.run_dir.mkdir(parents=True, exist_ok=True)
        extra = {"class_names": json.dumps(_class_names(trainer))}
        extra |= getattr(pl_module, "adapter_metadata", dict)()  # what the file must say besides, by the task
        path = self.run_dir / name
        va.save(results.network(pl_module), path, base_name=results.base_name(pl_module), extra=extra)
        return path.stat().st_size

    def _facts(self, trainer: Any, pl_module: L.LightningModule) -> RunFacts:
        import visadapt as va

        model = results.network(pl_module)
        memory, kind = results.peak_memory()
        facts = RunFacts(
            name=self.name or self.run_dir.resolve().parent.name,
            task=type(pl_module).__name__,
            base=results.base_name(pl_module),
            base_hash=results.base_hash(pl_module),
            kind=self._kind.name,
            sets=adapter_sets(model),
            class_names=_class_names(trainer),
            epochs=trainer.current_epoch,
            steps=trainer.global_step,
            minutes=self.seconds / 60,
            step_ms=1000 * statistics.median(self._steps) if self._steps else None,
            peak_memory_mib=memory,
            memory_kind=kind,
            device=str(pl_module.device),
            resumed_from=self._resumed_from,
            started_from=getattr(pl_module, "start", None),
            versions=versions(),
        )
        counted = va.summary(model)
        facts.trainable, facts.total = counted.trainable, counted.total
        facts.figures = dict(getattr(pl_module, "figures", None) or {})  # what the task reports itself comes first
        facts.figures |= self._kind.figures(trainer, pl_module)
        return facts

    def _to_tensorboard(self, trainer: Any, picture: Any) -> None:
        if picture is not None:
            results.to_tensorboard(trainer, "predictions", np.asarray(picture))


def _class_names(trainer: Any) -> list[str]:
    return list(getattr(trainer.datamodule, "class_names", ()))
