"""What rendered clips start from besides fresh noise: a picture, or the noise of a reference clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from visadapt.backbones.stable_diffusion import to_signed
from visadapt.backbones.video_inversion import invert
from visadapt.backbones.video_latents import encode_videos
from visadapt.backbones.video_text import null_text
from visadapt.core.model import strength
from visadapt.data.images import read_rgb
from visadapt.data.video_files import look
from visadapt.tasks.diffusion_options import ClipPreview


def beginning(model: Any, how: ClipPreview) -> dict[str, Tensor]:
    """What ``video_render.render`` takes as ``image`` or ``noise``; nothing where the preview names neither.

    A picture is cut in the middle to the size of the clips. Of a reference clip as many frames as wanted are taken,
    evenly; its noise is that of the base, for the empty caption (MotionDirector, arXiv 2310.08465, code).

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableImage: A file is broken.
        ValueError: The reference clip is too short.
    """
    height, width = _sides(model, how.size)
    if how.image is not None:
        picture = read_rgb(_found(how.image, "image"))
        return {"image": _signed([picture], (width, height)).to(model.device)}
    if how.clip is None:
        return {}
    frames, source = how.frames or model.frames, look(_found(how.clip, "clip"))
    if source.count < frames:
        raise ValueError(f"model.preview.clip: '{how.clip}' has {source.count} frames, {frames} are wanted")
    pictures = source.read(np.linspace(0, source.count - 1, frames).round().astype(int).tolist())
    latents = encode_videos(model, _signed(pictures, (width, height))[None].to(model.device))
    with strength(model, 0.0):
        return {"noise": invert(model, latents, null_text(model), how.steps)}


def _found(path: str, key: str) -> Path:
    if not Path(path).exists():
        raise FileNotFoundError(f"model.preview.{key}: there is no file '{path}'")
    return Path(path)


def _sides(model: Any, size: int | list[int] | None) -> tuple[int, int]:
    if size is None:
        found: tuple[int, int] = model.spec.stock_size(model)
        return found
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def _signed(pictures: list[Image.Image], size: tuple[int, int]) -> Tensor:
    """Pictures (N, 3, H, W) in -1 … 1, cut to width and height."""
    return torch.stack([to_signed(ImageOps.fit(picture, size)) for picture in pictures])
