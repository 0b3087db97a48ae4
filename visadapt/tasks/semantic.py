"""Segmentation of several classes without prompts: one mask token per class (SAMed)."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from visadapt.backbones.sam import SAM
from visadapt.backbones.sam_forward import decode, prompt
from visadapt.core.model import Adaptation
from visadapt.losses.masks import class_loss
from visadapt.optim.schedule import Schedule
from visadapt.tasks.base import DEFAULT_SCHEDULE, Stage
from visadapt.tasks.segmentation import Segmentation

# No prompts, no IoU head, and class tokens in place of SAM's own.
_UNUSED = (
    "mask_decoder.iou_prediction_head.",
    "mask_decoder.mask_tokens.",
    "mask_decoder.output_hypernetworks_mlps.",
    "prompt_encoder.mask_downscaling.",
    "prompt_encoder.point_embeddings.",
    "prompt_encoder.not_a_point_embed.",
)


class ClassTokens(nn.Module):
    """A mask token and a hypernetwork for every class, copies of SAM's single-mask ones at the start.

    Args:
        decoder: SAM's mask decoder, whose token and hypernetwork are copied.
        num_classes: Classes with the background.
        fresh: Draw both anew instead.
    """

    def __init__(self, decoder: Any, num_classes: int, fresh: bool) -> None:
        super().__init__()
        token = decoder.mask_tokens.weight[:1].detach().float()
        self.tokens = nn.Parameter(token.repeat(num_classes, 1))
        self.hypernetworks = nn.ModuleList(
            copy.deepcopy(decoder.output_hypernetworks_mlps[0]).float() for _ in range(num_classes)
        )
        if fresh:
            nn.init.normal_(self.tokens)
            for module in self.hypernetworks.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()


class SemanticSegmentation(Segmentation):
    """SAM with one mask token per class: label maps of any number of classes, without prompts.

    The class of a pixel is the softmax over the masks of all tokens, the background's among them. Trained by
    entropy_weight · cross-entropy + dice_weight · Dice loss.

    Zhang & Liu 2023, SAMed, arXiv 2304.13785; code: github.com/hitachinsk/SAMed. Differs by default: tokens start as
    copies of SAM's own instead of random ones, which ten images are too few to learn.

    Args:
        backbone: Recipe of the SAM.
        num_classes: Classes of the data with the background; the command line fills it in.
        adapters: Sets of adapters; the paper has LoRA of rank 4 on queries and values.
        train: What trains besides the adapters and the class tokens.
        class_weights: Of the classes in both losses, the background first; null is the same for all.
        mask_token: Start from copies of SAM's mask token and hypernetwork, or from fresh ones as the released code.
        supervise: Compare masks enlarged, at the full resolution, or at their own as the paper does: labels at the
            latter lose thin lines.
        entropy_weight: Weight of the cross-entropy.
        dice_weight: Weight of the Dice loss.
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
        class_weights: list[float] | None = None,
        mask_token: Literal["keep", "fresh"] = "keep",
        supervise: Literal["low", "full"] = "full",
        entropy_weight: float = 0.2,
        dice_weight: float = 0.8,
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
        if class_weights is not None and (
            len(class_weights) != num_classes or min(class_weights) < 0 or not any(class_weights)
        ):
            raise ValueError(
                f"model.class_weights: {class_weights} must be {num_classes} numbers from 0 on, one per class of the "
                "data, the background first, and not all 0"
            )
        self.mask_token, self.supervise = mask_token, supervise
        self.entropy_weight, self.dice_weight = entropy_weight, dice_weight
        self.class_weights: Tensor | None
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def build(self) -> nn.Module:
        """SAM with the tokens of the classes as its child ``classes``."""
        sam: Any = super().build()
        sam.classes = ClassTokens(sam.mask_decoder, self.num_classes, self.mask_token == "fresh")
        return sam

    def runs(self, name: str) -> bool:
        """The decoder without SAM's own tokens, and of the prompt encoder the map that says "no mask"."""
        return not name.startswith(_UNUSED)

    def outputs(self, images: Tensor, masks: Tensor, stage: Stage) -> Tensor:
        """Logits of the classes (B, K, 4h, 4w); ``masks`` are not looked at."""
        return self.segment(images)

    def segment(self, images: Tensor) -> Tensor:
        """Logits of the classes (B, K, 4h, 4w) of normalised images (B, 3, S, S)."""
        sam: Any = self.model
        embeddings, _ = self.encode(images)
        sparse, dense = prompt(sam)
        sparse = sparse.expand(len(images), -1, -1)
        classes = sam.classes
        return decode(sam, embeddings, sparse, dense, tokens=classes.tokens, hypernetworks=classes.hypernetworks)[0]

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy and Dice loss of logits against label maps (B, S, S)."""
        logits = self.enlarge(output) if self.supervise == "full" else output
        return class_loss(logits, target, self.class_weights, self.entropy_weight, self.dice_weight)

    def decide(self, output: Tensor) -> Tensor:
        """The class with the largest logit at full size."""
        return self.enlarge(output).argmax(1)

    def probabilities(self, images: Tensor) -> Tensor:
        """Softmax of the enlarged logits (B, K, S, S)."""
        return self.enlarge(self.segment(images)).softmax(1)
