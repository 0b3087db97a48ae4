"""Random video pipelines of every family, small enough to be built, saved and run within a test."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tests.tiny_diffusion import shake, tiny_pipeline

FRAMES = 4


def motion_adapter(channels: tuple[int, ...] = (32, 64), longest: int = 8) -> Any:
    """Motion modules that fit the UNet of `tiny_diffusion`."""
    from diffusers import MotionAdapter

    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = MotionAdapter(
            block_out_channels=channels,
            motion_layers_per_block=1,
            motion_num_attention_heads=4,
            motion_norm_num_groups=8,
            motion_max_seq_length=longest,
        )
    return shake(found, 9)


def _animatediff(folder: Path, **scheduler: Any) -> None:
    tiny_pipeline(folder, "sd", **scheduler)
    motion_adapter().save_pretrained(folder / "motion_adapter")


def _unet3d(folder: Path, **scheduler: Any) -> None:
    from diffusers import StableDiffusionPipeline, TextToVideoSDPipeline, UNet3DConditionModel

    parts = StableDiffusionPipeline.from_pretrained(tiny_pipeline(folder, "sd", **scheduler)).components
    with torch.random.fork_rng():
        torch.manual_seed(6)
        unet = UNet3DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    shutil.rmtree(folder)
    TextToVideoSDPipeline(unet=shake(unet, 7), **kept).save_pretrained(folder)


_FAMILIES = {"animatediff": _animatediff, "unet3d": _unet3d}


@cache
def video_base(family: str = "animatediff", **scheduler: Any) -> str:
    """Folder of a random pipeline of a family, made once in a process: clips of 32x32, latents of 8x8."""
    folder = Path(mkdtemp(prefix=f"tiny_{family}_"))
    _FAMILIES[family](folder, **scheduler)
    return str(folder)
