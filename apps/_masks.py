"""What the segmentation app computes: sheets without prompts, tile by tile, and clicks and boxes; no server needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from apps import _runs, _safety
from visadapt.cli.errors import UserError
from visadapt.data import geotiff
from visadapt.data.sheets import open_windows
from visadapt.report import overlay
from visadapt.report.polygons import write_polygons
from visadapt.report.sheet_files import Mask, PngMask, TiffMask
from visadapt.report.tiled import probability_rows, tiling

SCENES = (13, 4)  # numbers of the examples to click on
SEEN = 1024  # longest side of what the browser shows
Progress = Callable[[int, int], object]  # tiles done, tiles in all


@dataclass
class Found:
    """A mask and the picture that it lies over, reduced to what a browser shows.

    Args:
        picture: Bytes (h, w, 3).
        labels: Classes (h, w); a reduced pixel has the highest class below it, so that thin lines stay.
        names: Names of the classes.
        files: What can be downloaded.
        share: Share of the foreground of all pixels.
    """

    picture: np.ndarray
    labels: np.ndarray
    names: Sequence[str]
    files: list[Path]
    share: float

    def blended(self, opacity: float) -> np.ndarray:
        """The picture with the mask over it, bytes (h, w, 3)."""
        return overlay.blended(self.picture, self.labels, len(self.names), opacity)


def smaller(picture: np.ndarray, labels: np.ndarray, most: int = SEEN) -> tuple[np.ndarray, np.ndarray]:
    """Picture and labels with at most ``most`` pixels a side: means of the one, maxima of the other."""
    factor = -(-max(labels.shape) // most)
    if factor == 1:
        return picture, labels
    height, width = (n // factor * factor for n in labels.shape)
    blocks = labels[:height, :width].reshape(height // factor, factor, width // factor, factor)
    image = Image.fromarray(picture[:height, :width]).resize((width // factor, height // factor), Image.Resampling.BOX)
    return np.asarray(image), blocks.max((1, 3))


def written(path: Path, rows: Iterator[tuple[int, np.ndarray]], names: Sequence[str], folder: Path) -> Found:
    """A mask as files (a TIFF for a TIFF, else a PNG; GeoJSON where rasterio is there) and as it is shown.

    Args:
        path: The picture, already looked at.
        rows: First row and labels (rows, width), from top to bottom.
        names: Names of the classes, the background first.
        folder: Folder for the files.
    """
    tiff = path.suffix.lower() in geotiff.SUFFIXES
    with open_windows(path) as sheet:
        width, height = sheet.size
        labels = np.zeros((height, width), np.uint8)
        mask: Mask = (
            TiffMask(folder / f"{path.stem}_mask.tif", sheet.size, names, sheet.georeference)
            if tiff
            else PngMask(folder / f"{path.stem}_mask.png", sheet.size, names)
        )
        with mask:
            for top, part in rows:
                labels[top : top + len(part)] = part
                mask.write(top, part)
        picture, place = sheet.read(0, 0, width, height), sheet.georeference
    files = [mask.path]
    try:
        write_polygons(mask.path, folder / f"{path.stem}.geojson", names, place)
        files.append(folder / f"{path.stem}.geojson")
    except ImportError:  # polygons need rasterio; the mask does not
        pass
    return Found(*smaller(picture, labels), names, files, float((labels > 0).mean()))


class Automatic:
    """Masks without prompts, by the task of a run.

    Args:
        adapter: Adapter file in its run.
    """

    def __init__(self, adapter: Path) -> None:
        self.task, self.names = _runs.task(adapter)

    def rows(self, path: Path, scale: float, overlap: float, step: Progress) -> Iterator[tuple[int, np.ndarray]]:
        """Labels of a picture of any size from top to bottom, as `visadapt predict` finds them."""
        with open_windows(path) as sheet:
            tiles = tiling(self.task, sheet, overlap, scale)
            done = [0]

            def advance(count: int) -> None:
                done[0] += count
                step(done[0], len(tiles))

            for top, shares in probability_rows(self.task, sheet, tiles, 8, advance):
                yield top, shares.argmax(0).to(torch.uint8).numpy()

    def find(self, upload: str | None, scale: float, overlap: float, folder: Path, step: Progress) -> Found:
        """The mask of an upload.

        Raises:
            UserError: nothing was uploaded, or it is no picture.
        """
        path = uploaded(upload)
        return written(path, self.rows(path, scale, overlap, step), self.names, folder)


class Clicked:
    """One object by clicks and a box, with SAM's own predictor.

    Args:
        adapter: Adapter file on a SAM; None is the shipped base.

    Raises:
        UserError: segment_anything is not installed, or the file belongs to another network.
    """

    names = ("background", "object")

    def __init__(self, adapter: Path | None = None) -> None:
        try:
            from segment_anything import SamPredictor
        except ImportError:
            hint = "pip install -e '.[apps,sam]'"
            raise UserError("segment_anything", "this app needs the package segment-anything", hint) from None

        from visadapt.backbones.sam import SAM
        from visadapt.backbones.sam_export import load_adapter
        from visadapt.cli import files
        from visadapt.methods import METHODS  # noqa: F401 - a file names methods, their classes must be imported

        recipe: Any = files.base_recipe(adapter, None, _runs.base_of(adapter), None) if adapter else SAM()
        if not isinstance(recipe, SAM):
            raise UserError(str(adapter), f"this belongs to a {type(recipe).__name__}, not to a SAM")
        sam: Any = recipe.build()
        if adapter is not None:
            load_adapter(sam, adapter)
        self.base = recipe.name
        self.predictor = SamPredictor(sam.eval())
        self._seen = ""

    def mask(
        self, picture: np.ndarray, points: Sequence[tuple[int, int, int]], box: Sequence[int] | None
    ) -> np.ndarray:
        """The object in bytes (h, w) of 0 and 1.

        Args:
            picture: Bytes (h, w, 3).
            points: x, y and 1 (object) or 0 (background) of each click, in pixels.
            box: Left, top, right, bottom, in pixels.

        Raises:
            UserError: there is neither a click nor a box.
        """
        if not points and box is None:
            raise UserError("", "there is no click yet", "click on an object, or on two corners of a box around it")
        digest = hashlib.sha256(picture.tobytes() + str(picture.shape).encode()).hexdigest()
        if digest != self._seen:  # the encoder is the slow part; a further click needs it no more
            self.predictor.set_image(picture)
            self._seen = digest
        alone = box is None and len(points) == 1  # one click is ambiguous: SAM offers three masks and rates them
        given = np.array(points, dtype=np.float32).reshape(-1, 3)
        masks, quality, _ = self.predictor.predict(
            point_coords=given[:, :2] if len(given) else None,
            point_labels=given[:, 2].astype(int) if len(given) else None,
            box=None if box is None else np.array(box, dtype=np.float32),
            multimask_output=alone,
        )
        return masks[int(quality.argmax())].astype(np.uint8)


def uploaded(upload: str | None) -> Path:
    """The path of an upload that was looked at.

    Raises:
        UserError: nothing was uploaded, or it is no picture.
    """
    if not upload:
        raise UserError("", "there is no picture yet", "upload one, or choose an example")
    return _safety.picture(upload)


def marked(picture: np.ndarray, points: Sequence[tuple[int, int, int]], corners: Sequence[tuple[int, int]]) -> Any:
    """The picture with clicks (green: object, red: background) and the box, or its first corner, drawn in."""
    from PIL import ImageDraw

    image = Image.fromarray(picture)
    draw, size = ImageDraw.Draw(image), max(2, round(max(image.size) / 60))
    for x, y, kind in points:
        ellipse = (x - size, y - size, x + size, y + size)
        draw.ellipse(ellipse, fill=overlay.RIGHT if kind else overlay.FALSE, outline="white")
    if len(corners) == 2:
        draw.rectangle(box_of(corners), outline=overlay.MISSED, width=max(1, size // 2))
    for x, y in corners[:1] if len(corners) == 1 else ():
        draw.rectangle((x - size, y - size, x + size, y + size), fill=overlay.MISSED)
    return image


def box_of(corners: Sequence[tuple[int, int]]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of two opposite corners."""
    (a, b), (c, d) = corners
    return min(a, c), min(b, d), max(a, c), max(b, d)


def scenes(folder: Path, side: int = 256) -> list[Path]:
    """Pictures with objects to click on, of the kind that the shipped SAM knows, from its held-out stream."""
    from visadapt.data.shapes import draw_scene

    found = []
    for index in SCENES:
        found.append(folder / f"scene_{index}.png")
        Image.fromarray(draw_scene(99, index, side, train=False)[0]).save(found[-1])
    return found


def examples(folder: Path, side: int = 384) -> list[Path]:
    """Sheets of drawn map from the test stream of `MapTiles`, several tiles large."""
    from visadapt.data.map_tiles import MapTiles

    found = []
    for target, index in (("railway", 0), ("vineyard", 2), ("both", 5)):
        data = MapTiles(target=target, tile=side)  # type: ignore[arg-type]  # one of its targets
        found.append(folder / f"{target}_{index}.png")
        Image.fromarray(np.asarray(data.pairs("test")[index][0], dtype=np.uint8)).save(found[-1])
    return found
