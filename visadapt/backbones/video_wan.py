"""Wan: a transformer of full attention over space and time, trained by flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visadapt.backbones.precision import at_least_float32
from visadapt.backbones.video_family import Family

_POSITIONS = 512  # of the stock pipeline


class Wan(Family):
    """Wan 2.1 and 2.2 with one network (Wan team 2025, arXiv 2503.20314): ``WanTransformer3DModel``.

    Every attention sees all places of all frames, so ``spatial`` and ``temporal`` name the same layers. Appearance and
    motion are told apart in sequence, as Set-and-Sequence does (Abdal et al. 2025, arXiv 2502.14844): a first set
    learns from single frames, which have no motion, and stays; a second one learns from clips what that leaves.

    Telling the heads that look within frames from those that look across them by their attention maps, and adapting
    each kind by itself (Follow-Your-Motion, arXiv 2506.05207), would be the closer equivalent; it is not implemented.
    """

    name = "wan"
    pipelines = ("WanPipeline",)
    network = "transformer"
    entry = "patch_embedding"
    parts = ("transformer", "vae", "text_encoder")
    frames = 81
    fps = 16.0
    split = "sequential"
    spatial = temporal = r"blocks\.\d+"
    second = clip = False
    exact_vae = True
    settings = ("expand_timesteps",)

    def load(self, place: str, motion_adapter: str | None, **options: Any) -> Any:
        """The pipeline, if it has one network."""
        found = super().load(place, motion_adapter, **options)
        if found.transformer is None or getattr(found, "transformer_2", None) is not None:
            raise ValueError("it has two networks, one for noisy and one for clean times; give a base with one")
        return found

    def stock(self, parts: Mapping[str, Any]) -> Any:
        """The ``WanPipeline`` of these parts."""
        from diffusers import WanPipeline

        return WanPipeline(**parts)

    def predict(self, network: Any, noisy: Tensor, times: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The prediction."""
        found: Tensor = network(noisy, times, text["embeddings"].to(noisy), return_dict=False)[0]
        return found

    def encode_text(self, model: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """UMT5's hidden states (B, 512, C), zeros behind the end of the prompt."""
        from visadapt.backbones.video_diffusion import pipeline

        stock = pipeline(model)
        states = stock.encode_prompt(list(prompts), None, False, max_sequence_length=_POSITIONS)[0]
        return {"embeddings": at_least_float32(states)}

    def encode_videos(self, model: Any, videos: Tensor, chunk: int) -> Tensor:
        """Normalised latents (B, F', C, h, w), F' = (F − 1) / 4 + 1."""
        self.latent_frames(model, videos.shape[1])
        dtype = model.vae.post_quant_conv.weight.dtype
        found = [model.vae.encode(clip.to(dtype)).latent_dist.mode() for clip in videos.transpose(1, 2).split(1)]
        mean, std = _statistics(model.vae, found[0])
        return (at_least_float32(torch.cat(found).transpose(1, 2)) - mean) / std

    def decode_videos(self, model: Any, latents: Tensor, chunk: int) -> Tensor:
        """Videos (B, F, 3, H, W) in 0 … 1."""
        mean, std = _statistics(model.vae, latents)
        dtype = model.vae.post_quant_conv.weight.dtype
        clips = (latents * std + mean).transpose(1, 2).to(dtype).split(1)
        found = torch.cat([model.vae.decode(clip).sample for clip in clips]).transpose(1, 2)
        return (found.float() / 2 + 0.5).clamp(0, 1)

    def latent_frames(self, model: Any, frames: int) -> int:
        """(F − 1) / 4 + 1: the first frame stands alone, the others go four by four."""
        if why := self.refused(model, frames):
            raise ValueError(f"clips of {frames} frames: {why}")
        return int((frames - 1) // model.vae.config.scale_factor_temporal + 1)

    def refused(self, model: Any, frames: int) -> str:
        """Its VAE takes one frame and then so many at a time; positions there are for any number."""
        step = model.vae.config.scale_factor_temporal
        return f"this VAE takes 1, {1 + step}, {1 + 2 * step}, … frames" if (frames - 1) % step else ""

    def few_frames(self, model: Any, most: int) -> int:
        """A number that its VAE takes."""
        step = model.vae.config.scale_factor_temporal
        return int((super().few_frames(model, most) - 1) // step * step + 1)

    def reduction(self, model: Any) -> int:
        """Pixels per latent position along a side."""
        return int(model.vae.config.scale_factor_spatial)

    def stock_size(self, model: Any) -> tuple[int, int]:
        """480 × 832 pixels, what the stock pipeline makes."""
        return 480, 832


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of its latents, for (B, F', C, h, w)."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(v, device=like.device, dtype=torch.float32).view(1, 1, -1, 1, 1) for v in values)
    return mean, std
