"""Figures of the reports of runs as a table: a row per method, a column per figure, then what it costs."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _runs
from visadapt.tasks.measures import key

BASE = "base"
JUDGE = " (judge)"
Found = Mapping[str, Sequence[dict[str, Any]]]  # row → facts of its runs


def run(line: list[str], folder: Path, jobs: int) -> dict[str, Any]:
    """Facts of the run of a command line, which is made unless it is there."""
    _runs.make(line, folder / "run.json", jobs)
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def after(facts: dict[str, Any], columns: Mapping[str, str], when: str = "after") -> dict[str, float]:
    """Figures of a run by the heading of their column; what a run lacks is left out, what the base has none of too.

    Args:
        facts: Of a run.
        columns: Heading → figure of the report; shares under a heading that ends in % become per cent.
        when: "after", or "before" for the base.
    """
    figures = facts["figures"]
    own = {name: figures.get(name) for name in columns.values()} if when == "after" else {}
    known = {heading: figures.get(f"{name}, {when}", own.get(name)) for heading, name in columns.items()}
    return {
        heading: 100 * value if heading.endswith("%") else value
        for heading, value in known.items()
        if value is not None
    }


def tested(folder: Path, columns: Mapping[str, str]) -> dict[str, float]:
    """Figures that ``visadapt test`` has left in a folder, by the heading of their column."""
    known: dict[str, float] = {}
    for name in columns.values():
        with contextlib.suppress(IndexError):  # what the base has none of
            known[name] = _runs.metric(folder, key(name))
    return after({"figures": known}, columns)


def table(
    found: Found, name: str, columns: Mapping[str, str], titles: Mapping[str, str],
    bases: Sequence[dict[str, float]] | None = None,
) -> str:  # fmt: skip
    """Markdown: the base, then a row per method (minutes: the least of the seeds).

    Args:
        found: Facts of the runs by row.
        name: Heading of the table.
        columns: Heading → figure of the report.
        titles: Of the rows.
        bases: Figures of the base for each seed; without them those of the first run before its first step.
    """
    lines = [
        f"| {name} | {' | '.join(columns)} | trainable | file, KiB | minutes |",
        "|---" * (len(columns) + 4) + "|",
    ]
    first = next(iter(found.values()))[:1]
    for title, runs, when in [(BASE, first, "before"), *((titles[row], runs, "after") for row, runs in found.items())]:
        figures = [after(facts, columns, when) for facts in runs]
        if when == "before" and bases:
            figures = list(bases)
        cells = [
            _runs.spread([one[heading] for one in figures if heading in one], 1 if heading.endswith("%") else 3)
            for heading in columns
        ]
        cost = ["", "", ""]
        if when == "after":
            cost = [f"{runs[0]['trainable']:,}", f"{runs[0]['adapter_bytes'] / 1024:,.0f}"]
            cost.append(f"{min(facts['minutes'] for facts in runs):.1f}")
        lines.append(f"| {title} | {' | '.join([*cells, *cost])} |")
    return "\n".join(lines)


def write_csv(path: Path, wanted: Sequence[tuple[str, str, int]], results: Sequence[dict[str, Any]]) -> None:
    """Every figure and cost of every run, by task, row and seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "row", "seed", "figure", "value"])
        for (task, row, seed), facts in zip(wanted, results, strict=True):
            costs = {name: facts[name] for name in ("trainable", "adapter_bytes", "minutes")}
            writer.writerows([task, row, seed, name, value] for name, value in (facts["figures"] | costs).items())


def grouped(
    wanted: Sequence[tuple[str, str, int]], results: Sequence[dict[str, Any]]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Task → row → facts of its runs."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (task, row, _), facts in zip(wanted, results, strict=True):
        found.setdefault(task, {}).setdefault(row, []).append(facts)
    return found
