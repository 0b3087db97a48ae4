"""What a family of video networks has to say for itself, so that one backbone, one task and one renderer serve all."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visadapt.backbones.sd_latents import decode_latents, encode_images, reduction
from visadapt.backbones.sd_text import encode_prompts

_ATTENTION = r"(?:to_q|to_k|to_v|to_out\.0)"
_FEED_FORWARD = r"net\.(?:0\.proj|2)"
MOTION, PICTURE = "temporal", "spatial"


class Family(ABC):
    """A kind of video network: how it is loaded, called, sampled, and which of its layers see space and which time.

    Attributes:
        name: As users write it.
        pipelines: Class names in ``model_index.json`` that this family loads.
        network: The child of the model that predicts, "unet" or "transformer".
        entry: Its first layer, whose precision and device are those of its inputs.
        parts: Components of the pipeline that become children of the model.
        frames: Usual number of frames of a clip.
        fps: Frames per second that it was made for.
        split: "modules" if layers see either space or time, "sequential" if all see both, so that appearance and
            motion are told apart by what they are trained on, one after the other.
        spatial: Pattern of the blocks that look within a frame, or at everything.
        temporal: Pattern of those that look across frames; the same for "sequential".
        second: Whether the second attention of temporal blocks is one over time too.
        clip: Whether the text encoder is CLIP's.
        settings: Entries of the pipeline's configuration that its stock pipeline has to be made with again.
        exact_vae: Whether the VAE stays in float32 whatever the base's precision.
        frames_argument: What the stock pipeline calls the number of frames.
        prompts_at_once: Whether the stock pipeline treats each of several prompts as it treats one.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    network: ClassVar[str] = "unet"
    entry: ClassVar[str] = "conv_in"
    parts: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")
    frames: ClassVar[int] = 16
    fps: ClassVar[float] = 8.0
    split: ClassVar[str] = "modules"
    spatial: ClassVar[str]
    temporal: ClassVar[str]
    second: ClassVar[bool] = True
    clip: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ()
    exact_vae: ClassVar[bool] = False
    frames_argument: ClassVar[str] = "num_frames"
    prompts_at_once: ClassVar[bool] = True

    @abstractmethod
    def stock(self, parts: Mapping[str, Any]) -> Any:
        """The stock pipeline made of ``parts``: networks, tokenizer, scheduler and settings by their names there."""

    @abstractmethod
    def predict(self, network: Any, noisy: Tensor, times: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction (B, C, F, h, w) of noisy latents of that shape."""

    def load(self, place: str, motion_adapter: str | None, **options: Any) -> Any:
        """The stock pipeline from a folder or hub id.

        Raises:
            ValueError: A motion adapter where none can be, or what cannot be sampled from text alone.
        """
        from diffusers import DiffusionPipeline

        if motion_adapter is not None:
            raise ValueError(f"`motion_adapter` is for animatediff; {self.name} has its own layers over time")
        return DiffusionPipeline.from_pretrained(place, **options)

    def recompute(self, network: Any) -> None:
        """Turn gradient checkpointing on."""
        network.enable_gradient_checkpointing()  # non-reentrant: frozen inputs still give gradients

    def most_frames(self, network: Any) -> int | None:
        """Longest clip, in latent frames, that the network's positions allow; None for any."""
        return None

    def refused(self, model: Any, frames: int) -> str:
        """Why it renders no clips of so many frames; empty if it does."""
        limit = self.most_frames(getattr(model, self.network))
        if limit is None or self.latent_frames(model, frames) <= limit:
            return ""
        return f"'{model.base}' has positions for {limit}; take fewer"

    def few_frames(self, model: Any, most: int) -> int:
        """A number of frames that it renders, no more than ``most`` if it takes any such."""
        return min(most, model.frames, self.most_frames(getattr(model, self.network)) or most)

    def stock_size(self, model: Any) -> tuple[int, int]:
        """Height and width in pixels of the base's own clips."""
        own = getattr(model, self.network).config.sample_size
        height, width = (own, own) if isinstance(own, int) else own
        factor = self.reduction(model)
        return height * factor, width * factor

    def reduction(self, model: Any) -> int:
        """Pixels per latent position along a side."""
        return reduction(model.vae)

    def presets(self, model: nn.Module) -> dict[str, list[str]]:
        """Target presets of the network that match something.

        ``spatial`` and ``temporal`` are MotionDirector's (Zhao et al. 2023, arXiv 2310.08465, section 4.2 and
        appendix; code: github.com/showlab/MotionDirector): the self-attentions and feed-forwards of the blocks within
        frames, without the attention to the text; every attention and feed-forward of the blocks across frames.
        """
        root, second = self.network, "attn[12]" if self.second else "attn1"
        space, time = f"re:{root}\\.{self.spatial}\\.", f"re:{root}\\.{self.temporal}\\."
        found = {
            "spatial.attention": [f"{space}attn1\\.{_ATTENTION}"],
            "spatial.cross": [f"{space}attn2\\.{_ATTENTION}"],
            "spatial.ff": [f"{space}ffn?\\.{_FEED_FORWARD}"],
            "temporal.attention": [f"{time}{second}\\.{_ATTENTION}"],
            "temporal.ff": [f"{time}ffn?\\.{_FEED_FORWARD}"],
        } | self.more_presets()
        found |= {kind: found[f"{kind}.attention"] + found[f"{kind}.ff"] for kind in (PICTURE, MOTION)}
        layers = [name for name, module in model.named_modules() if isinstance(module, _LAYERS)]
        kept = {
            name: [p for p in patterns if any(re.fullmatch(p.removeprefix("re:"), layer) for layer in layers)]
            for name, patterns in found.items()
        }
        return {name: patterns for name, patterns in kept.items() if patterns}

    def more_presets(self) -> dict[str, list[str]]:
        """Presets that only this family has."""
        return {}

    def is_temporal(self, path: str) -> bool:
        """Whether the parameter or layer of that path, from the model's root, belongs to a part across frames."""
        return self.split == "modules" and re.match(rf"{self.network}\.{self.temporal_parts()}", path) is not None

    def sees_space(self, path: str) -> bool:
        """Whether the layer of that path is an attention within frames."""
        return re.fullmatch(rf"{self.network}\.{self.spatial}\.attn[12]", path) is not None

    def temporal_parts(self) -> str:
        """Pattern of the whole parts across frames, with their norms and projections."""
        return self.temporal

    def encode_text(self, model: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text conditions, (B, …) each; CLIP's, unless a family has another encoder."""
        return encode_prompts(model, prompts)

    def sampling(self, model: Any, prompts: list[str], negative: str | None) -> dict[str, Any]:
        """What the stock pipeline is told of the prompts."""
        return {"prompt": prompts, "negative_prompt": None if negative is None else [negative] * len(prompts)}

    def encode_videos(self, model: Any, videos: Tensor, chunk: int) -> Tensor:
        """Scaled latents (B, F, C, h, w) of videos (B, F, 3, H, W) in -1 … 1; picture by picture, unless overridden."""
        return encode_images(model, videos.flatten(0, 1), chunk).unflatten(0, videos.shape[:2])

    def decode_videos(self, model: Any, latents: Tensor, chunk: int) -> Tensor:
        """Videos (B, F, 3, H, W) in 0 … 1 of scaled latents; picture by picture, unless overridden."""
        return decode_latents(model, latents.flatten(0, 1), chunk).unflatten(0, latents.shape[:2])

    def latent_frames(self, model: Any, frames: int) -> int:
        """Latent frames of a clip of so many frames.

        Raises:
            ValueError: The VAE has no whole number of them.
        """
        return frames


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def per_frame(values: Tensor, frames: int) -> Tensor:
    """Each row as often as a clip has frames: (B, …) to (B · F, …)."""
    return torch.repeat_interleave(values, frames, dim=0)
