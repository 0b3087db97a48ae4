"""What ``predict`` of a text-to-image model writes: a PNG for each prompt and seed, a table and one sheet of all."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from visadapt.report import results, tiles
from visadapt.report.described import save_png
from visadapt.report.facts import readable, write_text

SHEET = "contact_sheet.png"
Row = tuple[str, str, int]  # file, prompt, seed


class RenderReport(Callback):
    """Writes pictures as they come; at the end rank 0 writes ``pictures.csv`` and ``contact_sheet.png``.

    A subclass writes something else by stating ``what``, ``suffix``, ``save`` and ``first``.

    Each PNG says how it was made: ``parameters`` in the words of Stable Diffusion's web interfaces, which galleries
    read, and ``visadapt`` as JSON.

    Args:
        run_dir: Folder for the files.
        adapters: Adapter files, or the checkpoint, that made the pictures.
        most: Most pictures in the sheet.
    """

    what, suffix = "pictures", "png"

    def __init__(self, run_dir: str, adapters: list[str] | None = None, most: int = 64) -> None:
        self.run_dir, self.adapters, self.most = Path(run_dir), list(adapters or []), most
        self._rows: dict[tuple[int, int], Row] = {}

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the pictures of a batch."""
        settings = self._settings(pl_module)
        found = zip(batch["numbers"], batch["captions"], batch["seeds"], outputs, strict=True)
        for number, prompt, seed, picture in found:
            name = f"{number:04d}_{_short(prompt)}_seed{seed}.{self.suffix}"
            self.save(
                (picture * 255).round().byte().cpu(), self.run_dir / name, {"prompt": prompt, "seed": seed} | settings
            )
            self._rows[number, seed] = (name, prompt, seed)

    def save(self, pixels: Tensor, path: Path, how: dict[str, Any]) -> None:
        """Write bytes (3, H, W) as a picture that says how it was made."""
        save_png(pixels.permute(1, 2, 0).numpy(), path, how)

    def first(self, path: Path) -> Image.Image:
        """What the sheet shows of a file."""
        with Image.open(path) as picture:
            return picture.convert("RGB")

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Join the ranks, write the table and the sheet, and say where they are."""
        rows = results.gathered(trainer, self._rows)
        if not trainer.is_global_zero or not rows:
            return
        order = [rows[key] for key in sorted(rows)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([("file", "prompt", "seed"), *order])
        table = self.run_dir / f"{self.what}.csv"
        write_text(table, text.getvalue())
        self._sheet(order)
        print(f"{len(order)} {self.what}: {readable(table)}, {SHEET}")

    def _settings(self, task: Any) -> dict[str, Any]:
        """What a picture depends on besides its prompt and seed."""
        import visadapt as va

        how, model = task.preview, results.network(task)
        strengths = {adapter.name: adapter.strength for adapter in va.adapters(model).values()}
        return {
            "base": results.base_name(task),
            "adapters": self.adapters,
            "strengths": strengths,
            "steps": how.steps,
            "sampler": type(model.sampler).__name__.removesuffix("Scheduler"),
            "guidance": how.guidance,
            "negative": how.negative,
        }

    def _sheet(self, rows: list[Row]) -> None:
        seeds = len({seed for _, _, seed in rows})
        shown = []
        for name, prompt, seed in rows[: self.most]:
            small = self.first(self.run_dir / name)
            small.thumbnail((2 * tiles.SIDE, 2 * tiles.SIDE))
            shown.append(tiles.Tile(np.asarray(small), prompt, f"seed {seed}"))
        more = f" (first {self.most})" if len(rows) > self.most else ""
        columns = 8 if seeds == 1 else min(8, seeds)
        tiles.save(tiles.sheet(shown, f"{len(rows)} {self.what}{more}", columns), self.run_dir / SHEET)


def _short(prompt: str) -> str:
    """A part of a file's name that resembles a prompt."""
    return re.sub(r"[^A-Za-z0-9]+", "-", prompt)[:48].strip("-") or "prompt"
