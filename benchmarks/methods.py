"""How well every method adapts the shipped base: ``python -m benchmarks.methods --task digits``.

Few images per class, drawn once in a shifted domain, are all that a row may train on (each is moved a little
while training, the same for all rows). Every row trains the same number of steps; its learning rate is chosen
from the same list, on 200 validation digits and the first seed; then it is trained for each seed (another
seed: other images, another start) and tested on the 500 test digits. Tables are written as Markdown and CSV.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks._fewshot import BATCH, TARGETS, Job, Row, Setting, accuracy, build, data, rows, run
from visadapt.core.files import replacing

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)


@dataclass
class Result:
    """Figures of one row; accuracies as shares, seconds of process time on one thread."""

    row: str
    lr: float | None
    parameters: int
    accuracy: list[float]
    source_off: float | None
    seconds: list[float] = field(default_factory=list)

    def cells(self) -> dict[str, str]:
        """The row as text."""
        spread = statistics.stdev(self.accuracy) if len(self.accuracy) > 1 else 0.0
        mean = statistics.mean(self.accuracy)
        return {
            "row": self.row,
            "accuracy %": f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if self.seconds else ""),
            "original %, adapter off": "" if self.source_off is None else f"{100 * self.source_off:.1f}",
            "trainable": f"{self.parameters:,}",
            "lr": "" if self.lr is None else f"{self.lr:g}",
            "seconds": f"{statistics.mean(self.seconds):.1f}" if self.seconds else "",
            "seeds": str(len(self.accuracy)) if self.seconds else "",
        }


def frozen(row: Row, setting: Setting) -> Result:
    """The base as it is: no training, no seeds."""
    task = build(row, setting, 0)
    module = data(setting, task, 0)
    target = accuracy(task.model, module.test_dataloader())
    return Result(row.name, None, 0, [target], accuracy(task.model, module.source_dataloader()))


def measure(chosen: Sequence[Row], setting: Setting, rates: Sequence[float], seeds: int, jobs: int) -> list[Result]:
    """Search a learning rate per row, then train every row for every seed."""
    trained = [row for row in chosen if row.name != "frozen base"]
    with ExitStack() as stack:
        each: Callable[..., Iterable[dict[str, float]]] = map
        if jobs > 1:
            each = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))).map
        search = [Job(row, setting, lr, 0, True) for row in trained for lr in rates]
        tried = dict(zip([(job.row.name, job.lr) for job in search], each(run, search), strict=True))
        best = {row.name: max(rates, key=lambda lr, name=row.name: tried[name, lr]["accuracy"]) for row in trained}
        final = [Job(row, setting, best[row.name], seed, False) for row in trained for seed in range(seeds)]
        found = list(zip(final, each(run, final), strict=True))
    results = [frozen(row, setting) for row in chosen if row.name == "frozen base"]
    for row in trained:
        own = [measured for job, measured in found if job.row.name == row.name]
        off = {measured["source_off"] for measured in own if "source_off" in measured}
        if len(off) > 1:
            raise RuntimeError(f"{row.name}: with the adapter off the base differs between seeds: {off}")
        results.append(
            Result(
                row.name,
                best[row.name],
                int(own[0]["parameters"]),
                [measured["accuracy"] for measured in own],
                next(iter(off), None),
                [measured["seconds"] for measured in own],
            )
        )
    return results


def markdown(results: Sequence[Result], about: Sequence[str]) -> str:
    """The table and how it was made."""
    cells = [result.cells() for result in results]
    lines = ["| " + " | ".join(cells[0]) + " |", "|" + " --- |" * len(cells[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in cells]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {line}" for line in about) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, results: Sequence[Result], about: Sequence[str]) -> None:
    """One line per row and seed, with the command and the commit."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "accuracy", "source_off", "parameters", "lr", "seconds", "command", "commit"])
        for result in results:
            for seed, share in enumerate(result.accuracy):
                seconds = result.seconds[seed] if result.seconds else ""
                figures = [share, result.source_off, result.parameters, result.lr, seconds]
                writer.writerow([result.row, seed, *figures, about[0], about[1]])


def commit() -> str:
    """The commit of the code, with a mark if files differ from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def _without_out(arguments: Sequence[str]) -> list[str]:
    """The command line without the folder of the results, which says nothing about them."""
    kept = list(arguments)
    if "--out" in kept:
        place = kept.index("--out")
        del kept[place : place + 2]
    return kept


_Plain = argparse.RawDescriptionHelpFormatter


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["digits"], default="digits")
    parser.add_argument("--methods", help="rows to run, by name, separated by commas; default all")
    parser.add_argument("--domain", default=Setting.domain)
    parser.add_argument("--shots", type=int, default=Setting.shots)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--rates", type=float, nargs="+", default=LEARNING_RATES, help="learning rates to try")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 1 learning rate, 60 steps, 5 rows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    chosen, rates, seeds = rows(options.rank), options.rates, options.seeds
    names = options.methods.split(",") if options.methods else None
    setting = Setting(domain=options.domain, shots=options.shots, steps=options.steps)
    if options.quick:
        names = names or [row.name for row in chosen[:5]]
        rates, seeds, setting = LEARNING_RATES[2:3], 2, Setting(domain=options.domain, steps=60)
    if unknown := set(names or ()) - {row.name for row in chosen}:
        parser.error(f"--methods: no row {sorted(unknown)}; there are {', '.join(row.name for row in chosen)}")
    chosen = [row for row in chosen if names is None or row.name in names]
    results = measure(chosen, setting, rates, seeds, options.jobs)
    about = [
        f"command: `python -m benchmarks.methods {shlex.join(_without_out(arguments or sys.argv[1:]))}`",
        f"commit: {commit()}; torch {torch.__version__}; {os.cpu_count()} cores ({platform.machine()}), "
        f"{options.jobs} trainings at a time on one thread each; seconds are process time of one training",
        f"base {setting.base}; domain '{setting.domain}', {setting.shots} images per class; {setting.steps} "
        f"steps of {BATCH}; adapters of rank {options.rank} on {' and '.join(TARGETS)}, head frozen",
        f"learning rate of {', '.join(f'{lr:g}' for lr in rates)} by validation accuracy of the first seed",
        f"mean ± standard deviation over {seeds} seeds, on 500 test digits",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(results, about)
    write(options.out / "methods_digits.md", text)
    write_csv(options.out / "methods_digits.csv", results, about)
    print(text)
    return results


if __name__ == "__main__":
    main()
