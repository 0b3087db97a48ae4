"""What the tasks of diffusion share: times and noise, conditions, the error, and a validation loss that is fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from visadapt.backbones.encoding_cache import EncodingCache, encoder_id
from visadapt.core.model import Adaptation
from visadapt.data.captions import warn_of_long
from visadapt.data.loader import mixed_seed
from visadapt.losses import diffusion as dm
from visadapt.optim.schedule import Schedule
from visadapt.tasks.base import BaseTask, Stage
from visadapt.tasks.diffusion_options import Noise, Preview, Robust


@dataclass(frozen=True)
class Drawn:
    """What chance decides of a batch.

    Attributes:
        times: u in 0 … 1 (B,), float64.
        noise: What the network shall find (B, …), like the latents.
        entering: The noise that the input has.
    """

    times: Tensor
    noise: Tensor
    entering: Tensor

    def rows(self, which: Tensor) -> Drawn:
        """Those of some samples, by number or by a mask."""
        return Drawn(*(rows_of(tensor, which) for tensor in (self.times, self.noise, self.entering)))


def rows_of(tensor: Tensor, which: Tensor) -> Tensor:
    """Some samples of a tensor (B, …), by number or by a mask on any device."""
    return tensor[which.to(tensor.device)]


class DiffusionTask(BaseTask):
    """Trains a network to undo noise. A subclass states ``build``, latents, prediction, text, loss and renders.

    A batch is a dict with ``captions`` and perhaps ``text``, what the text encoders make of them. Times, noise and
    dropped captions come from a generator of (seed, epoch, batch, rank), so a resumed run has the same ones whatever
    else draws. The validation loss is the plain mean square at fixed times and with fixed noise of each sample.

    Args:
        backbone: Recipe of the model: ``lean``, ``build()`` and ``preprocess(train)``.
        adapters: Sets of adapters, applied in order.
        noise: Noise and times of training.
        loss: The training loss.
        preview: What to render.
        caption_dropout: Share of samples that train without caption, for classifier-free guidance.
        val_times: Times at which the validation loss looks at each sample.
        seed: Source of times, noise and dropped captions.
        optimizer: As in ``BaseTask``, like what follows.
        schedule: Warm-up and decay of the learning rate.
        up_lr_ratio: Learning rate of up factors over that of the others (LoRA+).
        ema_decay: Keep an exponential average of the trained tensors with this decay.
        rates: Learning rates of parts.
        start: Adapter file whose tensors the sets of the same name start from.
    """

    def __init__(
        self,
        backbone: Any,
        adapters: list[Adaptation] | None,
        noise: Noise,
        loss: Robust,
        preview: Preview,
        caption_dropout: float,
        val_times: int,
        seed: int,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        up_lr_ratio: float,
        ema_decay: float | None,
        rates: dict[str, float] | None,
        start: str | None,
    ) -> None:
        super().__init__(adapters, optimizer, schedule, up_lr_ratio, ema_decay, rates, start)
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"model.caption_dropout: {caption_dropout} is no share; 0.1 is usual")
        if val_times < 1:
            raise ValueError(f"model.val_times: {val_times}; at least 1 is needed")
        if backbone.lean:
            self.adaptations = [replace(adaptation, lean=True) for adaptation in self.adaptations]
        self.backbone, self.noise, self.loss, self.preview = backbone, noise, loss, preview
        self.caption_dropout, self.val_times, self.seed = caption_dropout, val_times, seed
        self._null: dict[str, Tensor] = {}

    # --- stated by tasks ---------------------------------------------------------------
    def latents(self, batch: dict[str, Any]) -> Tensor:
        """The scaled latents of a batch (B, …)."""
        raise NotImplementedError(f"{type(self).__name__} must state latents(batch)")

    def encoded(self, samples: Tensor) -> Tensor:
        """Scaled latents (B, …) of pictures or videos."""
        raise NotImplementedError(f"{type(self).__name__} must state encoded(samples)")

    def latent_settings(self) -> tuple[object, ...]:
        """What latents depend on besides the weights of the VAE."""
        raise NotImplementedError(f"{type(self).__name__} must state latent_settings()")

    def predicted(self, noisy: Tensor, told: Tensor, text: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """What the network predicts of noisy latents (B, …), in their shape, told the time (B,)."""
        raise NotImplementedError(f"{type(self).__name__} must state predicted(noisy, told, text, batch)")

    def said(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoders make of captions, (B, …) each."""
        raise NotImplementedError(f"{type(self).__name__} must state said(captions)")

    def unsaid(self) -> dict[str, Tensor]:
        """The condition (1, …) of "no prompt"."""
        raise NotImplementedError(f"{type(self).__name__} must state unsaid()")

    def render(self, prompts: Sequence[str], seeds: Sequence[int], chunk: int = 8) -> Tensor:
        """What ``preview`` says (B, …) in 0 … 1, one of each prompt with the seed beside it, ``chunk`` at a time."""
        raise NotImplementedError(f"{type(self).__name__} must state render(prompts, seeds, chunk)")

    # --- the model ---------------------------------------------------------------------
    @property
    def _diffusion(self) -> Any:
        """The model: ``scheduler``, ``prediction``, ``vae``, ``tokenizer``, ``layout``, ``zeros_for_empty``."""
        return self.model

    def preprocess(self, train: bool) -> Callable[[Any], Tensor]:
        """The backbone's conversion of an image; data modules may ask for it."""
        found: Callable[[Any], Tensor] = self.backbone.preprocess(train)
        return found

    @property
    def text_trains(self) -> bool:
        """Whether anything of the text encoders trains; what they make of a caption is then not to be kept."""
        encoders = [part for name, part in self.model.named_children() if name.startswith("text_encoder")]
        return any(p.requires_grad for part in encoders for p in part.parameters())

    def encoding_cache(self, folder: str | Path, max_bytes: int) -> EncodingCache:
        """The frozen encoders with a folder that keeps what they make; data modules with a cache ask for it."""
        self.configure_model()
        model = self._diffusion
        texts = [part for name, part in model.named_children() if name.startswith("text_encoder")]
        return EncodingCache(
            folder,
            max_bytes,
            self.encoded,
            encoder_id([model.vae], *self.latent_settings()),
            None if self.text_trains else self.said,
            "" if self.text_trains else encoder_id(texts, model.layout, model.tokenizer.model_max_length),
        )

    # --- training ----------------------------------------------------------------------
    def generator(self, batch_idx: int) -> torch.Generator:
        """The source of all that a training step draws."""
        seed = mixed_seed(self.seed, self.current_epoch, batch_idx, self.global_rank)
        return torch.Generator().manual_seed(seed)

    def draw(self, latents: Tensor, generator: torch.Generator) -> tuple[Drawn, Tensor]:
        """Times and noise of a batch, and which captions are kept (B,).

        What every run draws is drawn first, so options do not change it.
        """
        count, how = len(latents), self.noise
        times = dm.draw_times(count, how.sampling, how.t_min, how.t_max, how.mean, how.std, generator)
        noise = torch.randn(latents.shape, generator=generator)
        keep = torch.rand(count, generator=generator) >= self.caption_dropout
        noise = dm.offset_noise(noise, how.offset, generator).to(latents)
        return Drawn(times, noise, dm.perturbed(noise, how.perturbation, generator)), keep

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
                found = self.said(captions)
            if not self._diffusion.zeros_for_empty:
                return found
        return found if bool(kept.all()) else self._dropped(found, kept)

    def _dropped(self, found: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        if not self._null or next(iter(self._null.values())).device != self.device:
            with torch.no_grad():
                self._null = self.unsaid()
        shaped = {key: kept.to(value.device).view(-1, *[1] * (value.dim() - 1)) for key, value in found.items()}
        return {key: torch.where(shaped[key], value, self._null[key].to(value)) for key, value in found.items()}

    def error(self, batch: dict[str, Any], latents: Tensor, drawn: Drawn, text: dict[str, Tensor]) -> Tensor:
        """Prediction minus target, of the shape of the latents."""
        alpha, sigma = self._coefficients(drawn.times)
        noisy = dm.noised(latents, drawn.entering, alpha, sigma)
        steps = self._diffusion.scheduler.config.num_train_timesteps
        told = drawn.times * steps if self._diffusion.prediction == "flow" else dm.steps_of(drawn.times, steps)
        told = told.float() if told.is_floating_point() else told
        found = self.predicted(noisy, told.to(latents.device), text, batch)
        return found - dm.target(self._diffusion.prediction, latents, drawn.noise, alpha, sigma)

    def pointwise(self, error: Tensor, times: Tensor) -> Tensor:
        """The training loss of each element of an error (B, …) at the times (B,), without weights."""
        width = None
        if self.loss.kind != "mse":
            alpha, sigma = self._coefficients(times)
            width = dm.huber_width(self.loss.width_schedule, self.loss.width, times, alpha, sigma)
        return dm.pointwise(self.loss.kind, error, width)

    def weighted(self, losses: Tensor, times: Tensor) -> Tensor:
        """Losses (B,) with the weights of their times."""
        if self.loss.snr_gamma is None:
            return losses
        weights = dm.min_snr(self._diffusion.prediction, *self._coefficients(times), self.loss.snr_gamma)
        return losses * weights.to(losses)

    def _coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        model = self._diffusion
        return dm.coefficients(times, None if model.prediction == "flow" else model.scheduler.alphas_cumprod)

    # --- evaluation --------------------------------------------------------------------
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The validation loss of one batch."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same of the test data."""
        self._evaluate(batch, batch_idx, "test")

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
            error = self.error(batch, latents, Drawn(times[:, column], noise, noise), text)
            total += dm.per_sample(error**2)
        return total / self.val_times

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Renders (B, …) in 0 … 1 of the captions of a batch, with its seeds or the first one of the preview."""
        captions = batch["captions"] if isinstance(batch, dict) else list(batch)
        seeds = batch["seeds"] if "seeds" in batch else [self.preview.seeds[0]] * len(captions)
        return self.render(captions, seeds, chunk=len(captions))

    def on_fit_start(self) -> None:
        """Say which prompts of the preview are too long."""
        warn_of_long([(prompt[:60], prompt) for prompt in self.preview.prompts], self.model, "model.preview.prompts")
