"""Pictures of a Stable Diffusion from prompts and seeds, the same ones whenever the weights are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from visadapt.backbones.sd_latents import decode_latents, reduction
from visadapt.backbones.sd_notices import without_notices
from visadapt.backbones.stable_diffusion import Diffusion, pipeline


@torch.no_grad()
def render(
    model: Diffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 20,
    guidance: float = 5.0,
    size: int | Sequence[int] | None = None,
    negative: str | None = None,
    chunk: int = 8,
) -> Tensor:
    """One picture for each prompt with the seed beside it.

    The stock pipeline samples the latents; each starts from its own CPU generator, so a picture depends neither on the
    device nor on what is rendered with it, and the global random state stays as it is.

    Args:
        model: What ``StableDiffusion.build`` made, adapted or not.
        prompts: B texts.
        seeds: B seeds.
        steps: Steps of the sampler.
        guidance: Scale of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); 1 is off.
        size: Side in pixels, or (height, width); None takes the base's own.
        negative: Negative prompt for all; None is the base's "no prompt".
        chunk: Pictures at a time.

    Returns:
        (B, 3, H, W) in 0 … 1, float32, on the CPU.

    Raises:
        ValueError: not one seed per prompt.
    """
    latents = render_latents(model, prompts, seeds, steps, guidance, size, negative, chunk)
    return torch.cat([decode_latents(model, part).cpu() for part in latents.split(chunk)])


@torch.no_grad()
def render_latents(
    model: Diffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: int | Sequence[int] | None = None,
    negative: str | None = None,
    chunk: int = 8,
) -> Tensor:
    """What ``render`` decodes: scaled latents (B, C, h, w) on the model's device; arguments and errors as there."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts with {len(seeds)} seeds: give each its own")
    height, width = _sides(model, size)
    stock = pipeline(model)
    found = []
    with _sliced(model), without_notices():
        for start in range(0, len(prompts), chunk):
            texts = list(prompts[start : start + chunk])
            made = stock(
                prompt=texts,
                negative_prompt=None if negative is None else [negative] * len(texts),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + chunk]],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                output_type="latent",
            )
            found.append(made.images)
    return torch.cat(found)


def _sides(model: Any, size: int | Sequence[int] | None) -> tuple[int, int]:
    if size is None:
        own = model.unet.config.sample_size
        size = tuple(reduction(model.vae) * side for side in ((own, own) if isinstance(own, int) else own))  # type: ignore[assignment]
    return (size, size) if isinstance(size, int) else (size[0], size[-1])  # type: ignore[index]


@contextmanager
def _sliced(model: Any) -> Iterator[None]:
    """Sliced attention where the model asks for it; training keeps its own attention."""
    before = model.unet.attn_processors
    if model.attention_slicing:
        model.unet.set_attention_slice("auto")
    try:
        yield
    finally:
        if model.attention_slicing:
            model.unet.set_attn_processor(before)
