"""Clips as files: animated WebP and GIF, which Pillow writes, and MP4 where PyAV is installed."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visadapt.core.files import replacing

DESCRIPTION = 0x010E  # EXIF's ImageDescription


def save_webp(frames: Sequence[Image.Image], path: Path, fps: float, told: str = "") -> None:
    """Write an endless animation under a temporary name, then rename it.

    Args:
        frames: At least one, of one size.
        path: A .webp file.
        fps: Frames per second.
        told: Text that the file carries as EXIF's description.
    """
    exif = Image.Exif()
    if told:
        exif[DESCRIPTION] = told
    with replacing(path) as temporary:
        frames[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 / fps),
            loop=0,
            exif=exif,
            quality=90,
            allow_mixed=True,  # flat drawings are smaller, and exact, without loss
        )


def save_gif(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Write an endless GIF under a temporary name, then rename it; each frame has 256 colours of its own.

    Args:
        frames: At least one, of one size.
        path: A .gif file.
        fps: Frames per second; the format counts hundredths of a second.
    """
    few = [frame.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE) for frame in frames]
    duration = max(20, round(100 / fps) * 10)  # browsers slow down what is shorter
    with replacing(path) as temporary:
        few[0].save(
            temporary, format="GIF", save_all=True, append_images=few[1:], duration=duration, loop=0, optimize=False
        )


def save_mp4(frames: Sequence[Image.Image], path: Path, fps: float) -> bool:
    """Write an MP4 that browsers play, whole or not at all; False where PyAV is missing.

    Args:
        frames: At least one, of one size; odd sides lose a row or column, which the format cannot hold.
        path: An .mp4 file.
        fps: Frames per second.
    """
    try:
        import av
    except ImportError:
        return False
    width, height = (side // 2 * 2 for side in frames[0].size)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with replacing(path) as temporary, av.open(str(temporary), mode="w", format="mp4") as file:
        stream: Any = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "18"} if codec == "libx264" else {"qscale": "3"}
        for frame in frames:
            pixels = np.ascontiguousarray(np.asarray(frame)[:height, :width])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return True
