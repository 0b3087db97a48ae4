"""The report of a text-to-video run: clips of the base, of the motion alone and with the appearance, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from visadapt.core.model import strength
from visadapt.report import evaluate, tiles
from visadapt.report.animation import save_mp4, save_webp
from visadapt.report.pictures import Pictures
from visadapt.report.set_files import split_sets

MOST = 128  # larger clips are kept at this side: those of the base travel in every checkpoint
COLUMNS = 8  # frames of a clip in the strips
SMALL = 72  # pixels of a frame there
FILES = {"animation": "videos.webp", "film": "videos.mp4", "strips": "videos.png"}
Clips = dict[str, Tensor]  # title → bytes (prompts · seeds, F, 3, H, W)


class Videos(Pictures):
    """For tasks whose ``render`` gives videos (B, F, 3, H, W); ``use`` and ``variants`` say how far sets act."""

    name = "videos"
    samples = 16
    others: Clips

    def figures(self, trainer: Any, task: Any) -> dict[str, float]:
        """Validation loss before and after; keeps the clips of each choice of strengths."""
        found = super().figures(trainer, task)
        self.others = {}
        for title, strengths in task.variants().items():
            with strength(task.model, **strengths):
                self.others[title] = self._shown(trainer, task)
        return found

    def _measure(self, trainer: Any, task: Any, base: bool = False) -> tuple[dict[str, float], Tensor | None]:
        """Figures with the strengths of inference."""
        with strength(task.model):
            task.use()
            return super()._measure(trainer, task, base)

    def draw(self, trainer: Any, run_dir: Path, names: Sequence[str]) -> Image.Image | None:
        """The animation, a film where PyAV is there, strips of frames, and a file for each set of adapters."""
        from visadapt.report.facts import ADAPTER

        if (run_dir / ADAPTER).is_file():
            split_sets(run_dir / ADAPTER)
        if self.after is None or not len(self.after):
            return None
        task = trainer.lightning_module
        clips, fps = self._clips(task, self.after) | self.others, task.model.fps
        frames = self._animation(task, clips)
        save_webp(frames, run_dir / FILES["animation"], fps)
        save_mp4(frames, run_dir / FILES["film"], fps)
        strips = self._strips(task, clips)
        tiles.save(strips, run_dir / FILES["strips"])
        return strips

    def _render(self, trainer: Any, task: Any) -> Tensor:
        """As ``_shown``, with the strengths of inference."""
        with strength(task.model):
            task.use()
            return self._shown(trainer, task)

    def _shown(self, trainer: Any, task: Any) -> Tensor:
        """Bytes (prompts · seeds, F, 3, H, W) of the model as it is, prompt by prompt."""
        self.prompts, seeds = self._prompts(trainer, task), task.preview.seeds
        if not self.prompts:
            return torch.zeros(0, 1, 3, 1, 1, dtype=torch.uint8)
        with trainer.precision_plugin.forward_context(), evaluate.evaluating(task):
            found = task.render([p for p in self.prompts for _ in seeds], [*seeds] * len(self.prompts))
        if max(found.shape[-2:]) > MOST:
            shape = [max(1, round(side * MOST / max(found.shape[-2:]))) for side in found.shape[-2:]]
            small = torch.nn.functional.interpolate(found.flatten(0, 1), shape, mode="area")
            found = small.unflatten(0, found.shape[:2])
        return (found * 255).round().byte()

    def _grid(self, task: Any, after: Tensor) -> Image.Image:
        """Strips of the base and of the model as it is."""
        return self._strips(task, self._clips(task, after))

    def _clips(self, task: Any, after: Tensor) -> Clips:
        """The base's clips, if they are known, and the given ones."""
        before = self.before.get("pictures")
        found: Clips = {}
        if isinstance(before, Tensor) and before.shape == after.shape:
            found["start" if task.start else "base"] = before
        return found | {"adapted": after}

    def _rows(self, task: Any) -> list[tuple[str, int]]:
        return [(prompt, seed) for prompt in self.prompts for seed in task.preview.seeds]

    def _animation(self, task: Any, clips: Clips) -> list[Image.Image]:
        """A row for each prompt and seed, a column for each model; the frames of the whole sheet."""
        side, cell, high = tiles.SIDE, tiles.SIDE + tiles.GAP, tiles.SIDE + 46
        rows = self._rows(task)
        width = max(2, len(clips)) * cell + tiles.GAP
        empty = Image.new("RGB", (width, len(rows) * high + tiles.GAP), "white")
        draw = ImageDraw.Draw(empty)
        for line, (prompt, seed) in enumerate(rows):
            top = line * high + tiles.GAP
            draw.text((tiles.GAP, top), _heading(prompt, seed, width), tiles.INK, tiles.font(13))
            for column, title in enumerate(clips):
                draw.text((tiles.GAP + column * cell, top + 18), title, tiles.GREY, tiles.font(11))
        sheets = []
        for number in range(next(iter(clips.values())).shape[1]):
            sheet = empty.copy()
            for line in range(len(rows)):
                for column, found in enumerate(clips.values()):
                    corner = (tiles.GAP + column * cell, line * high + tiles.GAP + 34)
                    sheet.paste(_picture(found[line, number], side), corner)
            sheets.append(sheet)
        return sheets

    def _strips(self, task: Any, clips: Clips) -> Image.Image:
        """For each prompt and seed a block, a line of frames for each model."""
        rows, frames = self._rows(task), evaluate.spread(next(iter(clips.values())).shape[1], COLUMNS)
        label, step = 130, SMALL + 4
        high = 26 + len(clips) * step
        width = label + len(frames) * step + tiles.GAP
        sheet = Image.new("RGB", (width, len(rows) * (high + tiles.GAP) + tiles.GAP), "white")
        draw = ImageDraw.Draw(sheet)
        for block, (prompt, seed) in enumerate(rows):
            top = block * (high + tiles.GAP) + tiles.GAP
            draw.text((tiles.GAP, top), _heading(prompt, seed, width), tiles.INK, tiles.font(13))
            for line, (title, found) in enumerate(clips.items()):
                down = top + 24 + line * step
                told = tiles.fitted(title, 11, label - tiles.GAP - 6)
                draw.text((tiles.GAP, down + SMALL / 2), told, tiles.GREY, tiles.font(11), anchor="lm")
                for column, number in enumerate(frames):
                    sheet.paste(_picture(found[block, number], SMALL), (label + column * step, down))
        return sheet


def _heading(prompt: str, seed: int, width: int) -> str:
    return tiles.fitted(f"{prompt}  (seed {seed})", 13, width - 2 * tiles.GAP)


def _picture(frame: Tensor, side: int) -> Image.Image:
    return tiles.scaled(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()), side)
