"""Pictures of a run, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visadapt.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#24292f"


def figure(width: float, height: float) -> Figure:
    """A figure of so many inches that belongs to no window and no global list."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(fig: Figure, path: str | Path, dpi: int = 130) -> None:
    """Write a PNG under a temporary name, then rename it: a reader never sees half a picture."""
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=dpi, format="png")


def is_share(name: str) -> bool:
    """Whether a metric of that name lies between 0 and 1."""
    return re.search(r"acc|(^|[^a-z])m?iou|dice|precision|recall|^share", name.lower()) is not None


def learning_curves(history: Sequence[dict[str, float]], baselines: dict[str, float] | None = None) -> Figure:
    """Curves of each kind of metric over the epochs, one panel per kind (loss, accuracy, …).

    Args:
        history: Rows with an ``epoch`` and metrics named ``train/loss``, ``val/accuracy``, …
        baselines: Level lines per kind, for instance {"accuracy": accuracy before adaptation}.
    """
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(key for row in history for key in row if "/" in key):
        kinds.setdefault(name.split("/", 1)[1], []).append(name)
    panels = sorted(kinds, key=lambda kind: (kind != "loss", "acc" not in kind, kind != "iou", kind))[:6] or ["loss"]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig = figure(4.6 * columns, 3.4 * rows)
    for i, kind in enumerate(panels):
        axes = fig.add_subplot(rows, columns, i + 1)
        for name in kinds.get(kind, ()):
            points = [(row["epoch"], row[name]) for row in history if name in row]
            epochs, values = zip(*points, strict=True)
            marker = "o" if len(points) <= 30 else None
            axes.plot(epochs, values, label=name.split("/")[0], marker=marker, markersize=3, linewidth=1.8)
        if baselines and kind in baselines:
            axes.axhline(baselines[kind], color="0.45", linestyle="--", linewidth=1.2, label="before, held out")
        if is_share(kind):
            axes.set_ylim(0, 1.02)  # else a change of one image fills the panel
        _style(axes, kind)
    return fig


def _style(axes: Any, kind: str) -> None:
    axes.set_title(kind.replace("_", " "), color=INK, fontsize=11)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def class_bars(after: np.ndarray, before: np.ndarray | None, names: Sequence[str], figure_name: str) -> Figure:
    """One bar per class, with a mark where the class stood before adaptation.

    Args:
        after: Shares (classes,); nan where a class has none.
        before: The same before adaptation, if known.
        names: Name of each class.
        figure_name: What the shares are.
    """
    fig = figure(6.4, 1.2 + 0.3 * len(names))
    axes = fig.add_subplot()
    axes.barh(range(len(names)), np.nan_to_num(after), color="#648fff", label="after")
    if before is not None:
        axes.plot(np.nan_to_num(before), range(len(names)), "|", color=INK, markersize=12, mew=2.5, label="before")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.12)
    for row, value in enumerate(after):
        text = "does not occur" if np.isnan(value) else f"{value:.2f}"
        axes.text(float(np.nan_to_num(value)) + 0.01, row, text, va="center", color=INK, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(figure_name)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    fig.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=2)
    return fig


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Confusion matrix (rows: truth, columns: prediction), coloured by the share of each row.

    Numbers are written into the cells up to 20 classes, names beside them up to 40.

    Args:
        counts: Integer matrix (classes, classes).
        names: Name of each class.
    """
    classes = len(names)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(14.0, max(4.2, 1.6 + 0.42 * classes))
    fig = figure(side + 0.6, side)
    axes = fig.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    accuracy = float(np.trace(counts) / max(counts.sum(), 1))
    axes.set_title(f"{accuracy:.1%} of {int(counts.sum())} right", color=INK)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if classes <= 40:
        rotation = 90 if max(map(len, names)) > 3 else 0
        axes.set_xticks(range(classes), names, rotation=rotation)
        axes.set_yticks(range(classes), names)
    if classes <= 20:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if share[row, column] > 0.55 else INK
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=8)
    fig.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return fig


def task_matrix(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """Accuracies in a sequence of tasks: a row after each task, a column for each task.

    Args:
        matrix: Shares (T, T); nan where there is none.
        names: What each task is about.
    """
    tasks = len(names)
    fig = figure(max(4.6, 1.9 + 0.62 * tasks), max(3.4, 1.4 + 0.5 * tasks))
    axes = fig.add_subplot()
    image = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(~np.isnan(matrix)):
        value = matrix[row, column]
        colour = "white" if value > 0.55 else INK
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(tasks), names, rotation=90 if max(map(len, names)) > 6 else 0, fontsize=8)
    axes.set_yticks(range(tasks), [str(i + 1) for i in range(tasks)])
    axes.set_xlabel("on the classes of a task")
    axes.set_ylabel("after task")
    axes.set_title("accuracy among all classes so far, %", color=INK, fontsize=10)
    fig.colorbar(image, ax=axes, shrink=0.8)
    return fig


def task_lines(values: np.ndarray, title: str) -> Figure:
    """A line for each task (column) over the tasks that have been learned (rows); nan where there is none."""
    fig = figure(5.2, 3.4)
    axes: Any = fig.add_subplot()
    for column in range(values.shape[1]):
        axes.plot(range(1, len(values) + 1), values[:, column], marker="o", markersize=4, label=f"task {column + 1}")
    axes.set_xlabel("after task")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    fig.legend(frameon=False, fontsize=8, loc="outside right upper")
    return fig
