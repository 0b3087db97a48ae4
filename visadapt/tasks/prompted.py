"""Fine-tuning of promptable SAM: clicks and boxes are made from the masks, corrections from its errors."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from visadapt.backbones.sam import SAM
from visadapt.backbones.sam_forward import decode, prompt
from visadapt.core.model import Adaptation
from visadapt.losses.masks import IGNORE, focal_and_dice
from visadapt.optim.schedule import Schedule
from visadapt.tasks.base import DEFAULT_SCHEDULE, Stage
from visadapt.tasks.prompts import How, boxes, clicks, corrections, objects
from visadapt.tasks.segmentation import Segmentation

Kind = Literal["box", "point"]


class Prompted(NamedTuple):
    """Objects of a batch and what was predicted of them.

    Attributes:
        rounds: Mask logits (M, K, 4h, 4w) and IoU predictions (M, K) of the first prompt and of each correction.
        kind: Kind of the first prompt.
        truth: Masks of the objects (M, S, S), booleans.
        valid: False where the label map says "ignore" (M, S, S); what is predicted there counts nowhere.
        image_of: Image of each object (M,).
        classes: Class of each object (M,); 0 is a stand-in in a batch without objects.
        images: Number of images, B.
    """

    rounds: list[tuple[Tensor, Tensor]]
    kind: Kind
    truth: Tensor
    valid: Tensor
    image_of: Tensor
    classes: Tensor
    images: int


class PromptedSegmentation(Segmentation):
    """SAM learns to cut out what is clicked or boxed in pictures of another kind.

    Objects are read off the label maps: connected pieces of a class, or all of it. Training draws the kind of prompt
    per batch: a box with jitter or a click anywhere in the object; then come clicks where the larger error is, with
    the mask so far as a prompt, as in Segment Anything. The first prompt trains the best of SAM's three masks and
    its single one, later ones the single one; the predicted IoU learns by mean squared error.

    Validation and test go the same way without chance: exact boxes, clicks at the point farthest from the border.
    ``val/iou_of_box``, ``val/iou_of_point`` and ``…_corrected`` are means over objects; the other figures
    compare the union of the predictions of the first kind of ``prompts`` with the label maps. With
    ``adapters: []``, ``visadapt test`` gives these for SAM as it is: an oracle that is told where to look.

    Kirillov et al. 2023, Segment Anything, arXiv 2304.02643 (its section on training).

    Args:
        backbone: Recipe of the SAM.
        num_classes: Classes of the data with the background; the command line fills it in.
        adapters: Sets of adapters, applied in order.
        train: What trains besides the adapters.
        prompts: Kinds of the first prompt.
        objects: Connected pieces of a class, or the class as a whole.
        objects_per_image: Most objects of an image per training step, drawn at random; evaluation takes all.
        smallest: Least number of pixels of an object.
        jitter: Standard deviation of box corners in training, as a share of the sides.
        corrections: Clicks after the first prompt.
        feature_cache: Folder that keeps the outputs of the frozen part of the image encoder.
        cache_gib: Most that this folder may hold; the least recently used goes first.
        lines: Also completeness and correctness of line features in the test.
        tolerance: Distance in pixels at which a boundary or a line still counts as found.
        optimizer: Any torch optimiser; its ``lr`` and ``weight_decay`` are those of the matrices.
        schedule: Warm-up and decay of the learning rate.
        up_lr_ratio: Learning rate of up factors over that of the others (LoRA+).
        ema_decay: Keep an exponential average of the trained tensors with this decay.
        start: Adapter file whose tensors the sets of the same name start from.
    """

    def __init__(
        self,
        backbone: SAM,
        num_classes: int = 2,
        adapters: list[Adaptation] | None = None,
        train: Literal["adapters", "decoder", "all"] = "decoder",
        prompts: list[Kind] | None = None,
        objects: How = "component",
        objects_per_image: int = 4,
        smallest: int = 16,
        jitter: float = 0.1,
        corrections: int = 1,
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
        super().__init__(
            backbone,
            num_classes,
            adapters,
            train,
            feature_cache,
            cache_gib,
            lines,
            tolerance,
            optimizer,
            schedule,
            up_lr_ratio,
            ema_decay,
            start,
        )
        self.prompts: list[Kind] = ["box", "point"] if prompts is None else list(prompts)
        if not self.prompts:
            raise ValueError("model.prompts: [] leaves nothing to prompt with; give box, point or both")
        if objects_per_image < 1 or corrections < 0 or smallest < 1 or jitter < 0:
            raise ValueError(
                "model: objects_per_image and smallest must be 1 at least, corrections and jitter not negative"
            )
        self.how, self.most, self.smallest = objects, objects_per_image, smallest
        self.jitter, self.corrections = jitter, corrections
        self.object_iou = nn.ModuleDict()

    def runs(self, name: str) -> bool:
        """Everything, but what kinds of prompts that are never given would need."""
        unused: list[str] = []
        if not self.corrections:
            unused += ["mask_downscaling.", "point_embeddings.0."]  # the latter stands for clicks on background
        if "box" not in self.prompts:
            unused += ["point_embeddings.2.", "point_embeddings.3."]
        if "point" not in self.prompts:  # SAM pads clicks that come without a box
            unused += ["not_a_point_embed.", *([] if self.corrections else ["point_embeddings.1."])]
        return not name.startswith(tuple(f"prompt_encoder.{part}" for part in unused))

    # --- one pass ------------------------------------------------------------------------
    def outputs(self, images: Tensor, masks: Tensor, stage: Stage) -> Prompted:
        """Predictions for the objects in ``masks``; in training of a random kind of prompt."""
        kind = self.prompts[int(torch.randint(len(self.prompts), ())) if stage == "train" else 0]
        return self._prompted(self.encode(images)[0], masks, kind, stage == "train")

    def _prompted(self, embeddings: Tensor, masks: Tensor, kind: Kind, train: bool) -> Prompted:
        truth, index, classes = self._objects(masks, train)
        valid = (masks.cpu() != IGNORE)[index]
        if kind == "box":
            points, labels, box = None, None, boxes(truth, self.jitter if train else 0.0)
        else:
            points, labels, box = clicks(truth, at_random=train), torch.ones(len(truth), 1), None
        rounds: list[tuple[Tensor, Tensor]] = []
        before: Tensor | None = None
        for last in [False] * self.corrections + [True]:
            rounds.append(self._decode(embeddings, index, points, labels, box, before))
            if last:
                break
            before = _chosen(*rounds[-1], first=len(rounds) == 1, kind=kind).detach()
            found = (self.enlarge(before)[:, 0] > 0).cpu() & valid
            more, sign = corrections(found, truth, at_random=train)
            points = more if points is None else torch.cat([points, more], 1)
            labels = sign if labels is None else torch.cat([labels, sign], 1)
        there = embeddings.device
        truth, valid = truth.to(there), valid.to(there)
        return Prompted(rounds, kind, truth, valid, index.to(there), classes.to(there), len(masks))

    def _decode(
        self,
        embeddings: Tensor,
        index: Tensor,
        points: Tensor | None,
        labels: Tensor | None,
        box: Tensor | None,
        before: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sam: Any = self.model
        points, labels, box = (None if t is None else t.to(embeddings.device) for t in (points, labels, box))
        # Logits far from zero would say more than that this was the mask.
        sparse, dense = prompt(sam, points, labels, box, None if before is None else before.clamp(-32, 32))
        return decode(sam, embeddings, sparse, dense, index.to(embeddings.device))

    def _objects(self, masks: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Masks, image and class of the objects to prompt, on the CPU; one empty stand-in if there is none."""
        truth, index, classes = [], [], []
        for i, labels in enumerate(masks.cpu()):
            found, kinds = objects(labels, self.how, self.smallest)
            if train and len(found) > self.most:
                some = torch.randperm(len(found))[: self.most]
                found, kinds = found[some], kinds[some]
            truth.append(found)
            classes.append(kinds)
            index += [i] * len(found)
        if not index:
            empty = torch.zeros(1, *masks.shape[1:], dtype=torch.bool)
            return empty, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        return torch.cat(truth), torch.tensor(index), torch.cat(classes)

    # --- loss and figures ----------------------------------------------------------------
    def criterion(self, output: Prompted, target: Tensor) -> Tensor:
        """20 · focal + Dice of every round, and the squared error of the predicted IoU; mean over the objects."""
        real = (output.classes > 0).float()
        size = output.rounds[0][0].shape[-2:]
        valid = F.interpolate(output.valid.float()[:, None], size, mode="nearest-exact")
        truth = F.adaptive_avg_pool2d(output.truth.float()[:, None], (size[0], size[1]))
        total = real.new_zeros(())
        for number, (logits, quality) in enumerate(output.rounds):
            focal, dice = focal_and_dice(logits, truth, valid, alpha=0.5)
            each = 20 * focal + dice
            found = _iou(self.enlarge(logits.detach()) > 0, output)
            loss = each[:, 0] + F.mse_loss(quality, found, reduction="none").mean(1)
            if number == 0 and each.shape[1] > 1:
                loss = loss + each[:, 1:].min(1).values
            total = total + (loss * real).sum()
        return total / real.sum().clamp(min=1) / len(output.rounds)

    def decide(self, output: Prompted) -> Tensor:
        """Union of what the first prompts gave; where objects overlap, the most certain one."""
        logits, quality = output.rounds[0]
        masks = self.enlarge(_chosen(logits, quality, first=True, kind=output.kind))[:, 0]
        best = masks.new_zeros(output.images, *masks.shape[1:])
        labels = torch.zeros_like(best, dtype=torch.long)
        for mask, image, value in zip(masks, output.image_of.tolist(), output.classes.tolist(), strict=True):
            wins = mask > best[image]
            best[image] = torch.where(wins, mask, best[image])
            labels[image] = torch.where(wins, value, labels[image])
        return labels

    def probabilities(self, images: Tensor) -> Tensor:
        """Not without prompts.

        Raises:
            ValueError: always; says what to use.
        """
        raise ValueError(
            f"{type(self).__name__} needs a box or a click for every object: merge the adapter "
            "(`visadapt merge … --output merged.pth`) and use SamPredictor, or train AutomaticSegmentation, which "
            "predicts without prompts"
        )

    def configure_model(self) -> None:
        """As every task; the figures of the prompts are means over objects."""
        if self.model is not None:
            return
        from torchmetrics import MeanMetric

        super().configure_model()
        names = [
            f"iou_of_{kind}{end}" for kind in self.prompts for end in ("", "_corrected")[: 1 + bool(self.corrections)]
        ]
        self.object_iou.update({f"{stage}_{name}": MeanMetric() for stage in ("val", "test") for name in names})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As every task; DDP waits for a gradient of all that trains, also of what this kind of prompt does without."""
        encoder: Any = self.model.prompt_encoder
        nothing = [0 * parameter.sum() for parameter in encoder.parameters() if parameter.requires_grad]
        return super().training_step(batch, batch_idx) + sum(nothing)

    def _step(self, batch: Any, stage: Stage) -> Tensor:
        """As every segmentation task; in evaluation also the IoU of objects after each kind of prompt."""
        if stage == "train":
            return super()._step(batch, stage)
        images, masks = batch
        embeddings = self.encode(images)[0]
        outputs = [self._prompted(embeddings, masks, kind, train=False) for kind in self.prompts]
        for output in outputs:
            self._measure(output, stage)
        loss = self.criterion(outputs[0], masks)
        self.report(stage, loss, self.decide(outputs[0]), masks)
        return loss

    def _measure(self, output: Prompted, stage: Stage) -> None:
        real = output.classes > 0
        for number, end in ((0, ""), (-1, "_corrected"))[: 1 + bool(self.corrections)]:
            chosen = _chosen(*output.rounds[number], first=number == 0, kind=output.kind)
            found = _iou(self.enlarge(chosen) > 0, output)[:, 0][real]
            metric: Any = self.object_iou[f"{stage}_iou_of_{output.kind}{end}"]
            metric.update(found)
            self.log(
                f"{stage}/iou_of_{output.kind}{end}", metric, on_step=False, on_epoch=True, batch_size=output.images
            )


def _chosen(logits: Tensor, quality: Tensor, first: bool, kind: Kind) -> Tensor:
    """One mask per object (M, 1, h, w): a lone click is ambiguous, so the best of three by predicted IoU."""
    if not (first and kind == "point") or logits.shape[1] == 1:
        return logits[:, :1]
    best = 1 + quality[:, 1:].argmax(1)
    return logits[torch.arange(len(logits), device=logits.device), best][:, None]


def _iou(found: Tensor, output: Prompted) -> Tensor:
    """Intersection over union (M, K) of boolean masks (M, K, S, S) with the truth; 1 where both are empty."""
    found, truth = found & output.valid[:, None], output.truth[:, None]
    either = (found | truth).sum((-2, -1))
    both = (found & truth).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)
