"""Image classification: adapters, a linear probe or full fine-tuning, by configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from visadapt.backbones.base import Backbone
from visadapt.core.model import Adaptation
from visadapt.optim.schedule import Schedule
from visadapt.tasks.base import DEFAULT_SCHEDULE, BaseTask, Stage

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from torchmetrics import Metric, MetricCollection

_PER_CLASS_AT_MOST = 100  # more columns than this help nobody in a table of metrics


class Classification(BaseTask):
    """Tells classes apart by cross-entropy.

    What trains: ``train: adapters`` the adapters and, as ``head`` says, the classifier; ``train: head`` with
    ``adapters: []`` is a linear probe; ``train: all`` is full fine-tuning (from scratch, if the backbone has
    ``pretrained: false``).

    Args:
        backbone: Recipe of the network.
        num_classes: Classes of the data; the command line fills it in.
        adapters: Sets of adapters, applied in order.
        train: What trains besides the adapters.
        head: Train or freeze the classifier. "auto" freezes the checkpoint's own, if it tells apart the very
            classes of the data (then the adapter alone holds the change), and trains a new one otherwise.
        label_smoothing: Share of the target that is spread evenly over the classes.
        mixup: Alpha of mixup (Zhang et al. 2018, arXiv:1710.09412); 0 is off.
        cutmix: Alpha of CutMix (Yun et al. 2019, arXiv:1905.04899); 0 is off. With both, a batch draws one.
        grad_checkpointing: Recompute the blocks' activations in backward: less memory, a third more time.
        lean: Recompute the inputs of adapted layers in backward where that is cheap.
        compile: ``torch.compile`` the network in place; names of parameters do not change.
        optimizer: Any torch optimiser; its ``lr`` and ``weight_decay`` are those of the matrices.
        schedule: Warm-up and decay of the learning rate.
        up_lr_ratio: Learning rate of up factors over that of the others (LoRA+).
        ema_decay: Keep an exponential average of the trained tensors with this decay.
        start: Adapter file whose tensors the sets of the same name start from.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        adapters: list[Adaptation] | None = None,
        train: Literal["adapters", "head", "all"] = "adapters",
        head: Literal["auto", "train", "freeze"] = "auto",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        grad_checkpointing: bool = False,
        lean: bool = False,
        compile: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = DEFAULT_SCHEDULE,
        up_lr_ratio: float = 1.0,
        ema_decay: float | None = None,
        start: str | None = None,
    ) -> None:
        super().__init__(adapters, optimizer, schedule, up_lr_ratio, ema_decay, start=start)
        _check(num_classes, self.adaptations, train, head, mixup, cutmix)
        self.backbone = backbone
        self.num_classes = num_classes
        self.what, self.head = train, head
        self.label_smoothing = label_smoothing
        self.grad_checkpointing = grad_checkpointing
        self.compiles = compile
        if lean:
            self.adaptations = [replace(adaptation, lean=True) for adaptation in self.adaptations]
        self._mix = _mixer(mixup, cutmix, num_classes)

    def build(self) -> nn.Module:
        """The backbone with a head for these classes."""
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        model: Any = self.backbone.build(self.num_classes, getattr(data, "class_names", None))
        if self.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise ValueError(f"{type(model).__name__} has no gradient checkpointing; set it to false")
            model.set_grad_checkpointing(True)
        return model

    def thaw(self, model: nn.Module) -> None:
        """Let the head or everything train, as ``train`` and ``head`` say.

        Raises:
            ValueError: A new head would stay frozen.
        """
        if self.what == "all":
            model.requires_grad_(True)
        head = self.backbone.head(model)
        if self.head == "freeze" and self.backbone.new_head:
            raise ValueError(
                "model.head: freeze, but the backbone has no head for these classes; use head: auto or train"
            )
        wanted = self.what != "adapters" or self.backbone.new_head
        head.requires_grad_(wanted if self.head == "auto" else self.head == "train")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """As every task.

        Raises:
            ValueError: Nothing would train. (To predict with an adapter from a file is fine without any.)
        """
        if not any(p.requires_grad for p in self.parameters()):
            raise ValueError(
                "nothing to train: give model.adapters, or set model.train to head (linear probe) or to all "
                "(full fine-tuning)"
            )
        return super().configure_optimizers()

    def configure_model(self) -> None:
        """As every task, then compile; keeps a confusion matrix for the test."""
        if self.model is not None:
            return
        from torchmetrics.classification import MulticlassConfusionMatrix

        super().configure_model()
        self.test_confusion: Any = MulticlassConfusionMatrix(self.num_classes)
        if self.compiles and (model := self.model) is not None:
            model.compile()

    def preprocess(self, train: bool) -> Callable[[Any], Tensor]:
        """The backbone's transform of a PIL image; data modules ask for it."""
        return self.backbone.preprocess(train)

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of scores (batch, classes) with labels (batch,) or shares (batch, classes)."""
        return F.cross_entropy(output, target, label_smoothing=self.label_smoothing if self.training else 0.0)

    def metrics(self) -> MetricCollection:
        """Accuracy (top 1, mean over the classes, top 5 from six classes on) and calibration error."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

        found: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(self.num_classes, average="micro"),
            "class_mean_accuracy": MulticlassAccuracy(self.num_classes, average="macro"),
            "calibration_error": MulticlassCalibrationError(self.num_classes),
        }
        if self.num_classes > 5:
            found["accuracy_top5"] = MulticlassAccuracy(self.num_classes, average="micro", top_k=5)
        return MetricCollection(found)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As every task, on mixed images where mixup or CutMix is on."""
        return super().training_step(batch if self._mix is None else self._mix(*batch), batch_idx)

    def report(self, stage: Stage, loss: Tensor, output: Tensor, target: Tensor) -> None:
        """Also count the confusions of the test."""
        super().report(stage, loss, output, target)
        if stage == "test":
            self.test_confusion.update(output, target)

    def on_test_epoch_end(self) -> None:
        """Log the accuracy of every class."""
        matrix = self.test_confusion.compute()
        self.test_confusion.reset()
        if len(matrix) > _PER_CLASS_AT_MOST:
            return
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "class_names", None) or [str(i) for i in range(len(matrix))]
        shares = matrix.diag() / matrix.sum(1).clamp(min=1)
        self.log_dict({f"test/accuracy_of/{name}": share for name, share in zip(names, shares)})


def _check(num_classes: int, adapters: list[Adaptation], train: str, head: str, mixup: float, cutmix: float) -> None:
    if num_classes < 2:
        raise ValueError(f"model.num_classes: {num_classes}; classification needs two classes at least")
    if train == "head" and head == "freeze":
        raise ValueError("model.train: head contradicts model.head: freeze")
    if min(mixup, cutmix) < 0:
        raise ValueError(f"model.mixup and model.cutmix must not be negative, got {mixup} and {cutmix}")


def _mixer(mixup: float, cutmix: float, num_classes: int) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Mixup, CutMix or, drawn anew for every batch, one of them."""
    if not mixup and not cutmix:
        return None
    from torchvision.transforms import v2

    mixers: list[Any] = []
    if mixup:
        mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    return mixers[0] if len(mixers) == 1 else v2.RandomChoice(mixers)
