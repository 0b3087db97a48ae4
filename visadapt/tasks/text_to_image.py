"""Text-to-image: Stable Diffusion learns a subject, a style or a domain with adapters, new words or as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from visadapt.backbones.precision import trainable_in_fp32
from visadapt.backbones.sd_latents import encode_images, latent_constants
from visadapt.backbones.sd_render import render
from visadapt.backbones.sd_text import encode_prompts, null_text
from visadapt.backbones.sd_tokens import NewToken, add_tokens, extended, metadata
from visadapt.backbones.stable_diffusion import Diffusion, StableDiffusion
from visadapt.core.model import Adaptation, is_adapter_key, strength
from visadapt.core.train import penalty, training_only
from visadapt.losses import diffusion as dm
from visadapt.optim.schedule import Schedule
from visadapt.tasks import measures as ms
from visadapt.tasks.base import DEFAULT_SCHEDULE
from visadapt.tasks.diffusion import DiffusionTask, Drawn, rows_of
from visadapt.tasks.diffusion_options import Loss, Noise, Preview

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

DEFAULT_NOISE, DEFAULT_LOSS, DEFAULT_PREVIEW = Noise(), Loss(), Preview()


class TextToImage(DiffusionTask):
    """Trains the UNet of a Stable Diffusion, and where asked its text encoders, to undo noise.

    A batch is a dict: ``images`` (B, 3, H, W) in -1 … 1 or scaled ``latents`` (B, C, h, w); ``captions`` and perhaps
    ``text``, what the text encoders make of them; ``sizes`` (B, 6); perhaps ``masks`` (B, 1, H, W) and ``prior`` (B,).
    The VAE runs only without latents; the text encoders only without text, and once for the empty caption.

    Times, noise and dropped captions come from a generator of (seed, epoch, batch, rank), so a resumed run has the
    same ones whatever else draws. The validation loss is the plain mean square at fixed times and with fixed noise of
    each sample, the same in every epoch and run, so it compares runs with the same prediction on the same data.

    Args:
        backbone: Recipe of the Stable Diffusion.
        adapters: Sets of adapters, applied in order; targets such as ``unet.attention`` or ``text``.
        train: What trains besides the adapters and new tokens: nothing, the whole UNet, or it and the text encoders
            (full fine-tuning).
        tokens: New words whose embeddings train (textual inversion).
        noise: Noise and times of training.
        loss: The training loss.
        preview: Pictures of a run.
        measures: Figures of rendered pictures at the end of a run, beside the base's; null is off.
        caption_dropout: Share of samples that train without caption, for classifier-free guidance.
        val_times: Times at which the validation loss looks at each sample.
        seed: Source of times, noise and dropped captions.
        optimizer: Any torch optimiser; its ``lr`` and ``weight_decay`` are those of the matrices.
        schedule: Warm-up and decay of the learning rate.
        up_lr_ratio: Learning rate of up factors over that of the others (LoRA+).
        ema_decay: Keep an exponential average of the trained tensors with this decay.
        rates: Learning rates of parts, by the name of a set or by a path such as ``text_encoder``.
        start: Adapter file whose tensors the sets of the same name start from.
    """

    report_kind = "pictures"

    def __init__(
        self,
        backbone: StableDiffusion,
        adapters: list[Adaptation] | None = None,
        train: Literal["adapters", "unet", "all"] = "adapters",
        tokens: list[NewToken] | None = None,
        noise: Noise = DEFAULT_NOISE,
        loss: Loss = DEFAULT_LOSS,
        preview: Preview = DEFAULT_PREVIEW,
        measures: ms.Measures | None = None,
        caption_dropout: float = 0.0,
        val_times: int = 4,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = DEFAULT_SCHEDULE,
        up_lr_ratio: float = 1.0,
        ema_decay: float | None = None,
        rates: dict[str, float] | None = None,
        start: str | None = None,
    ) -> None:
        super().__init__(
            backbone, adapters, noise, loss, preview, caption_dropout, val_times, seed,
            optimizer, schedule, up_lr_ratio, ema_decay, rates, start,
        )  # fmt: skip
        if loss.auxiliary is not None and backbone.grad_checkpointing:
            raise ValueError(
                "model.loss.auxiliary: two factors learn apart only without model.backbone.grad_checkpointing"
            )
        self.loss: Loss = loss
        self.what, self.tokens, self.measures = train, list(tokens or []), measures

    # --- the model ---------------------------------------------------------------------
    def build(self) -> Diffusion:
        """The backbone's networks, with the new tokens."""
        model = self.backbone.build()
        if self.tokens:
            add_tokens(model, self.tokens)
        return model

    def thaw(self, model: nn.Module) -> None:
        """Let the new tokens train, and the networks where ``train`` says so."""
        for table in extended(model):
            table.new_tokens.requires_grad_(True)
        whole = {"adapters": (), "unet": ("unet.",), "all": ("unet.", "text_encoder")}[self.what]
        for name, parameter in model.named_parameters():
            if name.startswith(whole) and not is_adapter_key(name):
                parameter.requires_grad_(True)
        trainable_in_fp32(model)

    def adapter_metadata(self) -> dict[str, str]:
        """What the adapter file of a run says besides the adapters."""
        return super().adapter_metadata() | metadata(self.model)

    def latents(self, batch: dict[str, Any]) -> Tensor:
        """The scaled latents of a batch (B, C, h, w): its own, or of its images."""
        return batch["latents"] if "latents" in batch else self.encoded(batch["images"])

    def encoded(self, samples: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) of images (B, 3, H, W) in -1 … 1."""
        return encode_images(self.model, samples)

    def latent_settings(self) -> tuple[object, ...]:
        """Shift and scale of the latents."""
        return latent_constants(self._diffusion.vae)

    def predicted(self, noisy: Tensor, told: Tensor, text: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """The UNet's prediction (B, C, h, w)."""
        found: Tensor = self.model(noisy, told, text, batch.get("sizes"))
        return found

    def said(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoders make of captions, (B, …) each."""
        return encode_prompts(self.model, captions)

    def unsaid(self) -> dict[str, Tensor]:
        """The condition (1, …) of "no prompt"."""
        return null_text(self.model)

    # --- training ----------------------------------------------------------------------
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch plus what the adapters ask to add."""
        latents = self.latents(batch)
        loss = self._training_loss(batch, latents, self.generator(batch_idx))
        self.report("train", loss, None, latents)
        return loss + penalty(self.model)

    def _training_loss(self, batch: dict[str, Any], latents: Tensor, generator: torch.Generator) -> Tensor:
        """The weighted loss of a batch, with the draws of a generator."""
        drawn, keep = self.draw(latents, generator)
        error = self._errors(batch, latents, drawn, self.conditions(batch, keep))
        losses = dm.per_sample(self.pointwise(error, drawn.times), batch.get("masks"))
        losses = self.weighted(losses, drawn.times)
        return dm.with_prior(losses, batch.get("prior"), self.loss.prior_weight)

    def _errors(self, batch: dict[str, Any], latents: Tensor, drawn: Drawn, text: dict[str, Tensor]) -> Tensor:
        """As ``error``; class images and the others may send their gradients to one factor of the adapters each."""
        prior, factor = batch.get("prior"), self.loss.auxiliary
        if factor is None or prior is None:
            return self.error(batch, latents, drawn, text)
        other: Literal["up", "down"] = "down" if factor == "up" else "up"
        found, rows = [], []
        for which, trained in ((prior, factor), (~prior, other)):
            if which.any():
                said = {key: rows_of(value, which) for key, value in text.items()}
                part = {key: rows_of(value, which) for key, value in batch.items() if key == "sizes"}
                with training_only(self.model, trained):
                    found.append(self.error(part, rows_of(latents, which), drawn.rows(which), said))
                rows.append(which.nonzero()[:, 0])
        return torch.cat(found)[torch.cat(rows).argsort().to(found[0].device)]

    # --- evaluation --------------------------------------------------------------------
    def on_validation_epoch_end(self) -> None:
        """Report what ``measures`` asks for, unless this is the validation of a fit."""
        ms.report(self)

    on_test_epoch_end = on_validation_epoch_end

    def measuring(self, data: Any) -> ms.Measuring:
        """What computes the figures that ``measures`` asks for."""
        return ms.Measuring(self, data)

    def render(self, prompts: Sequence[str], seeds: Sequence[int], chunk: int = 8) -> Tensor:
        """Pictures (B, 3, H, W) in 0 … 1 as ``preview`` says, one of each prompt with the seed beside it."""
        how = self.preview
        return render(self._diffusion, prompts, seeds, how.steps, how.guidance, how.size, how.negative, chunk)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """As every task; before it, as schedules count batches, the class pictures that the data wants and lacks.

        They are rendered with the base, on the first process.
        """
        images = getattr(getattr(self.trainer, "datamodule", None), "class_images", None)
        if images is not None and self.trainer.is_global_zero:
            from torchvision.transforms.functional import to_pil_image

            with strength(self.model, 0.0):
                for number in images.missing():
                    picture = self.render([images.prompt], [number])[0]
                    images.add(number, to_pil_image((picture * 255).round().byte()))
        self.trainer.strategy.barrier()
        return super().configure_optimizers()
