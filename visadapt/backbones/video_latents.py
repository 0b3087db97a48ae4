"""Videos ↔ scaled latents, a few frames at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode_videos(model: Any, videos: Tensor, chunk: int = 8) -> Tensor:
    """Scaled latents of clips, with the posterior's mean: they are the same cached or not.

    Args:
        model: What ``VideoDiffusion.build`` made.
        videos: (B, F, 3, H, W) in -1 … 1; H and W are multiples of the VAE's reduction.
        chunk: Frames, or for a VAE over time clips, at a time.

    Returns:
        (B, F', C, h, w) in at least float32; F' = F except where the VAE reduces time too.

    Raises:
        ValueError: Sides that the VAE cannot take, or not five dimensions.
    """
    if videos.dim() != 5:
        raise ValueError(f"videos of shape {tuple(videos.shape)}: (clips, frames, 3, height, width) is needed")
    found: Tensor = model.spec.encode_videos(model, videos, chunk)
    return found


@torch.no_grad()
def decode_videos(model: Any, latents: Tensor, chunk: int = 8) -> Tensor:
    """Videos (B, F, 3, H, W) in 0 … 1, float32, from scaled latents (B, F', C, h, w)."""
    found: Tensor = model.spec.decode_videos(model, latents, chunk)
    return found
