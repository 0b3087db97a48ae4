"""The comparison as a table, a CSV file and a picture; what its seeds can tell apart, and what they cannot."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from scipy.stats import t as student

from benchmarks._contests import CONTESTS
from visadapt.core.files import replacing

Found = Mapping[str, Mapping[str, Mapping[str, Any]]]  # task → row → what `_training.row` gives
SURE = 0.95
NAMED = 4  # leading rows whose names fit into a picture
LETTERS, WIDTH = 11, 60  # of a name there, in pixels


@dataclass(frozen=True)
class Cell:
    """Scores of a row on a task.

    Attributes:
        scores: By seed; None is a run whose loss was not finite.
        note: Why there are none.
    """

    scores: tuple[float | None, ...] = ()
    note: str = ""

    @property
    def finite(self) -> list[float]:
        """Scores of the runs that ended."""
        return [score for score in self.scores if score is not None]

    @property
    def mean(self) -> float | None:
        """Their mean, if all runs ended."""
        return mean(self.finite) if self.scores and len(self.finite) == len(self.scores) else None

    def text(self, digits: int) -> str:
        """Mean and half the width of its interval."""
        if self.mean is None:
            return f"{len(self.scores) - len(self.finite)} of {len(self.scores)} failed" if self.scores else self.note
        half = half_width(self.finite)
        return f"{self.mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def half_width(values: Sequence[float]) -> float | None:
    """Half of the interval of 95 % around a mean (Student's t); None for a single value."""
    if len(values) < 2:
        return None
    return float(student.ppf((1 + SURE) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def alike(a: Cell, b: Cell) -> bool:
    """Whether seeds do not tell two rows apart: the paired interval of their differences holds zero."""
    if a.mean is None or b.mean is None:
        return False
    differences = [x - y for x, y in zip(a.finite, b.finite, strict=True)]
    half = half_width(differences)
    return half is None or abs(mean(differences)) <= half


def cell(found: Found, task: str, row: str) -> Cell:
    """The scores of a row on a task."""
    result = found[task].get(row)
    if result is None:
        return Cell()
    return Cell(note="refused") if "refused" in result else Cell(tuple(run["score"] for run in result["runs"]))


def leading(found: Found, task: str, rows: Sequence[str]) -> set[str]:
    """The best row of a task, and those that its seeds do not tell from it."""
    sign = CONTESTS[task].better
    cells = {row: one for row in rows if (one := cell(found, task, row)).mean is not None}
    if not cells:
        return set()
    best = max(cells.values(), key=lambda one: sign * (one.mean or 0.0))
    return {row for row, one in cells.items() if one is best or alike(one, best)}


def table(found: Found, costs: Mapping[str, Mapping[str, Any]], bases: Mapping[str, float], methods: set[str]) -> str:
    """Markdown: the base, rows without adapters, then the methods; bold is what no paired interval tells from the best.

    Args:
        found: Results by task and row.
        costs: By method.
        bases: Score of the base by task.
        methods: Which rows are methods.
    """
    tasks, rows = list(found), list(dict.fromkeys(row for task in found for row in found[task]))
    first = {task: leading(found, task, [row for row in rows if row in methods]) for task in tasks}
    heads = [CONTESTS[task].heading for task in tasks]
    lines = [
        f"| row | {' | '.join(heads)} | trained | of the budget % | file, KiB | step / A | peak / A | merge error |"
    ]
    lines.append("|---" * (len(tasks) + 7) + "|")
    texts = [f"{bases[task]:.{_digits(task)}f}" for task in tasks]
    lines.append(f"| base as shipped | {' | '.join(texts)} | 0 | | | 1 | 1 | |")
    for row in sorted(rows, key=lambda name: name in methods):
        texts = [cell(found, task, row).text(_digits(task)) for task in tasks]
        texts = [f"**{text}**" if row in first[task] else text for task, text in zip(tasks, texts, strict=True)]
        lines.append(f"| {row} | {' | '.join([*texts, *_costs(found, row, costs.get(row, {}))])} |")
    return "\n".join(lines)


def _digits(task: str) -> int:
    return 3 if CONTESTS[task].better < 0 else 1


def _costs(found: Found, row: str, cost: Mapping[str, Any]) -> list[str]:
    """Parameters and file of the first task that has the row, shares of the budget of all, then time and memory."""
    results = [found[task][row] for task in found if found[task].get(row, {}).get("runs")]
    if not results:
        return [""] * 6
    run = results[0]["runs"][0]
    shares = [f"{100 * one['runs'][0]['parameters'] / one['budget']:.0f}" for one in results if "budget" in one]
    size = f"{run['bytes'] / 1024:,.0f}" if "bytes" in run else ""
    ratios = [f"{cost[name]:.2f}" if name in cost else "" for name in ("step", "peak")]
    merged = ""
    if "merge_error" in cost:
        error = cost["merge_error"]
        merged = "no merge" if error is None else f"{error:.0e}" if error else "0"
    return [f"{run['parameters']:,}", " / ".join(shares), size, *ratios, merged]


def write_csv(path: Path, found: Found, about: Mapping[str, str]) -> None:
    """A line per run, with its learning rate and options, and how it was made."""
    head = ["task", "row", "seed", "score", "rate", "parameters", "bytes", "seconds", "options", *about]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for task, rows in found.items():
            for row, result in rows.items():
                options = " ".join(f"{k}={v}" for k, v in (result.get("options") or {}).items())
                for seed, run in enumerate(result.get("runs", ())):
                    figures = [
                        run["score"],
                        result["rate"],
                        run["parameters"],
                        run.get("bytes"),
                        f"{run['seconds']:.2f}",
                    ]
                    writer.writerow([task, row, seed, *figures, options, *about.values()])
                if "refused" in result:
                    writer.writerow([task, row, "", "", "", "", "", "", result["refused"], *about.values()])


def write_costs(path: Path, costs: Mapping[str, Mapping[str, Any]], about: Mapping[str, str]) -> None:
    """A line per method."""
    columns = ["parameters", "step", "step_iqr", "peak", "merge_error", "no_merge", "refused"]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *columns, *about])
        for row, cost in costs.items():
            writer.writerow([row, *(cost.get(column) for column in columns), *about.values()])


def picture(path: Path, found: Found, costs: Mapping[str, Mapping[str, Any]], methods: set[str]) -> None:
    """A column per task: all methods by score, then score against parameters and against step time; LoRA is dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(found)
    scored = {
        task: [r for r in found[task] if r in methods and cell(found, task, r).mean is not None] for task in tasks
    }
    tall = 2 + 0.16 * max(len(rows) for rows in scored.values())
    figure = Figure(figsize=(5 * len(tasks), tall + 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, len(tasks), squeeze=False, height_ratios=(tall, 3.25, 3.25))
    for (above, middle, below), task in zip(panels.T, tasks, strict=True):
        rows, sign, first = scored[task], CONTESTS[task].better, leading(found, task, scored[task])
        cells = {row: cell(found, task, row) for row in rows}
        rows.sort(key=lambda row: sign * (cells[row].mean or 0.0))
        for place, row in enumerate(rows):
            half = half_width(cells[row].finite)
            above.errorbar(cells[row].mean, place, xerr=half, fmt="o", color=_colour(row, first), ms=3, lw=0.8)
        above.set_yticks(range(len(rows)), rows, fontsize=7)
        above.set(xlabel=CONTESTS[task].heading, ylim=(-1, len(rows)))
        parameters = {row: found[task][row]["runs"][0]["parameters"] for row in rows}
        times = {row: costs[row]["step"] for row in rows if "step" in costs.get(row, {})}
        for axes, label, xs in (
            (middle, "trained parameters", parameters),
            (below, "step time / frozen model", times),
        ):
            named = {"LoRA", *[row for row in reversed(rows) if row in first][:NAMED], *_outside(xs)}
            for row, x in xs.items():
                one = cells[row]
                axes.errorbar(x, one.mean, half_width(one.finite), fmt="o", color=_colour(row, first), ms=4, lw=0.8)
            axes.set(xlabel=label, ylabel=CONTESTS[task].heading, xscale="log")
            axes.margins(x=0.25, y=0.1)
            if sign < 0:
                axes.invert_yaxis()  # up is better everywhere
            _name(axes, [(xs[row], cells[row].mean or 0.0, row) for row in named if row in xs])
        if sign < 0:
            above.invert_xaxis()
        if "LoRA" in cells:
            above.axvline(cells["LoRA"].mean, color="black", lw=0.8, ls="--")
            for axes in (middle, below):
                axes.axhline(cells["LoRA"].mean, color="black", lw=0.8, ls="--")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _colour(row: str, first: set[str]) -> str:
    return "tab:blue" if row in first else "tab:gray"


def _outside(xs: Mapping[str, float]) -> list[str]:
    """Rows that lie far off the others along x."""
    middle = median(xs.values()) if xs else 1.0
    return [row for row, x in xs.items() if not 0.6 < x / middle < 1.67]


def _name(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names to the right of points, each as much lower than the one before as letters are high."""
    pixels = [(*axes.transData.transform((x, y)), x, y, row) for x, y, row in points]
    taken: list[tuple[float, float]] = []
    for left, height, x, y, row in sorted(pixels, key=lambda point: -point[1]):
        free = height
        while any(abs(free - other) < LETTERS and abs(left - beside) < WIDTH for beside, other in taken):
            free -= 1
        taken.append((left, free))
        axes.annotate(row, (x, y), (6, free - height - 2), textcoords="offset pixels", fontsize=6)
