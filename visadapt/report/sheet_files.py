"""What is written of a predicted sheet: the mask as PNG or GeoTIFF, and a small picture with the mask over it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image

from visadapt.core.files import replacing
from visadapt.data.geotiff import Georeference, rasterio
from visadapt.report import overlay

NO_DATA = 255  # label of pixels that the sheet has no data for
_STRIP = 64  # rows that are coloured at once


class Mask(Protocol):
    """A mask being written from top to bottom; it appears under its name when it is complete."""

    path: Path

    def write(self, top: int, labels: np.ndarray) -> None:
        """Add rows (rows, width) of bytes."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class PngMask:
    """A PNG with one byte per pixel and the class colours as its palette.

    Args:
        path: File to write.
        size: Width and height.
        names: Names of the classes.
    """

    def __init__(self, path: Path, size: tuple[int, int], names: Sequence[str]) -> None:
        self.path = path
        self._labels = np.zeros((size[1], size[0]), dtype=np.uint8)
        self._palette = overlay.palette(len(names))

    def write(self, top: int, labels: np.ndarray) -> None:
        """Keep rows (rows, width) of bytes."""
        self._labels[top : top + len(labels)] = labels

    def __enter__(self) -> PngMask:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            return
        image = Image.fromarray(self._labels)
        image.putpalette(self._palette.ravel().tolist())
        with replacing(self.path) as temporary:
            image.save(temporary, format="PNG")


class TiffMask:
    """A tiled, compressed TIFF of bytes with palette, class names and georeference, written row by row.

    Args:
        path: File to write.
        size: Width and height.
        names: Names of the classes; they go into the tag ``classes`` as JSON.
        place: Where the sheet lies, if it is known; the mask lies there too.
    """

    def __init__(self, path: Path, size: tuple[int, int], names: Sequence[str], place: Georeference | None) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._module = module = rasterio()
        where = {} if place is None else {"crs": place.crs, "transform": place.transform}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", module.errors.NotGeoreferencedWarning)
            self._file = module.open(
                self._temporary, "w", driver="GTiff", width=size[0], height=size[1], count=1, dtype="uint8",
                nodata=NO_DATA, compress="deflate", tiled=True, blockxsize=256, blockysize=256,
                BIGTIFF="IF_SAFER", **where,
            )  # fmt: skip
        colours = overlay.palette(len(names))
        self._file.write_colormap(1, {i: (*colour, 255) for i, colour in enumerate(colours.tolist())})
        self._file.update_tags(classes=json.dumps(list(names), ensure_ascii=False))

    def write(self, top: int, labels: np.ndarray) -> None:
        """Write rows (rows, width) of bytes."""
        window = self._module.windows.Window(0, top, labels.shape[1], len(labels))
        self._file.write(labels, 1, window=window)

    def __enter__(self) -> TiffMask:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if error is None:
            os.replace(self._temporary, self.path)
        else:
            self._temporary.unlink(missing_ok=True)


class Overlay:
    """The sheet with its classes in colour, reduced by averaging so that the longer side fits.

    Every pixel of the picture is the mean of f × f pixels that were coloured at full size: thin lines stay
    visible, if pale.

    Args:
        sheet: The picture, read again strip by strip.
        classes: Classes with the background.
        most: Longest side in pixels.
    """

    def __init__(self, sheet: Any, classes: int, most: int = 2048) -> None:
        self.sheet, self.classes = sheet, classes
        width, height = sheet.size
        self.factor = -(-max(width, height) // most)
        self._sums = np.zeros((-(-height // self.factor), -(-width // self.factor), 3), dtype=np.float32)
        self._columns = np.arange(0, width, self.factor)

    def add(self, top: int, labels: np.ndarray) -> None:
        """Colour rows (rows, width)."""
        for first in range(0, len(labels), _STRIP):
            part = labels[first : first + _STRIP]
            start = top + first
            coloured = overlay.blended(self.sheet.read(0, start, part.shape[1], len(part)), part, self.classes)
            across = np.add.reduceat(coloured, self._columns, axis=1, dtype=np.float32)
            np.add.at(self._sums, (start + np.arange(len(part))) // self.factor, across)

    def save(self, path: Path) -> None:
        """Write a PNG."""
        width, height = self.sheet.size
        pixels = [np.add.reduceat(np.ones(n), np.arange(0, n, self.factor)) for n in (height, width)]
        mean = self._sums / (pixels[0][:, None, None] * pixels[1][None, :, None])
        with replacing(path) as temporary:
            Image.fromarray(mean.round().clip(0, 255).astype(np.uint8)).save(temporary, format="PNG")
