"""What the segmentation tasks share: SAM, what of it trains, masks at full size, metrics, cached features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from visadapt.backbones.feature_cache import FeatureCache
from visadapt.backbones.precision import trainable_in_fp32
from visadapt.backbones.sam import SAM
from visadapt.backbones.sam_forward import encode
from visadapt.core.model import Adaptation, is_adapter_key
from visadapt.metrics.segmentation import segmentation_metrics
from visadapt.optim.schedule import Schedule
from visadapt.tasks.base import DEFAULT_SCHEDULE, BaseTask, Stage

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


class Segmentation(BaseTask):
    """Base of the tasks on Segment Anything. A subclass states ``outputs``, ``criterion`` and ``probabilities``.

    Args:
        backbone: Recipe of the SAM.
        num_classes: Classes of the data with the background; the command line fills it in.
        adapters: Sets of adapters, applied in order.
        train: What trains besides the adapters and the parts that the task adds: nothing of SAM, its prompt encoder
            and mask decoder, or everything (full fine-tuning; from scratch, if the backbone has
            ``pretrained: false``).
        feature_cache: Folder that keeps the outputs of the frozen part of the image encoder between epochs and runs.
        cache_gib: Most that this folder may hold; the least recently used goes first.
        lines: Also completeness and correctness of line features in the test.
        tolerance: Distance in pixels at which a boundary or a line still counts as found.
        optimizer: Any torch optimiser; its ``lr`` and ``weight_decay`` are those of the matrices.
        schedule: Warm-up and decay of the learning rate.
        up_lr_ratio: Learning rate of up factors over that of the others (LoRA+).
        ema_decay: Keep an exponential average of the trained tensors with this decay.
        start: Adapter file whose tensors the sets of the same name start from.
    """

    report_kind = "masks"

    def __init__(
        self,
        backbone: SAM,
        num_classes: int = 2,
        adapters: list[Adaptation] | None = None,
        train: Literal["adapters", "decoder", "all"] = "decoder",
        feature_cache: str | None = None,
        cache_gib: float = 4.0,
        lines: bool = False,
        tolerance: float = 3.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = DEFAULT_SCHEDULE,
        up_lr_ratio: float = 1.0,
        ema_decay: float | None = None,
        start: str | None = None,
    ) -> None:
        super().__init__(adapters, optimizer, schedule, up_lr_ratio, ema_decay, start=start)
        if num_classes < 2:
            raise ValueError(f"model.num_classes: {num_classes}; segmentation needs the background and one class more")
        self.backbone = backbone
        self.num_classes = num_classes
        self.what = train
        self.lines, self.tolerance = lines, tolerance
        self._cache_settings = (feature_cache, cache_gib)
        self._cache: Any = None

    # --- stated by tasks ---------------------------------------------------------------
    def outputs(self, images: Tensor, masks: Tensor, stage: Stage) -> Any:
        """What ``criterion`` and ``decide`` need, from images (B, 3, S, S); ``masks`` only where they prompt."""
        raise NotImplementedError(f"{type(self).__name__} must state outputs(images, masks, stage)")

    def decide(self, output: Any) -> Tensor:
        """Label maps (B, S, S) from ``outputs``."""
        raise NotImplementedError(f"{type(self).__name__} must state decide(output)")

    def probabilities(self, images: Tensor) -> Tensor:
        """Shares of the classes (B, num_classes, S, S), which sum to 1, from normalised images (B, 3, S, S)."""
        raise NotImplementedError(f"{type(self).__name__} must state probabilities(images)")

    def runs(self, name: str) -> bool:
        """Whether this task runs the parameter ``name`` of SAM; what it does not stays frozen (DDP waits for it)."""
        return True

    # --- derived -----------------------------------------------------------------------
    @property
    def img_size(self) -> int:
        """Side of the network's input in pixels."""
        return self.backbone.img_size

    def preprocess(self, train: bool) -> Callable[[Tensor], Tensor]:
        """The backbone's normalisation of an image; data modules ask for it."""
        return self.backbone.preprocess(train)

    def build(self) -> nn.Module:
        """The backbone's SAM; a subclass adds its own parts as children."""
        return self.backbone.build()

    def thaw(self, model: nn.Module) -> None:
        """Let parts of SAM train as ``train`` says, and all that the task added to it."""
        frozen = {"adapters": ("image_encoder.", "prompt_encoder.", "mask_decoder."), "decoder": ("image_encoder.",)}
        for name, parameter in model.named_parameters():
            if not is_adapter_key(name):  # which of their tensors train is the adapters' own affair
                parameter.requires_grad_(not name.startswith(frozen.get(self.what, ())) and self.runs(name))
        if self.what != "adapters":  # the part of it that no pass runs would hold it at the base's precision
            model.mask_decoder.float()  # type: ignore[operator, union-attr]
        trainable_in_fp32(model)

    def encode(self, images: Tensor, early: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Image embeddings (B, C, h, w) and the states after blocks ``early``, from the cache if there is one."""
        folder, gib = self._cache_settings
        if folder is not None and self._cache is None:
            self._cache = FeatureCache(folder, int(gib * 2**30))
        once = self._trainer is not None and self._trainer.predicting  # nobody asks for these images again
        return encode(self.model, images, early, None if once else self._cache)  # type: ignore[arg-type]

    def enlarge(self, logits: Tensor) -> Tensor:
        """Logits (B, K, 4h, 4w) at the size of the input (B, K, S, S)."""
        return F.interpolate(logits, (self.img_size, self.img_size), mode="bilinear", align_corners=False)

    def _step(self, batch: Any, stage: Stage) -> Tensor:
        """Loss of one batch of any stage; in evaluation also the metrics of its label maps."""
        images, masks = batch
        output = self.outputs(images, masks, stage)
        loss = self.criterion(output, masks)
        self.report(stage, loss, None if stage == "train" else self.decide(output), masks)
        return loss

    def labels(self, images: Tensor, masks: Tensor) -> Tensor:
        """Label maps (B, S, S) for pictures of a report; ``masks`` serve a task that needs prompts."""
        return self.decide(self.outputs(images, masks, "val"))

    def forward(self, images: Tensor) -> Tensor:
        """Shares of the classes (B, num_classes, S, S)."""
        return self.probabilities(images)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Shares of the classes for a batch of images, alone or with masks that are ignored."""
        return self.probabilities(batch[0] if isinstance(batch, list | tuple) else batch)

    def configure_model(self) -> None:
        """As every task; the test has the costly figures, of distances and of single classes, besides."""
        if self.model is not None:
            return
        super().configure_model()
        self.test_metrics = self._figures(distances=True).clone(prefix="test/")

    def metrics(self) -> MetricCollection:
        """IoU, Dice, precision and recall over the corpus."""
        return self._figures(distances=False)

    def _figures(self, distances: bool) -> MetricCollection:
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        names = list(getattr(data, "class_names", ())) or None
        return segmentation_metrics(self.num_classes, names, self.tolerance, self.lines, distances)
