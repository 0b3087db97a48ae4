"""Random video pipelines of every family, small enough to be built, saved and run within a test."""

from __future__ import annotations

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


_FAMILIES = {"animatediff": _animatediff}


@cache
def video_base(family: str = "animatediff", **scheduler: Any) -> str:
    """Folder of a random pipeline of a family, made once in a process: clips of 32x32, latents of 8x8."""
    folder = Path(mkdtemp(prefix=f"tiny_{family}_"))
    _FAMILIES[family](folder, **scheduler)
    return str(folder)
