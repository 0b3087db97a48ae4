"""Baselines of class-incremental learning: class means or a ridge regression on frozen features, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from visadapt.backbones.base import Backbone
from visadapt.tasks.class_incremental import Batch, ClassIncremental
from visadapt.tasks.cosine_head import replace_classifier
from visadapt.tasks.statistics_heads import MeansHead, RandomProjectionHead

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler


class FeatureClassifier(ClassIncremental):
    """A classifier from sums over the frozen features of each task; nothing trains, nothing is forgotten.

    One epoch of each task is enough: further ones add nothing.

    Args:
        backbone: Recipe of the network.
        num_classes: Classes of all tasks; the command line fills it in.
        task_classes: Classes of each task; the command line fills it in.
        kind: The nearest class mean, or RanPAC.
        width: Random features of RanPAC.
        seed: Source of them.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        task_classes: list[list[int]] | None = None,
        kind: Literal["means", "ranpac"] = "means",
        width: int = 2000,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, num_classes, task_classes, seed=seed)
        self.kind, self.width = kind, width
        self.automatic_optimization = False  # there is nothing to optimise

    def build(self) -> nn.Module:
        """The backbone with that classifier."""
        model: Any = super().build()
        size = model.num_features
        head = (
            MeansHead(size, self.num_classes)
            if self.kind == "means"
            else RandomProjectionHead(size, self.num_classes, self.width, self.seed)
        )
        replace_classifier(model, head)
        return model

    def thaw(self, model: nn.Module) -> None:
        """Nothing trains."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """None."""
        return None

    def setup(self, stage: str) -> None:
        """As every sequence of tasks.

        Raises:
            ValueError: Several processes, each of which would have sums of its own.
        """
        super().setup(stage)
        if stage == "fit" and self.trainer.world_size > 1:
            raise ValueError("trainer.devices: FeatureClassifier sums over all features in one process; give it 1")

    def on_validation_start(self) -> None:
        """Compute the classifier."""
        self.statistics.fit()

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]  # nothing has a gradient
        """Add the features of the batch, in the first epoch of a task."""
        images, target, _ = batch
        if self.trainer.current_epoch % self.epochs_per_task == 0:
            with torch.no_grad():
                self.statistics.update(self._features(images), target)

    @property
    def statistics(self) -> Any:
        """The classifier."""
        return self.backbone.head(self.model)

    def _features(self, images: Tensor) -> Tensor:
        """What the network gives its classifier."""
        found: list[Tensor] = []
        hook = self.statistics.register_forward_pre_hook(lambda module, given: found.append(given[0]))
        try:
            self.model(images)
        finally:
            hook.remove()
        return found[0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every task; also the sums."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["statistics"] = self.statistics.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every task."""
        super().on_load_checkpoint(checkpoint)
        self.statistics.load_state_dict(checkpoint["statistics"])
