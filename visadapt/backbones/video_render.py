"""Videos of a text-to-video model from prompts and seeds, the same ones whenever the weights are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from visadapt.backbones.sd_notices import without_notices
from visadapt.backbones.video_diffusion import VideoModel, pipeline
from visadapt.backbones.video_inversion import invert, mixed_noise
from visadapt.backbones.video_latents import decode_videos, encode_videos
from visadapt.backbones.video_text import encode_prompts


@torch.no_grad()
def render(
    model: VideoModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    frames: int | None = None,
    steps: int = 20,
    guidance: float = 5.0,
    size: int | Sequence[int] | None = None,
    noise: Tensor | None = None,
    image: Tensor | None = None,
    share: float | None = None,
    negative: str | None = None,
    chunk: int = 4,
) -> Tensor:
    """One clip for each prompt with the seed beside it.

    The stock pipeline samples the latents. Each clip starts from its own CPU generator, so it depends neither on the
    device nor on what is rendered with it, and the global random state stays as it is.

    Args:
        model: What ``VideoDiffusion.build`` made, adapted or not.
        prompts: B texts.
        seeds: B seeds.
        frames: Frames of a clip; None takes the model's usual number.
        steps: Steps of the sampler.
        guidance: Scale of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); 1 is off.
        size: Side in pixels, or (height, width); None takes the base's own.
        noise: Noise to start from (B or 1, F', C, h, w), such as a reference clip's from ``video_inversion.invert``.
        image: Pictures (B or 1, 3, H, W) in -1 … 1 to start from: their latents are inverted with their prompts, and
            every frame starts from that noise.
        share: How much of the starting noise is that of ``noise`` or ``image``, see ``mixed_noise``; the rest is
            the seed's own. None or 1 take nothing else: for ``image`` the frames then start alike.
        negative: Negative prompt for all; None is the base's "no prompt".
        chunk: Clips at a time.

    Returns:
        (B, F, 3, H, W) in 0 … 1, float32, on the CPU.

    Raises:
        ValueError: Not one seed per prompt, a number of frames that the base does not take, both noise and image, or
            noise and image of another shape.
    """
    start = {"noise": noise, "image": image, "share": share}
    latents = render_latents(model, prompts, seeds, frames, steps, guidance, size, negative, chunk, **start)
    return torch.cat([decode_videos(model, part).cpu() for part in latents.split(chunk)])


@torch.no_grad()
def render_latents(
    model: VideoModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    frames: int | None,
    steps: int,
    guidance: float,
    size: int | Sequence[int] | None = None,
    negative: str | None = None,
    chunk: int = 4,
    **start: Any,
) -> Tensor:
    """What ``render`` decodes: scaled latents (B, F', C, h, w); arguments and errors as there."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts with {len(seeds)} seeds: give each its own")
    height, width = _sides(model, size)
    frames = frames or model.frames
    if why := model.spec.refused(model, frames):
        raise ValueError(f"model.preview.frames: {frames}, but {why}")
    chunk = chunk if model.spec.prompts_at_once else 1
    stock, found = pipeline(model), []
    with _sliced(model), without_notices():
        for first in range(0, len(prompts), chunk):
            rows = slice(first, first + chunk)
            texts = list(prompts[rows])
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
            fresh = torch.cat([_fresh(model, frames, height, width, one) for one in generators])
            own = {key: value if value is None or key == "share" else value[rows] if len(value) > 1 else value
                   for key, value in start.items()}  # fmt: skip
            begun = _begin(model, fresh, texts, steps, **own)
            made = stock(
                **model.spec.sampling(model, texts, negative),
                **{model.spec.frames_argument: frames},
                generator=generators,
                latents=begun.transpose(1, 2).to(model.network_dtype),
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                output_type="latent",
            )
            found.append(made.frames.transpose(1, 2))
    return torch.cat(found)


def _fresh(model: VideoModel, frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Noise (1, F', C, h, w), drawn in the order in which the stock pipelines draw theirs."""
    factor = model.spec.reduction(model)
    shape = (
        1,
        model.network.config.in_channels,
        model.spec.latent_frames(model, frames),
        height // factor,
        width // factor,
    )
    return torch.randn(shape, generator=generator).transpose(1, 2).to(model.device)


def _begin(
    model: VideoModel,
    fresh: Tensor,
    texts: list[str],
    steps: int,
    noise: Tensor | None = None,
    image: Tensor | None = None,
    share: float | None = None,
) -> Tensor:
    """The noise that sampling starts from."""
    if noise is not None and image is not None:
        raise ValueError("noise and image: each says where the frames start; give one of them")
    prior = noise
    if image is not None:
        pictures = image.expand(len(fresh), -1, -1, -1)[:, None].to(fresh)
        prior = invert(model, encode_videos(model, pictures), encode_prompts(model, texts), steps)
        prior = prior.expand(-1, fresh.shape[1], -1, -1, -1)
    if prior is None:
        return fresh
    if prior.shape[1:] != fresh.shape[1:] or len(prior) not in (1, len(fresh)):
        raise ValueError(
            f"noise or image gives latents {tuple(prior.shape)}, the clips have {tuple(fresh.shape)}; "
            "set frames and size to theirs"
        )
    return mixed_noise(prior.to(fresh).expand_as(fresh), fresh, 1.0 if share is None else share)


def _sides(model: VideoModel, size: int | Sequence[int] | None) -> tuple[int, int]:
    if size is None:
        return model.spec.stock_size(model)
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


@contextmanager
def _sliced(model: VideoModel) -> Iterator[None]:
    """Attention within frames in slices of half the heads, where the model asks for it; training keeps its own.

    Attention over a few frames at each place is small already, and slicing it would take thousands of passes.
    """
    layers = model.sliceable() if model.attention_slicing else []
    before = [layer.processor for layer in layers]
    for layer in layers:
        layer.set_attention_slice(max(1, layer.heads // 2))
    try:
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)
