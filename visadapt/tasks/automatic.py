"""Prompt-free segmentation of one class: SAM that clicks for itself (MapSAM)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from visadapt.backbones.mapsam import CoarseMask, fresh_mask_token, prompt_points, semantic_prompt, state_blocks
from visadapt.backbones.sam import SAM
from visadapt.backbones.sam_forward import decode, prompt
from visadapt.core.model import Adaptation
from visadapt.losses.masks import focal_dice
from visadapt.optim.schedule import Schedule
from visadapt.tasks.base import DEFAULT_SCHEDULE, Stage
from visadapt.tasks.segmentation import Segmentation

# In no pass of this task: the IoU head, prompts that are boxes or masks, and the tokens of several masks.
_UNUSED = (
    "mask_decoder.iou_prediction_head.",
    "prompt_encoder.mask_downscaling.",
    "prompt_encoder.point_embeddings.2.",
    "prompt_encoder.point_embeddings.3.",
    *(f"mask_decoder.output_hypernetworks_mlps.{i}." for i in (1, 2, 3)),
)
_PROMPTS = ("prompt_encoder.point_embeddings.", "prompt_encoder.not_a_point_embed.")


class Masks(NamedTuple):
    """Logits of the final mask (B, 1, 4h, 4w) and of the coarse one (B, 1, h, w)."""

    final: Tensor
    coarse: Tensor


class AutomaticSegmentation(Segmentation):
    """MapSAM: a coarse mask gives SAM its prompts, so nobody has to click.

    The coarse mask is predicted from the image embedding and three earlier states of the encoder. Read off it are
    positional prompts (its most and least certain pixels as clicks), a semantic prompt (the mean embedding of its
    foreground, added to the decoder's queries) and the cells that the decoder's tokens may attend to. No gradient
    flows through these: the coarse mask learns from its own loss. Both masks are trained by focal and Dice loss.

    Where no cell is foreground the semantic prompt is left out and tokens attend everywhere, so images without
    foreground are predicted and trained like all others. SAM's encoder runs without any prompt from outside, and
    the whole batch is decoded at once.

    Xia et al. 2024, MapSAM, arXiv 2411.06971; code: github.com/Xue-Xia/MapSAM. Differs from the released code by
    default: one softmax in masked attention, SAM's own normalisation of colours (``backbone.normalise``), SAM's own
    mask token (``mask_token``), and a loss at full resolution (``supervise``).

    Args:
        backbone: Recipe of the SAM.
        num_classes: Two: background and the class to find.
        adapters: Sets of adapters; the paper has ``DoRA(rank=4, axis="in")`` on queries and values.
        train: What trains besides the adapters and the coarse mask.
        points: Clicks of each kind that the coarse mask gives; 0 is none.
        semantic: Add the mean embedding of the coarse foreground to the queries.
        masked_attention: Let tokens attend only to the coarse foreground, and after each layer to their own.
        double_softmax: Masked attention of the released code, softmax(softmax(QKᵀ/√d) + M): almost a uniform mean.
        mask_token: Keep SAM's mask token and its hypernetwork, or draw them anew as the released code does.
        supervise: Compare the final mask enlarged, at the full resolution, or at its own as the paper does. Labels at
            the latter lose thin lines: no mask trained on them can exceed an IoU of 0.75 on the railway tiles.
        coarse_weight: Weight of the loss of the coarse mask.
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
        points: int = 2,
        semantic: bool = True,
        masked_attention: bool = True,
        double_softmax: bool = False,
        mask_token: Literal["keep", "fresh"] = "keep",
        supervise: Literal["low", "full"] = "full",
        coarse_weight: float = 1.0,
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
        if num_classes != 2:
            raise ValueError(
                f"model.num_classes: {num_classes}; AutomaticSegmentation finds one class besides the background: "
                "use SemanticSegmentation for several"
            )
        if points < 0:
            raise ValueError(f"model.points: {points} must not be negative")
        if mask_token == "fresh" and train == "adapters":
            raise ValueError("model.mask_token: fresh would stay random; set model.train to decoder or all")
        self.points, self.semantic, self.masked = points, semantic, masked_attention
        self.double_softmax, self.mask_token = double_softmax, mask_token
        self.supervise, self.coarse_weight = supervise, coarse_weight

    def build(self) -> nn.Module:
        """SAM with a coarse-mask generator as its child ``coarse``."""
        sam: Any = super().build()
        sam.coarse = CoarseMask(sam.prompt_encoder.embed_dim)
        if self.mask_token == "fresh":
            fresh_mask_token(sam.mask_decoder)
        return sam

    def runs(self, name: str) -> bool:
        """All but the IoU head, boxes, mask prompts and the tokens of several masks."""
        return not name.startswith(_UNUSED) and (self.points > 0 or not name.startswith(_PROMPTS))

    def outputs(self, images: Tensor, masks: Tensor, stage: Stage) -> Masks:
        """The final and the coarse mask; ``masks`` are not looked at."""
        return self.segment(images)

    def segment(self, images: Tensor) -> Masks:
        """The final and the coarse mask of normalised images (B, 3, S, S)."""
        sam: Any = self.model
        embeddings, states = self.encode(images, state_blocks(len(sam.image_encoder.blocks)))
        coarse = sam.coarse(embeddings, states)
        guide, detached = coarse.detach(), embeddings.detach()
        points, labels = prompt_points(guide, self.img_size, self.points) if self.points else (None, None)
        sparse, dense = prompt(sam, points, labels)
        final, _ = decode(
            sam,
            embeddings,
            sparse.expand(len(images), -1, -1),
            dense,
            tokens=sam.mask_decoder.mask_tokens.weight[:1],
            hypernetworks=sam.mask_decoder.output_hypernetworks_mlps[:1],
            semantic=semantic_prompt(guide, detached) if self.semantic else None,
            attend=(guide >= 0).flatten(1) if self.masked else None,
            refresh=self.masked,
            legacy=self.double_softmax,
        )
        return Masks(final, coarse)

    def criterion(self, output: Masks, target: Tensor) -> Tensor:
        """Focal and Dice loss of both masks against label maps (B, S, S)."""
        final = self.enlarge(output.final) if self.supervise == "full" else output.final
        # Both at the resolution of the final mask: a line that is thinner than a patch exists there.
        coarse = F.interpolate(output.coarse, output.final.shape[-2:], mode="bilinear", align_corners=False)
        return focal_dice(final, target) + self.coarse_weight * focal_dice(coarse, target)

    def decide(self, output: Masks) -> Tensor:
        """1 where the probability of the final mask, at full size, is above one half."""
        return (self.enlarge(output.final)[:, 0] > 0).long()

    def probabilities(self, images: Tensor) -> Tensor:
        """Shares of background and class (B, 2, S, S)."""
        share = self.enlarge(self.segment(images).final).sigmoid()
        return torch.cat([1 - share, share], dim=1)
