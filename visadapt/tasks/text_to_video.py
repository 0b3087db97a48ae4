"""Text-to-video: a motion is learned from one clip or a few, apart from what they look like, and played on others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from visadapt.backbones.precision import trainable_in_fp32
from visadapt.backbones.video_diffusion import VideoDiffusion, VideoModel
from visadapt.backbones.video_latents import encode_videos
from visadapt.backbones.video_render import render
from visadapt.backbones.video_text import encode_prompts, null_text
from visadapt.callbacks.check_reached import CheckReached
from visadapt.core.model import Adaptation, adapters, is_adapter_key, strength
from visadapt.core.train import penalty
from visadapt.data.loader import mixed_seed
from visadapt.losses import video as vd
from visadapt.losses.diffusion import per_sample
from visadapt.optim.schedule import Schedule, total_steps
from visadapt.tasks import video_passes as vp
from visadapt.tasks import video_sets as vs
from visadapt.tasks.base import DEFAULT_SCHEDULE
from visadapt.tasks.diffusion import DiffusionTask, Drawn
from visadapt.tasks.diffusion_options import ClipPreview, Noise, Paths, Robust
from visadapt.tasks.measures import report
from visadapt.tasks.sharding import allow_rest
from visadapt.tasks.video_measures import ClipMeasures, ClipMeasuring
from visadapt.tasks.video_passes import Pass, Sets, Step
from visadapt.tasks.video_start import beginning

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

DEFAULT_NOISE, DEFAULT_LOSS, DEFAULT_PATHS, DEFAULT_PREVIEW = Noise(), Robust(), Paths(), ClipPreview()


class TextToVideo(DiffusionTask):
    """MotionDirector (Zhao et al. 2023, arXiv 2310.08465; code: github.com/showlab/MotionDirector) as two sets.

    The set `spatial` learns a random frame of each clip while `temporal` is off. `temporal` learns the clip, by the
    plain and the appearance-debiased loss, while `spatial` is there but gets no gradient: what it explains, the motion
    need not. Afterwards `temporal` alone is the motion, to be played on any prompt. Both may be of any method and have
    any targets, such as the presets ``spatial`` and ``temporal`` of the backbone.

    A batch is a dict: ``videos`` (B, F, 3, H, W) in -1 … 1 or scaled ``latents`` (B, F, C, h, w), or pictures without
    the dimension of frames; ``captions`` and perhaps ``text``; perhaps ``frame_captions``, of single frames, with
    ``frame_text``; with ``clips`` also ``clip`` (B,), the number of the source.

    Differs from the official code: both gradients are computed before either set is stepped, frames have captions of
    their own where the data know any, and each clip of a batch has a frame and an anchor of its own.

    Args:
        backbone: Recipe of the video network.
        adapters: Sets of adapters, applied in order.
        paths: How appearance and motion are told apart.
        clips: Clips that have a spatial set of their own, `spatial-0`, `spatial-1` …; 1 is one set for all.
        strengths: How far sets act in validation and rendering; what is not named acts fully, the spatial sets of
            "dual" and "sequential" not at all.
        train: What trains besides the adapters: nothing, all of the base's layers over time, or the whole network.
        noise: Noise and times of training.
        loss: The loss of an error.
        preview: Videos of a run.
        measures: Figures of rendered clips at the end of a run, beside the base's; null is off.
        caption_dropout: Share of clips that train without caption, for classifier-free guidance.
        val_times: Times at which the validation loss looks at each clip.
        seed: Source of times, noise, frames and dropped captions.
        optimizer: Any torch optimiser; its ``lr`` and ``weight_decay`` are those of the matrices.
        schedule: Warm-up and decay of the learning rate.
        up_lr_ratio: Learning rate of up factors over that of the others (LoRA+).
        ema_decay: Keep an exponential average of the trained tensors with this decay.
        rates: Learning rates of parts, by the name of a set or by a path.
        start: Adapter file whose tensors the sets of the same name start from.
    """

    report_kind = "videos"

    def __init__(
        self,
        backbone: VideoDiffusion,
        adapters: list[Adaptation] | None = None,
        paths: Paths = DEFAULT_PATHS,
        clips: int = 1,
        strengths: dict[str, float] | None = None,
        train: Literal["adapters", "temporal", "all"] = "adapters",
        noise: Noise = DEFAULT_NOISE,
        loss: Robust = DEFAULT_LOSS,
        preview: ClipPreview = DEFAULT_PREVIEW,
        measures: ClipMeasures | None = None,
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
        if clips < 1:
            raise ValueError(f"model.clips: {clips}; 1 is one spatial set for all clips")
        if train == "all" and paths.mode != "single":
            raise ValueError("model.train: all trains appearance and motion together; set model.paths.mode: single")
        self.paths, self.clips, self.what = paths, clips, train
        self.preview: ClipPreview = preview
        self.measures = measures
        vs.check_names({adaptation.name for adaptation in self.adaptations}, paths, train)
        if clips > 1:
            self.adaptations, self.rates = vs.one_per_clip(self.adaptations, self.rates, clips)
        self._names = list(dict.fromkeys(adaptation.name for adaptation in self.adaptations))
        if unknown := set(strengths or {}) - set(self._names):
            raise ValueError(
                f"model.strengths: no set is called '{min(unknown)}'; there are {', '.join(self._names) or 'none'}"
            )
        self.strengths = dict(strengths or {})
        self._passes: list[Pass] = []
        self._asked = torch.zeros(())
        self._sets: Sets
        self._switch = 0.0

    # --- the model ---------------------------------------------------------------------
    def build(self) -> VideoModel:
        """The backbone's networks."""
        found: VideoModel = self.backbone.build()
        return found

    def thaw(self, model: nn.Module) -> None:
        """Let the layers over time train, or the whole network, where ``train`` says so.

        Raises:
            ValueError: No layer sees time alone.
        """
        network: Any = model
        if self.what == "temporal":
            found = [p for name, p in network.temporal_parameters() if not is_adapter_key(name)]
            if not found:
                raise ValueError(
                    f"model.train: temporal, but every layer of '{network.base}' sees space too; use adapters, or all"
                )
        else:
            named = network.network.named_parameters() if self.what == "all" else ()
            found = [p for name, p in named if not is_adapter_key(name)]
        for parameter in found:
            parameter.requires_grad_(True)
        trainable_in_fp32(model)

    def latents(self, batch: dict[str, Any]) -> Tensor:
        """The scaled latents of a batch (B, F, C, h, w): its own, or of its videos; pictures are clips of one frame."""
        if "latents" in batch:
            found = batch["latents"]
        else:
            found = self.encoded(batch["videos"] if "videos" in batch else batch["images"])
        return found if found.dim() == 5 else found[:, None]

    def encoded(self, samples: Tensor) -> Tensor:
        """Scaled latents (B, F, C, h, w) of videos in -1 … 1, (B, C, h, w) of pictures."""
        if samples.dim() == 4:
            return self.encoded(samples[:, None])[:, 0]
        return encode_videos(self.model, samples)

    def latent_settings(self) -> tuple[object, ...]:
        """Family and scaling of the latents."""
        config = self._diffusion.vae.config
        keys = ("shift_factor", "scaling_factor", "latents_mean", "latents_std")
        return self._diffusion.family, *(config.get(key) for key in keys)

    def predicted(self, noisy: Tensor, told: Tensor, text: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """The network's prediction (B, F, C, h, w)."""
        found: Tensor = self.model(noisy, told, text)
        return found

    def said(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoder makes of captions, (B, …) each."""
        return encode_prompts(self.model, captions)

    def unsaid(self) -> dict[str, Tensor]:
        """The condition (1, …) of "no prompt"."""
        return null_text(self.model)

    # --- training ----------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        """Sets rest in some steps, on some processes, where FSDP2 would wait for ever.

        Raises:
            ValueError: The clips of a batch have sets of their own, and the model is sharded.
        """
        allow_rest(self.trainer.strategy)
        if stage == "fit" and isinstance(self.trainer.strategy, ModelParallelStrategy) and self.clips > 1:
            raise ValueError("model.clips: a sharded model cannot train other sets on each process; use strategy: ddp")

    def on_train_start(self) -> None:
        """As every task; the sets are known from here on."""
        super().on_train_start()
        self._sets = Sets(self.model)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the losses of a step; ``backward`` gives each set the gradient of its own."""
        latents = self.latents(batch)
        # The same in all processes: FSDP2 waits until each has the gradients of the same tensors.
        chance = torch.Generator().manual_seed(mixed_seed(self.seed, self.current_epoch, batch_idx))
        skipped = bool(torch.rand((), generator=chance) < self.paths.skip)
        self._passes = list(self._losses(batch, latents, self.generator(batch_idx), skipped))
        learning = frozenset[str]().union(*(one.learning for one in self._passes))
        with self._sets.only(self._sets.names, learning):
            self._asked = penalty(self.model)
        for kind in dict.fromkeys(one.kind for one in self._passes):
            value = torch.stack([one.loss.detach() for one in self._passes if one.kind == kind]).sum()
            self.log(f"train/{kind}", value, batch_size=len(latents))
        total = torch.stack([one.loss for one in self._passes]).sum() + self._asked.detach()
        self.report("train", total, None, latents)
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The gradients of all losses of a step, each with its own sets; the optimiser steps after the last."""
        vp.backward(loss, self._passes, self._sets, self._asked)
        self._passes = []

    def _losses(
        self, batch: dict[str, Any], latents: Tensor, generator: torch.Generator, skipped: bool = False
    ) -> Iterator[Pass]:
        """The passes of a step, for each spatial set those of its clips; in some steps the spatial sets rest."""
        drawn, keep = self.draw(latents, generator)
        count, frames = latents.shape[:2]
        frame, anchor = torch.randint(frames, (2, count), generator=generator)
        skipped = skipped and frames > 1
        everything, mode = Step(batch, latents, drawn, keep, frame, anchor), self._mode
        if mode == "sequential":
            mode = "spatial" if self.global_step < self._switch else "second"
        for own, rows in vs.sources(batch.get("clip"), count, self._sets.names, self.clips):
            step = everything.rows(rows)
            for kind, acting, learning in vp.plan(mode, own, self._sets.names, frames, skipped):
                with self._sets.only(acting, learning):
                    losses = self._of_frames(step) if kind == "appearance" else self._of_clips(step)
                yield Pass(losses.sum() / count, acting, learning, kind)

    def _of_frames(self, step: Step) -> Tensor:
        """Losses (B,) of the drawn frame of each clip."""
        batch = {"captions": step.batch.get("frame_captions", step.batch["captions"])}
        text = step.batch.get("frame_text") if "frame_captions" in step.batch else step.batch.get("text")
        said = self.conditions(batch if text is None else batch | {"text": text}, step.keep)
        times, one = step.drawn.times, partial(vd.frames_of, index=step.frame)
        drawn = Drawn(times, one(step.drawn.noise), one(step.drawn.entering))
        error = self.error(batch, one(step.latents), drawn, said)
        return self.weighted(per_sample(self.pointwise(error, times)), times)

    def _of_clips(self, step: Step) -> Tensor:
        """Losses (B,) of whole clips."""
        error = self.error(step.batch, step.latents, step.drawn, self.conditions(step.batch, step.keep))
        pointwise, beta = partial(self.pointwise, times=step.drawn.times), self.paths.debias
        losses = per_sample(pointwise(error)) if beta is None else vd.temporal(error, step.anchor, beta, pointwise)
        return self.weighted(losses, step.drawn.times)

    @property
    def _mode(self) -> str:
        return self.paths.mode or ("dual" if self._diffusion.split == "modules" else "sequential")

    # --- the optimiser -----------------------------------------------------------------
    def groups(self, lr: float, decay: float) -> list[dict[str, Any]]:
        """Groups of one set each: a set that rests in a step must not be counted as stepped."""
        return vp.one_set_each(self.model, super().groups(lr, decay))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """As every task; a sequence of two needs to know where its middle is."""
        if self._mode == "sequential":
            total = total_steps(self.trainer)
            if total is None:
                raise ValueError("model.paths.mode: sequential needs an end: set trainer.max_epochs or max_steps")
            self._switch = self.paths.appearance * total
        return super().configure_optimizers()

    def configure_callbacks(self) -> list[L.Callback]:
        """What every run needs; sets that rest in the first step are no mistake."""
        found = super().configure_callbacks()
        both = self.paths.mode in (None, "sequential")
        for callback in found:
            if isinstance(callback, CheckReached):
                callback.unused = tuple(name for name in self._names if both or vs.is_spatial(name))
        return found

    # --- evaluation --------------------------------------------------------------------
    def used(self, name: str) -> float:
        """How far a set acts in validation and rendering."""
        rests = vs.is_spatial(name) and self.paths.mode in (None, "dual", "sequential")
        return self.strengths.get(name, 0.0 if rests else 1.0)

    def use(self) -> None:
        """Let the sets of the model act as in validation; ``predict`` begins with it."""
        strength(self.model, **{adapter.name: self.used(adapter.name) for adapter in adapters(self.model).values()})

    def variants(self) -> dict[str, dict[str, float]]:
        """Strengths, by a title, that a run shows beside those of inference: the appearance that rests there."""
        resting = [name for name in self._names if vs.is_spatial(name) and not self.used(name)]
        if not resting:
            return {}
        strengths = {name: self.used(name) for name in self._names} | {resting[0]: 1.0}
        return {"with appearance" + (" of clip 0" if len(resting) > 1 else ""): strengths}

    def on_predict_model_eval(self) -> None:
        """Evaluation mode, and the strengths of inference."""
        super().on_predict_model_eval()
        self.use()

    @torch.no_grad()
    def fixed_losses(self, batch: dict[str, Any], index: Tensor) -> Tensor:
        """Mean squares (B,) of clips at their fixed times, with the strengths of inference; see ``DiffusionTask``."""
        with strength(self.model):
            self.use()
            return super().fixed_losses(batch, index)

    def on_validation_epoch_end(self) -> None:
        """Report what ``measures`` asks for, unless this is the validation of a fit."""
        with strength(self.model):
            self.use()
            report(self)

    on_test_epoch_end = on_validation_epoch_end

    def measuring(self, data: Any) -> ClipMeasuring:
        """What computes the figures that ``measures`` asks for."""
        return ClipMeasuring(self, data)

    def render(self, prompts: Sequence[str], seeds: Sequence[int], chunk: int = 4) -> Tensor:
        """Videos (B, F, 3, H, W) in 0 … 1 as ``preview`` says, one of each prompt with the seed beside it."""
        how = self.preview
        return render(
            self._diffusion, prompts, seeds, how.frames, how.steps, how.guidance, how.size,
            share=how.share, negative=how.negative, chunk=chunk, **beginning(self._diffusion, how),
        )  # fmt: skip
