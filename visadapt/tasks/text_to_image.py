"""Text-to-image: Stable Diffusion learns a subject, a style or a domain with adapters, new words or as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from visadapt.backbones.encoding_cache import EncodingCache, encoder_id
from visadapt.backbones.precision import trainable_in_fp32
from visadapt.backbones.sd_latents import encode_images, latent_constants
from visadapt.backbones.sd_render import render
from visadapt.backbones.sd_text import encode_prompts, null_text
from visadapt.backbones.sd_tokens import NewToken, add_tokens, extended, metadata
from visadapt.backbones.stable_diffusion import Diffusion, StableDiffusion
from visadapt.core.model import Adaptation, is_adapter_key, strength
from visadapt.core.train import penalty, training_only
from visadapt.data.captions import warn_of_long
from visadapt.data.loader import mixed_seed
from visadapt.losses import diffusion as dm
from visadapt.optim.schedule import Schedule
from visadapt.tasks import measures as ms
from visadapt.tasks.base import DEFAULT_SCHEDULE, BaseTask, Stage
from visadapt.tasks.diffusion_options import Loss, Noise, Preview

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

DEFAULT_NOISE, DEFAULT_LOSS, DEFAULT_PREVIEW = Noise(), Loss(), Preview()


class TextToImage(BaseTask):
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
        train: What trains besides the adapters and new tokens: nothing, or the whole UNet (full fine-tuning).
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
        train: Literal["adapters", "all"] = "adapters",
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
        super().__init__(adapters, optimizer, schedule, up_lr_ratio, ema_decay, rates, start)
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"model.caption_dropout: {caption_dropout} is no share; 0.1 is usual")
        if val_times < 1:
            raise ValueError(f"model.val_times: {val_times}; at least 1 is needed")
        if loss.auxiliary is not None and backbone.grad_checkpointing:
            raise ValueError(
                "model.loss.auxiliary: two factors learn apart only without model.backbone.grad_checkpointing"
            )
        if backbone.lean:
            self.adaptations = [replace(adaptation, lean=True) for adaptation in self.adaptations]
        self.backbone = backbone
        self.what, self.tokens = train, list(tokens or [])
        self.noise, self.loss, self.preview, self.measures = noise, loss, preview, measures
        self.caption_dropout, self.val_times, self.seed = caption_dropout, val_times, seed
        self._null: dict[str, Tensor] = {}

    # --- the model ---------------------------------------------------------------------
    def build(self) -> Diffusion:
        """The backbone's networks, with the new tokens."""
        model = self.backbone.build()
        if self.tokens:
            add_tokens(model, self.tokens)
        return model

    def thaw(self, model: nn.Module) -> None:
        """Let the new tokens train, and the UNet where ``train`` says so."""
        for table in extended(model):
            table.new_tokens.requires_grad_(True)
        if self.what == "all":
            for name, parameter in model.named_parameters():
                if name.startswith("unet.") and not is_adapter_key(name):
                    parameter.requires_grad_(True)
        trainable_in_fp32(model)

    def preprocess(self, train: bool) -> Callable[[Any], Tensor]:
        """The backbone's conversion of an image; data modules may ask for it."""
        return self.backbone.preprocess(train)

    @property
    def text_trains(self) -> bool:
        """Whether anything of the text encoders trains; what they make of a caption is then not to be kept."""
        encoders = [part for name, part in self.model.named_children() if name.startswith("text_encoder")]
        return any(p.requires_grad for part in encoders for p in part.parameters())

    def adapter_metadata(self) -> dict[str, str]:
        """What the adapter file of a run says besides the adapters."""
        return super().adapter_metadata() | metadata(self.model)

    def encoding_cache(self, folder: str | Path, max_bytes: int) -> EncodingCache:
        """The frozen encoders with a folder that keeps what they make; data modules with a cache ask for it."""
        self.configure_model()
        model: Any = self.model
        texts = [part for name, part in model.named_children() if name.startswith("text_encoder")]
        return EncodingCache(
            folder,
            max_bytes,
            partial(encode_images, model),
            encoder_id([model.vae], *latent_constants(model.vae)),
            None if self.text_trains else partial(encode_prompts, model),
            "" if self.text_trains else encoder_id(texts, model.layout, model.tokenizer.model_max_length),
        )

    # --- training ----------------------------------------------------------------------
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch plus what the adapters ask to add."""
        seed = mixed_seed(self.seed, self.current_epoch, batch_idx, self.global_rank)
        generator = torch.Generator().manual_seed(seed)
        latents = self.latents(batch)
        loss = self._training_loss(batch, latents, generator)
        self.report("train", loss, None, latents)
        return loss + penalty(self.model)

    def _training_loss(self, batch: dict[str, Any], latents: Tensor, generator: torch.Generator) -> Tensor:
        """The weighted loss of a batch. What every run draws is drawn first, so options do not change it."""
        count, options = len(latents), self.noise
        times = dm.draw_times(
            count, options.sampling, options.t_min, options.t_max, options.mean, options.std, generator
        )
        noise = torch.randn(latents.shape, generator=generator)
        keep = torch.rand(count, generator=generator) >= self.caption_dropout
        noise = dm.offset_noise(noise, options.offset, generator).to(latents)
        entering = dm.perturbed(noise, options.perturbation, generator)
        alpha, sigma = self._coefficients(times)
        error = self._errors(batch, (latents, times, noise, entering), self.conditions(batch, keep))
        width = None
        if self.loss.kind != "mse":
            width = dm.huber_width(self.loss.width_schedule, self.loss.width, times, alpha, sigma)
        losses = dm.per_sample(dm.pointwise(self.loss.kind, error, width), batch.get("masks"))
        if self.loss.snr_gamma is not None:
            losses = losses * dm.min_snr(self._diffusion.prediction, alpha, sigma, self.loss.snr_gamma).to(losses)
        return dm.with_prior(losses, batch.get("prior"), self.loss.prior_weight)

    def latents(self, batch: dict[str, Any]) -> Tensor:
        """The scaled latents of a batch (B, C, h, w): its own, or of its images."""
        return batch["latents"] if "latents" in batch else encode_images(self.model, batch["images"])

    def conditions(self, batch: dict[str, Any], keep: Tensor | None = None) -> dict[str, Tensor]:
        """Text conditions of a batch; samples that are not kept have those of "no prompt".

        Raises:
            ValueError: The batch brings outputs of text encoders that train.
        """
        kept = torch.ones(len(batch["captions"]), dtype=torch.bool) if keep is None else keep
        if "text" in batch:
            if self.text_trains:
                raise ValueError(
                    "data.cache: the batch brings kept outputs of the text encoder, but that trains here; leave text "
                    "encoders and new tokens out of what trains, or remove the outputs from the batch"
                )
            found = batch["text"]
        else:
            captions = [caption if one else "" for caption, one in zip(batch["captions"], kept.tolist(), strict=True)]
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_trains):
                found = encode_prompts(self.model, captions)
            if not self._diffusion.zeros_for_empty:
                return found
        return found if bool(kept.all()) else self._dropped(found, kept)

    def _dropped(self, found: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        if not self._null or next(iter(self._null.values())).device != self.device:
            with torch.no_grad():
                self._null = null_text(self.model)
        shaped = {key: kept.to(value.device).view(-1, *[1] * (value.dim() - 1)) for key, value in found.items()}
        return {key: torch.where(shaped[key], value, self._null[key].to(value)) for key, value in found.items()}

    def _errors(
        self, batch: dict[str, Any], drawn: tuple[Tensor, Tensor, Tensor, Tensor], text: dict[str, Tensor]
    ) -> Tensor:
        """As ``_error`` of latents, times, noise and entering noise.

        With ``loss.auxiliary``, class images and the others send their gradients to one factor of the adapters each.
        """
        prior, factor = batch.get("prior"), self.loss.auxiliary
        if factor is None or prior is None:
            return self._error(batch, *drawn, text)
        other: Literal["up", "down"] = "down" if factor == "up" else "up"
        found, rows = [], []
        for which, trained in ((prior, factor), (~prior, other)):
            if which.any():
                latents, times, noise, entering = (tensor[which.to(tensor.device)] for tensor in drawn)
                said = {key: value[which.to(value.device)] for key, value in text.items()}
                part = {key: value[which.to(value.device)] for key, value in batch.items() if key == "sizes"}
                with training_only(self.model, trained):
                    found.append(self._error(part, latents, times, noise, entering, said))
                rows.append(which.nonzero()[:, 0])
        return torch.cat(found)[torch.cat(rows).argsort().to(found[0].device)]

    def _error(
        self,
        batch: dict[str, Any],
        latents: Tensor,
        times: Tensor,
        noise: Tensor,
        entering: Tensor,
        text: dict[str, Tensor],
    ) -> Tensor:
        """Prediction minus target (B, C, h, w), where ``entering`` is the noise that the input has."""
        alpha, sigma = self._coefficients(times)
        noisy = dm.noised(latents, entering, alpha, sigma)
        steps = self._diffusion.scheduler.config.num_train_timesteps
        told = times * steps if self._diffusion.prediction == "flow" else dm.steps_of(times, steps)
        told = told.float() if told.is_floating_point() else told
        found = self.model(noisy, told.to(latents.device), text, batch.get("sizes"))
        return found - dm.target(self._diffusion.prediction, latents, noise, alpha, sigma)

    def _coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        model = self._diffusion
        return dm.coefficients(times, None if model.prediction == "flow" else model.scheduler.alphas_cumprod)

    @property
    def _diffusion(self) -> Diffusion:
        return self.model  # type: ignore[return-value]

    # --- evaluation --------------------------------------------------------------------
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The validation loss of one batch."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same of the test data."""
        self._evaluate(batch, batch_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """Report what ``measures`` asks for, unless this is the validation of a fit."""
        ms.report(self)

    on_test_epoch_end = on_validation_epoch_end

    def _evaluate(self, batch: dict[str, Any], batch_idx: int, stage: Stage) -> None:
        size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", len(batch["captions"]))
        own = batch_idx * size + torch.arange(len(batch["captions"]))
        losses = self.fixed_losses(batch, own * self.trainer.world_size + self.global_rank)
        self.report(stage, losses.mean(), None, losses)

    @torch.no_grad()
    def fixed_losses(self, batch: dict[str, Any], index: Tensor) -> Tensor:
        """Mean squares (B,) of samples at their ``val_times`` fixed times, with their fixed noise.

        Args:
            batch: As for training; masks and class images do not count.
            index: Numbers of the samples (B,), which choose times and noise.
        """
        latents, text = self.latents(batch), self.conditions(batch)
        times, total = dm.strata(index, self.val_times), torch.zeros(len(latents), device=latents.device)
        for column in range(self.val_times):
            seeds = [mixed_seed(column, number) for number in index.tolist()]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            noise = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in generators]).to(latents)
            error = self._error(batch, latents, times[:, column], noise, noise, text)
            total += dm.per_sample(error**2)
        return total / self.val_times

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Pictures (B, 3, H, W) in 0 … 1 of the captions of a batch, with its seeds or the first one of the preview."""
        captions = batch["captions"] if isinstance(batch, dict) else list(batch)
        seeds = batch["seeds"] if "seeds" in batch else [self.preview.seeds[0]] * len(captions)
        return self.render(captions, seeds, chunk=len(captions))

    def render(self, prompts: Sequence[str], seeds: Sequence[int], chunk: int = 8) -> Tensor:
        """Pictures (B, 3, H, W) in 0 … 1 as ``preview`` says, one of each prompt with the seed beside it."""
        how = self.preview
        return render(self._diffusion, prompts, seeds, how.steps, how.guidance, how.size, how.negative, chunk)

    def on_fit_start(self) -> None:
        """Say which prompts of the preview are too long."""
        warn_of_long([(prompt[:60], prompt) for prompt in self.preview.prompts], self.model, "model.preview.prompts")

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
