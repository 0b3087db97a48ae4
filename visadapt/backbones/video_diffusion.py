"""Text-to-video diffusion as a backbone: diffusers' own modules under fixed names, whatever the family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visadapt.backbones.base import Backbone
from visadapt.backbones.precision import at_least_float32
from visadapt.backbones.sd_layout import TINY, text_presets, weights_place
from visadapt.backbones.sd_lean import lean_unet
from visadapt.backbones.sd_notices import no_progress_bars
from visadapt.backbones.sd_schedule import Prediction, schedulers
from visadapt.backbones.sd_text import recompute_text
from visadapt.backbones.stable_diffusion import MISSING, to_signed
from visadapt.backbones.video_animatediff import TINY_MOTION
from visadapt.backbones.video_families import family_named, family_of
from visadapt.backbones.video_family import Family

TINY_VIDEO = "tiny_video"


class VideoModel(nn.Module):
    """The networks of a video pipeline as children: ``unet`` or ``transformer``, ``vae`` and ``text_encoder``.

    Attributes:
        spec: The family; ``family`` is its name.
        tokenizer: Of the text encoder; ``tokenizer_2`` is None.
        scheduler: The noise schedule that training follows (its ``alphas_cumprod``, number of steps).
        sampler: The scheduler of inference, with the same noise schedule and prediction.
        prediction: What the network predicts: "epsilon", "v_prediction" or "flow".
        layout: "sd", for what this model shares with the text-to-image backbone.
        base: Name of the base.
        frames: Usual number of frames of a clip; ``fps`` is their rate per second.
        settings: What else the stock pipeline is made with.
        split: "modules" where layers see either space or time, "sequential" where every layer sees both.
        zeros_for_empty: Whether "no prompt" is zeros rather than the empty caption; never here.
        attention_slicing: Whether videos are rendered with sliced attention within frames.
        adapter_presets: Target preset → patterns: ``spatial``, ``temporal`` and finer ones.
    """

    vae: Any
    text_encoder: Any

    def __init__(
        self, pipeline: Any, family: Family, base: str, prediction: Prediction | None = None, zero_snr: bool = False
    ) -> None:
        super().__init__()
        self.spec, self.family, self.base = family, family.name, base
        for part in family.parts:
            self.add_module(part, getattr(pipeline, part))
        self.tokenizer, self.tokenizer_2 = pipeline.tokenizer, None
        self.scheduler, self.sampler, self.prediction = schedulers(pipeline.scheduler, prediction, zero_snr)
        self.settings = {name: pipeline.config[name] for name in family.settings}
        self.layout: Literal["sd"] = "sd"
        self.split = family.split
        self.zeros_for_empty = self.attention_slicing = False
        limit = family.most_frames(self.network)
        self.frames, self.fps = family.frames if limit is None else min(family.frames, limit), family.fps
        self.adapter_presets = family.presets(self) | (text_presets(self) if family.clip else {})

    @property
    def network(self) -> Any:
        """The part that predicts: ``unet`` or ``transformer``."""
        return getattr(self, self.spec.network)

    @property
    def network_dtype(self) -> torch.dtype:
        """Precision of the network's inputs."""
        found: torch.dtype = self.network.get_submodule(self.spec.entry).weight.dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        found: torch.device = self.network.get_submodule(self.spec.entry).weight.device
        return found

    def forward(self, noisy: Tensor, times: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction (B, F, C, h, w), in at least float32.

        Args:
            noisy: Noisy latents (B, F, C, h, w); F = 1 are pictures.
            times: What the network is told of the time (B,): the step 0 … T−1, for flow matching u · T.
            text: What ``video_text.encode_prompts`` gives.

        Raises:
            ValueError: More frames than the network has positions for.
        """
        limit = self.spec.most_frames(self.network)
        if limit is not None and noisy.shape[1] > limit:
            raise ValueError(f"clips of {noisy.shape[1]} frames: '{self.base}' has positions for {limit}; take fewer")
        found = self.spec.predict(self.network, noisy.transpose(1, 2).to(self.network_dtype), times, text)
        return at_least_float32(found.transpose(1, 2))

    def sliceable(self) -> list[Any]:
        """The attentions within frames that can be computed in slices."""
        found = self.named_modules()
        return [m for name, m in found if hasattr(m, "sliceable_head_dim") and self.spec.sees_space(name)]

    def temporal_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the parts across frames, for training them as a whole; none for "sequential"."""
        return ((name, p) for name, p in self.named_parameters() if self.spec.is_temporal(name))


class VideoDiffusion(Backbone):
    """Text-to-video networks of diffusers; ``video_families`` has the table of what they are.

    Presets: ``spatial`` and ``temporal`` (MotionDirector's, see ``video_family.Family.presets``), finer ones
    ``spatial.attention``, ``spatial.cross``, ``spatial.ff``, ``temporal.attention``, ``temporal.ff`` and, where there
    are such layers, ``temporal.proj`` and ``temporal.convs``; ``text.attention``, ``text.mlp``, ``text`` of CLIP.

    Args:
        name: "tiny_video", the small base shipped with visadapt; a folder in diffusers' layout; a hub id.
        family: Name of the family; None reads it off ``model_index.json``.
        motion_adapter: For AnimateDiff on a Stable Diffusion: folder or hub id of the motion adapter; None takes the
            folder ``motion_adapter`` beside the other parts.
        revision: Branch, tag or commit of a hub id.
        variant: Which weights of a folder or hub id, such as "fp16".
        base_dtype: Precision of the frozen networks; adapters and what trains are float32.
        grad_checkpointing: Recompute the layers' activations in backward: less memory, more time.
        channels_last: Keep the weights of 2-D convolutions channels last, which GPUs compute faster with bf16.
        attention_slicing: Render videos with the attention within frames in slices: less memory, slower.
        prediction: What the network predicts; None takes what the base's scheduler says.
        zero_snr: Rescale the noise schedule to zero terminal SNR (Lin et al. 2023, arXiv 2305.08891); needs
            "v_prediction".
        lean: Make norms, activations and the inputs of adapted layers again in backward where that costs little,
            instead of keeping them; outputs and gradients stay the same.
        frames: Usual number of frames; None takes the base's.
        fps: Their rate per second; None takes the base's.
    """

    def __init__(
        self,
        name: str = TINY_VIDEO,
        family: str | None = None,
        motion_adapter: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        base_dtype: Literal["float32", "bfloat16"] = "float32",
        grad_checkpointing: bool = False,
        channels_last: bool = False,
        attention_slicing: bool = False,
        prediction: Prediction | None = None,
        zero_snr: bool = False,
        lean: bool = True,
        frames: int | None = None,
        fps: float | None = None,
    ) -> None:
        self.name, self.family, self.motion_adapter = name, family, motion_adapter
        self.revision, self.variant = revision, variant
        self.base_dtype = base_dtype
        self.grad_checkpointing, self.channels_last = grad_checkpointing, channels_last
        self.attention_slicing = attention_slicing
        self.prediction: Prediction | None = prediction
        self.zero_snr, self.lean = zero_snr, lean
        self.frames, self.fps = frames, fps

    def build(self, num_classes: int | None = None, class_names: Sequence[str] | None = None) -> VideoModel:
        """Load the pipeline and take its networks; there are no classes, so the arguments change nothing.

        Raises:
            ValueError: Not loadable, a pipeline of another kind, or options that contradict each other.
            FileNotFoundError: The folder does not exist.
            ImportError: diffusers or transformers is missing.
        """
        pipeline, family = self._load()
        model = VideoModel(pipeline, family, self.name, self.prediction, self.zero_snr)
        dtype = getattr(torch, self.base_dtype)
        for part in model.children():
            _cast(part, torch.float32 if part is model.vae and family.exact_vae else dtype)
        if self.channels_last:
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.lean:
            lean_unet(model.network)
        if self.grad_checkpointing:
            family.recompute(model.network)
            recompute_text(model.text_encoder)
        model.attention_slicing = self.attention_slicing
        if self.attention_slicing and not model.sliceable():
            raise ValueError(
                f"backbone attention_slicing: the attentions of {family.name} have no slices; leave it out"
            )
        model.frames, model.fps = self.frames or model.frames, self.fps or model.fps
        return model

    def hparams(self) -> dict[str, Any]:
        """The constructor's arguments, which a checkpoint keeps to build the same again."""
        return dict(vars(self))

    def preprocess(self, train: bool) -> Callable[[Any], Tensor]:
        """Give the conversion of one frame, a PIL image, to (3, H, W) in -1 … 1."""
        return to_signed

    def _load(self) -> tuple[Any, Family]:
        name, motion = self.name, self.motion_adapter
        if name == TINY_VIDEO:
            name, motion = TINY, motion or str(TINY_MOTION)
            if not (TINY_MOTION / "config.json").is_file() and self.motion_adapter is None:
                raise FileNotFoundError(
                    f"the weights of {TINY_VIDEO} are missing from this installation ('{TINY_MOTION.name}/'); "
                    "reinstall visadapt, or name another base"
                )
        place, single = weights_place(name)
        if single:
            raise ValueError(f"backbone name: '{name}' is one file; VideoDiffusion takes folders and hub ids")
        try:
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise ImportError(f"{MISSING} ({error})") from error
        try:
            with no_progress_bars():
                kind = DiffusionPipeline.load_config(place, revision=self.revision).get("_class_name")
                family = family_of(kind, name) if self.family is None else family_named(self.family)
                return family.load(place, motion, revision=self.revision, variant=self.variant), family
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"backbone name: '{self.name}' cannot be loaded: {reason}") from error


def _cast(part: nn.Module, dtype: torch.dtype) -> None:
    """Convert a part, but for the modules that its class wants in float32 (Wan's norms and time embedding)."""
    kept = getattr(part, "_keep_in_fp32_modules", None) or () if "diffusers" in type(part).__module__ else ()
    for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)


def pipeline(model: VideoModel) -> Any:
    """The stock pipeline made of these very modules: what acts in them, acts in it.

    Returns:
        The pipeline class of the family, with a fresh sampler.
    """
    parts = {part: getattr(model, part) for part in model.spec.parts}
    parts |= {"tokenizer": model.tokenizer, "scheduler": type(model.sampler).from_config(model.sampler.config)}
    made = model.spec.stock(parts | model.settings)
    made.set_progress_bar_config(disable=True)
    return made
