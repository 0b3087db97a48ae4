"""Rendered pictures that say how they were made: as JSON, and in the words of Stable Diffusion's web interfaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from visadapt.core.files import replacing


def save_png(pixels: np.ndarray, path: Path, how: dict[str, Any]) -> None:
    """Write bytes (H, W, 3) under a temporary name, then rename it.

    Args:
        pixels: The picture.
        path: A .png file.
        how: What it depends on: ``prompt``, ``negative``, ``steps``, ``sampler``, ``guidance``, ``seed``, ``base``.
    """
    info = PngInfo()
    info.add_text("parameters", _parameters(how, pixels.shape[1], pixels.shape[0]))
    info.add_text("visadapt", json.dumps(how, ensure_ascii=False))
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)


def _parameters(how: dict[str, Any], width: int, height: int) -> str:
    negative = f"Negative prompt: {how['negative']}\n" if how["negative"] else ""
    return (
        f"{how['prompt']}\n{negative}Steps: {how['steps']}, Sampler: {how['sampler']}, CFG scale: {how['guidance']:g}, "
        f"Seed: {how['seed']}, Size: {width}x{height}, Model: {Path(how['base']).name}"
    )
