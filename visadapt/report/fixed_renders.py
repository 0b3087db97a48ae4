"""Fixed renders of a diffusion model, pictures or videos, by which two models are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visadapt.backbones import sd_render, stable_diffusion, video_diffusion, video_render
from visadapt.backbones.sd_latents import decode_latents, reduction
from visadapt.backbones.stable_diffusion import Diffusion
from visadapt.backbones.video_diffusion import VideoModel
from visadapt.backbones.video_latents import decode_videos

MOST, FRAMES = 256, 9  # pixels of a side; frames of a clip, where the base takes so few


def stock(model: Diffusion | VideoModel) -> Any:
    """The stock pipeline made of the model's own modules."""
    return video_diffusion.pipeline(model) if isinstance(model, VideoModel) else stable_diffusion.pipeline(model)


def settings_of(model: Diffusion | VideoModel, prompts: Sequence[str], steps: int) -> dict[str, Any]:
    """What to render, one of each prompt with a seed of its own: arguments of ``rendered``, small and few frames."""
    found: dict[str, Any] = {"prompts": list(prompts), "seeds": list(range(len(prompts))), "steps": steps}
    found["guidance"] = 3.0
    if isinstance(model, VideoModel):
        sides = [min(MOST, side) for side in model.spec.stock_size(model)]
        return found | {"size": sides, "frames": model.spec.few_frames(model, FRAMES)}
    own = model.unet.config.sample_size
    return found | {"size": min(MOST, reduction(model.vae) * (own if isinstance(own, int) else min(own)))}


def rendered(model: Diffusion | VideoModel, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Final latents of the stock pipeline made of the model's own modules, and their pixels in 0 … 1, on the CPU."""
    if isinstance(model, VideoModel):
        latents = video_render.render_latents(model, **settings)
        return latents.float().cpu(), decode_videos(model, latents).float().cpu()
    latents = sd_render.render_latents(model, **settings)
    return latents.float().cpu(), decode_latents(model, latents).float().cpu()
