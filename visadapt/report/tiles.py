"""Images in rows under short texts, drawn with Pillow: a hundred times as fast as a hundred matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visadapt.core.files import replacing

GOOD, BAD, INK, GREY = "#1a7f37", "#b3261e", "#24292f", "#6e7781"
SIDE, GAP = 128, 12  # pixels of a picture, and between pictures


@dataclass(frozen=True)
class Tile:
    """One image with a line above it and a line below.

    Args:
        image: Bytes (height, width, 3).
        title: Line above.
        note: Line below.
        colour: Colour of the title and of the frame.
    """

    image: np.ndarray
    title: str
    note: str = ""
    colour: str = INK


def sheet(
    tiles: Sequence[Tile],
    heading: str,
    columns: int = 8,
    side: int = SIDE,
    legend: Sequence[tuple[tuple[int, int, int], str]] = (),
) -> Image.Image:
    """The tiles in rows under a heading.

    Args:
        tiles: At least one.
        heading: Line on top.
        columns: Tiles per row, fewer if there are fewer tiles.
        side: Pixels of a picture's longer side.
        legend: Colours and what they mean, in a line at the bottom.
    """
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    cell = (side + GAP, side + 40 + GAP)
    widths = [round(font(13).getlength(text)) + 42 for _, text in legend]  # a square of 14, gaps of 6 and 22
    texts = max(round(font(15).getlength(heading)), sum(widths))
    width = max(columns * cell[0] + GAP, texts + 2 * GAP)
    picture = Image.new("RGB", (width, rows * cell[1] + 34 + GAP + (28 if legend else 0)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((width / 2, 10), heading, INK, font(15), anchor="ma")
    left = (width - columns * cell[0] + GAP) // 2
    for i, tile in enumerate(tiles):
        _place(picture, draw, tile, (left + (i % columns) * cell[0], 38 + (i // columns) * cell[1]), side)
    x, y = (width - sum(widths)) // 2, picture.height - 30
    for (colour, text), step in zip(legend, widths, strict=True):
        draw.rectangle((x, y, x + 14, y + 14), fill=colour)
        draw.text((x + 20, y + 7), text, INK, font(13), anchor="lm")
        x += step
    return picture


def _place(picture: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, at: tuple[int, int], side: int) -> None:
    x, y = at
    room = side + GAP - 2
    draw.text((x + side / 2, y), fitted(tile.title, 13, room), tile.colour, font(13), anchor="ma")
    small = scaled(tile.image, side)
    corner = (x + (side - small.width) // 2, y + 20 + (side - small.height) // 2)
    picture.paste(small, corner)
    end = (corner[0] + small.width, corner[1] + small.height)
    draw.rectangle((corner[0] - 2, corner[1] - 2, end[0] + 1, end[1] + 1), outline=tile.colour, width=2)
    draw.text((x + side / 2, y + side + 24), fitted(tile.note, 11, room), GREY, font(11), anchor="ma")


def scaled(array: np.ndarray, side: int) -> Image.Image:
    """The image as large as a tile allows; small ones keep their pixels visible."""
    image = Image.fromarray(array)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


@cache
def font(size: int) -> Any:
    """DejaVu Sans, which matplotlib brings along and which has arrows and Greek letters."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def fitted(text: str, size: int, width: int = SIDE + GAP - 2) -> str:
    """The text, with its middle left out where it is wider than a tile."""
    if font(size).getlength(text) <= width:
        return text
    for keep in range(len(text), 1, -1):
        head = math.ceil(keep / 2)
        short = f"{text[:head]}…{text[len(text) - (keep - head) :]}"
        if font(size).getlength(short) <= width:
            return short
    return "…"


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name, then rename it."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def prediction_grid(
    images: Sequence[np.ndarray],
    truth: Sequence[str],
    after: Sequence[str],
    before: Sequence[str] | None = None,
) -> Image.Image:
    """Images with the true class and what was predicted, before → after; green is right, red is wrong.

    Args:
        images: Bytes (height, width, 3) each.
        truth: Name of the true class of each image.
        after: Prediction of each image.
        before: Prediction before adaptation, if known.
    """
    tiles = []
    for i, image in enumerate(images):
        was = f"{before[i]} → " if before is not None else ""
        right = after[i] == truth[i]
        tiles.append(Tile(image, f"{was}{after[i]}", f"true: {truth[i]}", GOOD if right else BAD))
    what = "predicted before → after adaptation" if before is not None else "predicted"
    return sheet(tiles, f"{what}  (green: right, red: wrong)")
