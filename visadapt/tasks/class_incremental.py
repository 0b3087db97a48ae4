"""Class-incremental learning: one model learns tasks that come one after the other, and is asked about all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from visadapt.backbones.base import Backbone
from visadapt.core.model import Adaptation, adapters
from visadapt.core.stack import TaskStack
from visadapt.core.train import next_task, penalty, tell_inputs, watched
from visadapt.data.loader import mixed_seed
from visadapt.maths.low_rank import norm
from visadapt.metrics.sequence import TaskAccuracy, summary
from visadapt.optim.schedule import Schedule, steps_per_epoch
from visadapt.tasks.base import DEFAULT_SCHEDULE, BaseTask
from visadapt.tasks.cosine_head import CosineHead, replace_classifier

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

Batch = tuple[Tensor, Tensor, Tensor]


class ClassIncremental(BaseTask):
    """Learns the tasks of a ``TaskSequence`` in turn, without the data of earlier ones, in one run.

    The epochs of the run are shared out evenly. When a task begins, adapters keep what they have learned
    (``next_task``), and optimiser and schedule start anew. After each task the accuracy on every task so far becomes a
    row of ``matrix``; a sample is told apart among all classes so far, without knowing its task.

    Args:
        backbone: Recipe of the network.
        num_classes: Classes of all tasks; the command line fills it in.
        task_classes: Classes of each task; the command line fills it in. None is one task with all of them, as for
            prediction.
        adapters: Sets of adapters, applied in order.
        train: What trains besides the new head.
        head: A linear classifier, or the cosine of features and class vectors times a learned factor.
        local: Cross-entropy among the classes of the task alone, so that it leaves the rows of the others as they are
            (weight decay does not); otherwise among all so far.
        oracle: Train the adapters of each task alone, without those of earlier ones, and in evaluation use for each
            sample those of its own task and the classes of it: what could be reached if the task were known.
        label_smoothing: Share of the target that is spread evenly over the classes.
        keep_tasks: Leave an adapter file of the model as it was after each task, ``after_task_1.safetensors`` and so
            on, beside the one of the end.
        seed: Source of what is drawn when a task begins.
        optimizer: Any torch optimiser; its ``lr`` and ``weight_decay`` are those of the matrices.
        schedule: Warm-up and decay of the learning rate in each task.
        rates: Learning rates of parts, by the name of a set of adapters or by the path of a module.
        start: Adapter file whose tensors the sets of the same name start from.

    Attributes:
        task: Number of the task that trains, from 0.
        matrix: Accuracies (T, T) after each task (row) on each task (column); NaN where there is none yet.
        sizes: Likewise, the mean over the adapted layers of ‖ΔW_k‖, what the update of each task (column) is worth.
    """

    report_kind = "sequence"
    task_accuracy: TaskAccuracy

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        task_classes: list[list[int]] | None = None,
        adapters: list[Adaptation] | None = None,
        train: Literal["adapters", "all"] = "adapters",
        head: Literal["linear", "cosine"] = "linear",
        local: bool = True,
        oracle: bool = False,
        label_smoothing: float = 0.0,
        keep_tasks: bool = False,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = DEFAULT_SCHEDULE,
        rates: dict[str, float] | None = None,
        start: str | None = None,
    ) -> None:
        super().__init__(adapters, optimizer, schedule, rates=rates, start=start)
        self._told = task_classes is not None
        task_classes = [list(range(num_classes))] if task_classes is None else task_classes
        if not task_classes or {c for classes in task_classes for c in classes} != set(range(num_classes)):
            raise ValueError(f"model.task_classes: {task_classes} must hold each of the {num_classes} classes")
        self.backbone, self.num_classes, self.task_classes = backbone, num_classes, task_classes
        self.what, self.head, self.local, self.oracle = train, head, local, oracle
        self.label_smoothing, self.keep_tasks, self.seed = label_smoothing, keep_tasks, seed
        self.task, self._begun = 0, 0
        self.matrix = torch.full((len(task_classes), len(task_classes)), math.nan)
        self.sizes = self.matrix.clone()

    # --- the model -------------------------------------------------------------------------
    def build(self) -> nn.Module:
        """The backbone with a new head for the classes of all tasks, at zero.

        Raises:
            ValueError: An adapter has no room for so many tasks.
        """
        for adaptation in self.adaptations:
            room = getattr(adaptation.method, "tasks", len(self.task_classes))
            if room < len(self.task_classes):
                raise ValueError(
                    f"model.adapters: '{adaptation.name}' has room for {room} tasks (its `tasks`), the data have "
                    f"{len(self.task_classes)}"
                )
        model: Any = self.backbone.build(self.num_classes)
        model.reset_classifier(self.num_classes)
        if self.head == "cosine":
            replace_classifier(model, CosineHead(model.num_features, self.num_classes))
        else:
            for parameter in self.backbone.head(model).parameters():
                nn.init.zeros_(parameter)
        return model

    def thaw(self, model: nn.Module) -> None:
        """Let the head train, or everything."""
        (model if self.what == "all" else self.backbone.head(model)).requires_grad_(True)

    def configure_model(self) -> None:
        """As every task; counts right predictions by task."""
        if self.model is None:
            super().configure_model()
            self.task_accuracy = TaskAccuracy(len(self.task_classes))

    def preprocess(self, train: bool) -> Callable[[Any], Tensor]:
        """The backbone's transform of a PIL image; data modules ask for it."""
        return self.backbone.preprocess(train)

    # --- the sequence ----------------------------------------------------------------------
    @property
    def epochs_per_task(self) -> int:
        """Epochs of each task.

        Raises:
            ValueError: The epochs of the run cannot be shared out evenly.
        """
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return 1
        tasks, epochs = len(self.task_classes), self.trainer.max_epochs or 0
        if epochs < 1 or epochs % tasks:
            raise ValueError(f"trainer.max_epochs: {epochs} cannot be shared out over {tasks} tasks; give a multiple")
        return epochs // tasks

    def task_now(self) -> int:
        """The task of the present epoch; outside training the last one that was reached."""
        if self._trainer is None or not self.trainer.training:
            return self.task
        return max(self.task, self.trainer.current_epoch // self.epochs_per_task)

    def setup(self, stage: str) -> None:
        """New loaders in each epoch, validation after the last epoch of each task.

        Raises:
            ValueError: Images of earlier tasks are replayed, and the loss knows the classes of the present one alone.
        """
        if stage == "fit":
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            if self.local and getattr(data, "replay", False):
                raise ValueError("model.local: replayed images have other classes than the task; set it to false")
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
            self.trainer.check_val_every_n_epoch = self.epochs_per_task

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """As every task, with a schedule that ends with the task under way."""
        found: Any = super().configure_optimizers()
        steps = steps_per_epoch(self.trainer)
        if steps is None:
            raise ValueError("data: a task needs a length, so that its schedule has an end; use TaskSequence")
        self._total = steps * self.epochs_per_task
        found["lr_scheduler"]["scheduler"] = self.schedule.scheduler(found["optimizer"], self._total)
        return found

    def step_now(self) -> tuple[int, int | None]:
        """Steps within the task under way."""
        return self.trainer.global_step - self._begun, self._total

    def on_train_start(self) -> None:
        """As every task; a run that was cut between the last step of a task and its validation makes up for it.

        Lightning 2.6 goes on with the next epoch then, without validation and without ``on_train_epoch_start``.
        """
        super().on_train_start()
        if self.task < self.task_now():
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True
            self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Begin the next task where its first epoch does."""
        if self.trainer.global_step == 0:
            self._tell_inputs("begin_task")
        while self.task < self.task_now():
            self._tell_inputs("end_task")
            with torch.random.fork_rng():
                torch.manual_seed(mixed_seed(self.seed, self.task, 3))  # the same in every process
                next_task(self.model)
            self.task, self._begun = self.task + 1, self.trainer.global_step
            self._tell_inputs("begin_task")
            self.trainer.strategy.setup_optimizers(self.trainer)

    def _tell_inputs(self, hook: Literal["begin_task", "end_task"]) -> None:
        """Let adapters that ask for it see what the images of the task are in their layers.

        Raises:
            ValueError: Several processes, each of which sees its own part.
        """
        if not watched(self.model, hook):
            return
        if self.trainer.world_size > 1:
            raise ValueError(
                "trainer.devices: adapters that look at the inputs of a task do so in one process; give it 1"
            )
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]

        def run() -> None:
            for images, _, _ in data.loader(data.of_task(self.task)):
                self.model(images.to(self.device))

        training = self.training
        self.eval()
        tell_inputs(self.model, hook, run)
        self.train(training)

    # --- steps -----------------------------------------------------------------------------
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy among the classes of the task, or all so far, plus what the adapters ask to add."""
        images, target, _ = batch
        classes = self.task_classes[self.task] if self.local else self.known
        known = torch.tensor(classes, device=target.device)
        place = torch.searchsorted(known, target)
        with self._only(self.task if self.oracle else None):
            scores = self.model(images)[:, known]
        loss = F.cross_entropy(scores, place, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(target))
        return loss + penalty(self.model)

    @property
    def known(self) -> list[int]:
        """The classes of all tasks so far, in order."""
        return sorted({c for classes in self.task_classes[: self.task + 1] for c in classes})

    def classify(self, images: Tensor, task: Tensor | None = None) -> Tensor:
        """Classes (B,) of images among all so far; with ``oracle`` among those of their tasks (B,)."""
        if not self.oracle or task is None:
            return self._best(self.model(images), self.known)
        found = torch.empty_like(task)
        for number in task.unique().tolist():
            with self._only(number):
                mine = task == number
                found[mine] = self._best(self.model(images[mine]), self.task_classes[number])
        return found

    @staticmethod
    def _best(scores: Tensor, classes: list[int]) -> Tensor:
        known = torch.tensor(classes, device=scores.device)
        return known[scores[:, known].argmax(1)]

    def _stacks(self) -> list[TaskStack]:
        return [a for a in adapters(self.model).values() if isinstance(a, TaskStack)]

    @contextmanager
    def _only(self, task: int | None) -> Iterator[None]:
        """The adapters of one task alone act, or those of all."""
        stacks = self._stacks()
        for stack in stacks:
            stack.only = task
        try:
            yield
        finally:
            for stack in stacks:
                stack.only = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count right predictions by task."""
        images, target, task = batch
        self.task_accuracy.update(self.classify(images, task), target, task)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Keep and log the accuracies after this task."""
        found = self.task_accuracy.compute().cpu().reshape(-1)  # torchmetrics makes one value a scalar
        self.task_accuracy.reset()
        if self.trainer.sanity_checking:
            return
        self.matrix[self.task] = found
        stacks = self._stacks()
        for k in range(self.task + 1 if stacks else 0):
            self.sizes[self.task, k] = torch.stack([norm(*stack.pair(k)).detach() for stack in stacks]).mean()
        self._log("val", found)

    def on_test_epoch_end(self) -> None:
        """Log the accuracies after the last task."""
        self._log("test", self.task_accuracy.compute().cpu().reshape(-1))
        self.task_accuracy.reset()

    def _log(self, stage: str, found: Tensor) -> None:
        each = {f"{stage}/accuracy_task_{j + 1}": a for j, a in enumerate(found.tolist()) if not math.isnan(a)}
        figures = {f"{stage}/{name.replace(' ', '_')}": value for name, value in summary(self.matrix).items()}
        self.log(f"{stage}/accuracy", found.nanmean(), prog_bar=True, sync_dist=True)  # the same in every process
        self.log_dict(each | (figures if stage == "val" else {}), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Scores (B, classes); those of classes that never came are −∞."""
        scores = super().predict_step(batch, batch_idx)
        unknown = [c for c in range(self.num_classes) if c not in self.known]
        scores[:, unknown] = -math.inf
        return scores

    # --- checkpoints -----------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every task; also which task is under way, and the matrix."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["sequence"] = {
            "task": self.task,
            "begun": self._begun,
            "matrix": self.matrix.clone(),
            "sizes": self.sizes.clone(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every task; adapters are told how many tasks are done.

        Raises:
            ValueError: The checkpoint is of another sequence.
        """
        super().on_load_checkpoint(checkpoint)
        held = checkpoint.get("sequence")
        if held is None or (self._told and held["matrix"].shape != self.matrix.shape):
            raise ValueError("the checkpoint is of another sequence of tasks; use the config.yaml of its run")
        self.task, self._begun = held["task"], held["begun"]
        self.matrix, self.sizes = held["matrix"].clone(), held["sizes"].clone()
        for adapter in adapters(self.model).values():
            if "done" in adapter.field_names():
                adapter.done = self.task  # type: ignore[assignment]
