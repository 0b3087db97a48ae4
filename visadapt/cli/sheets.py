"""``visadapt predict`` for segmentations: its options, and pictures of any size as data."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from torch.utils.data import TensorDataset

from visadapt.data.base import BaseData, Stage
from visadapt.data.images import find_images
from visadapt.report.sheets import SheetOptions, SheetReport


class Sheets(BaseData):
    """Pictures of any size, for ``predict`` alone; a sample is the number of a picture.

    Args:
        images: Folders and files.
        class_names: Names of the classes, the background first.
        tiles: Tiles of a picture that are predicted at once.
    """

    def __init__(self, images: list[str], class_names: list[str], tiles: int = 8) -> None:
        super().__init__(batch_size=1)
        self.class_names = class_names
        self.tiles = tiles
        self.paths: list[Path] = find_images(images)

    def dataset(self, stage: Stage) -> TensorDataset:
        """The numbers of the pictures: one is opened when it is predicted, not before."""
        if stage != "predict":
            raise NotImplementedError("these pictures have no masks: only predict can use them")
        return TensorDataset(torch.arange(len(self.paths)))


def add_options(parser: ArgumentParser) -> None:
    """Options of ``predict`` that matter to segmentations only."""
    group = parser.add_argument_group("Masks: pictures of any size for a segmentation")
    group.add_argument("--output", type=str | None, help="Folder for what predict writes; the same as --run_dir.")
    group.add_argument("--overlap", type=float, default=0.25, help="Share of a tile that its neighbour covers too.")
    group.add_argument("--scale", type=float, default=1.0, help="How much a picture is enlarged before it is cut.")
    group.add_argument(
        "--geojson", action=ActionYesNo(no_prefix="no-"), default=False, help="Also write polygons (needs rasterio)."
    )
    group.add_argument(
        "--overlay", action=ActionYesNo(no_prefix="no-"), default=True, help="A small picture with the mask over it."
    )


def kind(config: Namespace) -> str:
    """What the task of a configuration predicts: "classes", "masks", "pictures" or "videos"."""
    module, _, name = config["model"]["class_path"].rpartition(".")
    return str(getattr(getattr(import_module(module), name), "report_kind", "classes"))


def report(config: Namespace, run_dir: Path, progress: bool) -> SheetReport:
    """The callback that predicts sheets as the command line says.

    Args:
        config: Parsed configuration of ``predict``.
        run_dir: Folder for the files.
        progress: Show a progress bar per sheet.
    """
    given: dict[str, Any] = {key: config[key] for key in ("overlap", "scale", "geojson", "overlay")}
    return SheetReport(str(run_dir), SheetOptions(**given, progress=progress))
