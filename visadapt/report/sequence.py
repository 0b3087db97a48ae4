"""The report of a sequence of tasks: accuracies after each task on each, what each update is worth, merged model."""

from __future__ import annotations

import copy
import csv
from collections.abc import Sequence as Names
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from visadapt.core.files import replacing, write_state
from visadapt.metrics.sequence import summary
from visadapt.report import plots, results
from visadapt.report.kind import Kind


class Sequence(Kind):
    """For tasks with ``matrix`` and ``sizes`` (T, T), one row after each task."""

    name = "sequence"
    images = samples = 0

    def look(self, trainer: Any, task: Any) -> dict[str, Any]:
        """Nothing: a new head predicts nothing before the first task."""
        return {}

    def figures(self, trainer: Any, task: Any) -> dict[str, float]:
        """Last and average accuracy, forgetting, backward transfer, and the accuracy after each task."""
        self._task = task
        after = {f"accuracy after task {i + 1}": v for i, v in enumerate(task.matrix.nanmean(1).tolist()) if v == v}
        return summary(task.matrix) | after

    def levels(self, figures: dict[str, float]) -> dict[str, float]:
        """None."""
        return {}

    def draw(self, trainer: Any, run_dir: Path, names: Names[str]) -> Image.Image | None:
        """Matrix and sizes as tables and pictures, and the model with its adapters merged, where they can be."""
        import visadapt as va

        task = self._task
        titles = [
            ", ".join(names[c] for c in classes[:4]) + ", …" * (len(classes) > 4) for classes in task.task_classes
        ]
        _table(task.matrix, run_dir / "accuracy_matrix.csv")
        plots.save(plots.task_matrix(task.matrix.numpy(), titles), run_dir / "accuracy_matrix.png")
        if not task.sizes.isnan().all():
            _table(task.sizes, run_dir / "update_sizes.csv")
            plots.save(
                plots.task_lines(task.sizes.numpy(), "mean norm of a task's update"), run_dir / "update_sizes.png"
            )
        model = results.network(task)
        if va.adapters(model) and not task.oracle:
            try:
                write_state(va.merge(copy.deepcopy(model)), run_dir / "merged.safetensors")
            except ValueError:
                pass  # `visadapt merge` says why
        return Image.open(run_dir / "accuracy_matrix.png").convert("RGB")

    def keeps(self, task: Any) -> str | None:
        """Where the task wants that, a file after each of the tasks but the last, whose file is the run's."""
        wanted = task.keep_tasks and task.task + 1 < len(task.task_classes)
        return f"after_task_{task.task + 1}.safetensors" if wanted else None

    def picture(self, trainer: Any, task: Any) -> Image.Image | None:
        """None: the matrix gets a row per task, not per epoch."""
        return None


def _table(matrix: Tensor, path: Path) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["after task", *(f"task {j + 1}" for j in range(len(matrix)))])
        for i, row in enumerate(matrix.double().numpy()):
            writer.writerow([i + 1, *("" if np.isnan(v) else f"{v:.6g}" for v in row)])
