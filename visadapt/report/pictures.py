"""The report of a text-to-image run: pictures of the base beside the adapted model's, loss before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from visadapt.data.loader import ExactLoader
from visadapt.report import evaluate, results, tiles
from visadapt.report.kind import Kind
from visadapt.tasks.measures import key

SIDE = 160  # pixels of a picture in the grid
MOST = 256  # larger ones are kept at this side: those of the base travel in every checkpoint


class Pictures(Kind):
    """For tasks with ``render(prompts, seeds)`` and ``fixed_losses(batch, index)``; ``preview`` says what to render.

    ``images`` is the number of captions that serve as prompts where the preview names none.
    """

    name = "pictures"
    images = 4
    samples = 32
    after: Tensor | None = None
    prompts: Sequence[str] = ()

    def look(self, trainer: Any, task: Any) -> dict[str, Any]:
        """The base's pictures and its validation loss."""
        found: dict[str, Any] = {"pictures": self._render(trainer, task)}
        measured = task.measures is not None and task.measures.base
        if measured and not trainer.fast_dev_run:  # which writes no report
            found["measures"], found["features"] = self._measure(trainer, task, base=True)
        loss = self._loss(trainer, task)
        return found | ({} if loss is None else {"loss": loss})

    def figures(self, trainer: Any, task: Any) -> dict[str, float]:
        """Validation loss at fixed times and with fixed noise, before and after."""
        self.after = self._render(trainer, task)
        loss, where = self._loss(trainer, task), results.domain(trainer)
        figures = {f"loss before, {where}": self.before["loss"]} if "loss" in self.before else {}
        figures |= {} if loss is None else {f"loss after, {where}": loss}
        if task.measures is None:
            return figures
        after, base = self._measure(trainer, task)[0], self.before.get("measures", {})
        logged = {key(name): value for name, value in after.items()}
        logged |= {f"{key(name)}_base": value for name, value in base.items()}
        for logger in trainer.loggers:
            logger.log_metrics(logged, trainer.global_step)
        for name, value in after.items():
            figures |= {f"{name}, before": base[name], f"{name}, after": value} if name in base else {name: value}
        return figures

    def _measure(self, trainer: Any, task: Any, base: bool = False) -> tuple[dict[str, float], Tensor | None]:
        """Figures of the renders, and features of those of the other prompts; what the base has is in ``before``."""
        with trainer.precision_plugin.forward_context(), evaluate.evaluating(task):
            found: tuple[dict[str, float], Tensor | None] = task.measuring(trainer.datamodule)(
                self.before.get("features"), base
            )
            return found

    def levels(self, figures: dict[str, float]) -> dict[str, float]:
        """The loss before adaptation."""
        found = [value for name, value in figures.items() if name.startswith("loss before")]
        return {"loss": found[0]} if found else {}

    def draw(self, trainer: Any, run_dir: Path, names: Sequence[str]) -> Image.Image | None:
        """The grid, and an embedding file of each new token."""
        from visadapt.backbones.sd_tokens import export_tokens

        export_tokens(trainer.lightning_module.model, run_dir)
        if self.after is None or not len(self.after):
            return None
        picture = self._grid(trainer.lightning_module, self.after)
        tiles.save(picture, run_dir / "pictures.png")
        return picture

    def picture(self, trainer: Any, task: Any) -> Image.Image | None:
        """The grid with pictures of the model as it is now."""
        found = self._render(trainer, task)
        return self._grid(task, found) if len(found) else None

    def _prompts(self, trainer: Any, task: Any) -> Sequence[str]:
        """Those of the preview, else different captions of the held-out samples."""
        if task.preview.prompts:
            return task.preview.prompts
        samples = self.held_out(trainer)
        captions = [] if samples is None else [samples[i]["caption"] for i in range(len(samples))]
        return list(dict.fromkeys(captions))[: self.images]

    def _render(self, trainer: Any, task: Any) -> Tensor:
        """Bytes (prompts · seeds, 3, H, W), prompt by prompt."""
        self.prompts, seeds = self._prompts(trainer, task), task.preview.seeds
        if not self.prompts:
            return torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        with trainer.precision_plugin.forward_context(), evaluate.evaluating(task):
            found = task.render([p for p in self.prompts for _ in seeds], [*seeds] * len(self.prompts))
        if max(found.shape[-2:]) > MOST:
            shape = [max(1, round(side * MOST / max(found.shape[-2:]))) for side in found.shape[-2:]]
            found = torch.nn.functional.interpolate(found, shape, mode="area")
        return (found * 255).round().byte()

    def _loss(self, trainer: Any, task: Any) -> float | None:
        """Mean of the fixed losses over the held-out samples; each is that of the validation."""
        samples, data = self.held_out(trainer), trainer.datamodule
        if samples is None:
            return None
        complete = getattr(data, "encoded", lambda batch: batch)
        losses = []
        with trainer.precision_plugin.forward_context(), evaluate.evaluating(task):
            loader = ExactLoader(samples, 1, seed=getattr(data, "seed", 0), collate=data.collate)
            for index, batch in zip(samples.indices, loader, strict=True):
                batch = complete(trainer.strategy.batch_to_device(batch, task.device))
                losses.append(float(task.fixed_losses(batch, torch.tensor([index])).mean()))
        return float(np.mean(losses))

    def _grid(self, task: Any, after: Tensor) -> Image.Image:
        """A row for each prompt, headed by it: the base's picture beside the adapted one, seed by seed."""
        before = self.before.get("pictures")
        known = isinstance(before, Tensor) and before.shape == after.shape
        sources = [("start" if task.start else "base", before), ("adapted", after)] if known else [("adapted", after)]
        seeds = task.preview.seeds
        cell, row = SIDE + tiles.GAP, SIDE + 62
        width = len(sources) * len(seeds) * cell + tiles.GAP
        sheet = Image.new("RGB", (width, len(self.prompts) * row + tiles.GAP), "white")
        draw = ImageDraw.Draw(sheet)
        for line, prompt in enumerate(self.prompts):
            top = line * row + tiles.GAP
            draw.text((tiles.GAP, top), tiles.fitted(prompt, 15, width - 2 * tiles.GAP), tiles.INK, tiles.font(15))
            cells = [(seed, *source) for seed in range(len(seeds)) for source in sources]
            for column, (seed, title, found) in enumerate(cells):
                left = tiles.GAP + column * cell
                draw.text((left, top + 22), f"{title}, seed {seeds[seed]}", tiles.GREY, tiles.font(11))
                pixels = found[line * len(seeds) + seed].permute(1, 2, 0).numpy()  # type: ignore[union-attr, index]
                small = tiles.scaled(np.ascontiguousarray(pixels), SIDE)
                sheet.paste(small, (left, top + 38))
        return sheet
