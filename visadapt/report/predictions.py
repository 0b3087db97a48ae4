"""What ``predict`` writes: a table of classes with probabilities, and the images under their labels."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from visadapt.report import evaluate, tiles
from visadapt.report.facts import write_text
from visadapt.report.results import gathered

TOP = 3


class PredictionReport(Callback):
    """Collects the scores of ``predict`` on all ranks; rank 0 writes ``predictions.csv`` and a picture.

    The columns are file (or number of the sample), class, probability, and the classes that came second and
    third. The picture ``contact_sheet.png`` shows the first images.

    Args:
        run_dir: Folder for the two files.
        images: Most images in the picture.
    """

    def __init__(self, run_dir: str, images: int = 48) -> None:
        self.run_dir, self.images = Path(run_dir), images
        self._rows: dict[int, list[tuple[float, int]]] = {}
        self._order: list[list[int]] = []

    def on_predict_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Note which samples this rank will see, in order."""
        self._rows = {}
        sampler = getattr(trainer.predict_dataloaders, "batch_sampler", None)
        own = list(sampler) if sampler is not None else []
        self._order = [[i[1] if isinstance(i, tuple) else i for i in batch] for batch in own]

    def on_predict_batch_end(
        self,
        trainer: Any,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the best classes of each sample of a batch."""
        if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2:
            return  # not a classification
        best = outputs.float().softmax(1).topk(min(TOP, outputs.shape[1]))
        rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        start = len(self._rows)
        indices = self._order[batch_idx] if batch_idx < len(self._order) else range(start, start + len(outputs))
        for index, (shares, classes) in zip(indices, rows, strict=True):
            self._rows[index] = list(zip(shares, classes, strict=True))

    def on_predict_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Join the ranks, write the files and say where they are."""
        rows = gathered(trainer, self._rows)
        if not trainer.is_global_zero or not rows:
            return
        data = trainer.datamodule
        names = list(getattr(data, "class_names", ())) or None
        dataset = trainer.predict_dataloaders.dataset
        files = [path for path, _ in getattr(dataset, "samples", ())]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_text(self.run_dir / "predictions.csv", table(rows, files, names))
        bad = list(getattr(data, "unreadable", ()))
        self._sheet(data, dataset, rows, files, names, len(bad))
        for message in bad:
            print(f"skipped: {message}")
        print(f"{len(rows)} images, {len(bad)} skipped: {self.run_dir / 'predictions.csv'}, contact_sheet.png")

    def _sheet(
        self,
        data: Any,
        dataset: Any,
        rows: dict[int, Any],
        files: list[str],
        names: list[str] | None,
        bad: int,
    ) -> None:
        norm = evaluate.normalisation(data.preprocess(train=False))
        chosen = sorted(rows)[: self.images]
        pictures = [evaluate.displayable(dataset[i][0], norm) for i in chosen]
        shown = []
        for i, picture in zip(chosen, pictures, strict=True):
            share, label = rows[i][0]
            name = Path(files[i]).name if files else f"number {i}"
            shown.append(tiles.Tile(picture, f"{_name(names, label)}  {share:.0%}", name))
        more = f" (first {len(chosen)})" if len(chosen) < len(rows) else ""
        heading = f"{len(rows)} images{more}" + (f", {bad} unreadable" if bad else "")
        tiles.save(tiles.sheet(shown, heading), self.run_dir / "contact_sheet.png")


def table(rows: dict[int, list[tuple[float, int]]], files: list[str], names: list[str] | None) -> str:
    """CSV text with one line per sample.

    Args:
        rows: Per sample its best classes as (probability, class), best first.
        files: Path of each sample; empty where samples are no files.
        names: Names of the classes; without them their numbers are written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    width = max(len(best) for best in rows.values())
    extra = [x for n in range(2, width + 1) for x in (f"class_{n}", f"probability_{n}")]
    writer.writerow(["file", "class", "probability", *extra])
    for index in sorted(rows):
        cells = [x for share, label in rows[index] for x in (_name(names, label), f"{share:.4f}")]
        writer.writerow([files[index] if files else index, *cells])
    return text.getvalue()


def _name(names: list[str] | None, label: int) -> str:
    return names[label] if names and label < len(names) else str(label)
