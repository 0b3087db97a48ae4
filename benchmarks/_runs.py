"""Runs of ``visadapt`` that a table is made of: each is made once, several at a time, and read from its folder."""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from threading import Event
from typing import Any, TypeVar

T = TypeVar("T")


def command(verb: str, configs: Iterable[Path], seed: int, folder: Path, rate: float | None = None) -> list[str]:
    """Command line of one run; a ``rate`` replaces the configuration's, a configuration that is not there is left."""
    changed = [] if rate is None else [f"--model.optimizer.init_args.lr={rate}"]
    stacked = [f"--config={config}" for config in configs if config.exists()]
    seeds = [f"--seed_everything={seed}", f"--data.seed={seed}"]
    return [sys.executable, "-m", "visadapt", verb, *stacked, *seeds, f"--run_dir={folder}", *changed]


def make(line: list[str], done: Path, jobs: int) -> None:
    """Run a command line that leaves the file ``done``, unless it is there; what a run that was cut off left goes."""
    if done.exists():
        return
    if (done.parent / "config.yaml").is_file():
        shutil.rmtree(done.parent)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    made = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if made.returncode:
        raise SystemExit(f"{' '.join(line)}\n{made.stdout[-2000:]}\n{made.stderr[-2000:]}")
    print(done.parent, flush=True)


def metric(folder: Path, name: str) -> float:
    """Last value of a metric in a run's metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)][-1]


def each(make_one: Callable[..., T], jobs: int, arguments: Sequence[tuple]) -> list[T]:
    """Results of all calls in their order, so many at a time; after one that fails no other is begun."""
    failed = Event()

    def attempt(*one: Any) -> T:
        if failed.is_set():
            raise CancelledError
        try:
            return make_one(*one)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(attempt, *one) for one in arguments]
        return [one.result() for one in running]


def search(
    task: str, rows: dict[str, str], rates: Sequence[float], jobs: int, tried: Callable[[str, float], str]
) -> str:
    """Markdown: what ``tried`` says of each row (name → title) at each learning rate."""

    def attempt(row: str, rate: float) -> str:
        try:
            return tried(row, rate)
        except SystemExit as error:
            if "the loss is" not in str(error):
                raise
            return "diverged"

    values = each(attempt, jobs, [(row, rate) for row in rows for rate in rates])
    lines = [f"| {task} | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for number, title in enumerate(rows.values()):
        lines.append(f"| {title} | {' | '.join(values[number * len(rates) : (number + 1) * len(rates)])} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, and the standard deviation where there are several values; empty without any."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}" if values else ""


def commit() -> str:
    """The commit of the code, with a mark if files differ from it other than documents, which benchmarks write."""
    found = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True).stdout.strip()
    code = ["git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)docs"]
    changed = subprocess.run(code, capture_output=True, text=True).stdout.strip()
    return f"{found or 'unknown'}{'-dirty' if changed else ''}"


def command_line(module: str, arguments: Sequence[str]) -> str:
    """How a benchmark was called, without folders, which say nothing about results."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in ("--out", "--runs", "--image"):
            kept.append(argument)
        skip = argument in ("--out", "--runs", "--image")
    return shlex.join(["python", "-m", f"benchmarks.{module}", *kept])


def write_page(path: Path, title: str, text: str) -> None:
    """Write a page of results of the benchmark that runs, which says how and from what code it was made."""
    made = f"`{command_line(Path(sys.argv[0]).stem, sys.argv[1:])}` at {commit()}, on {os.cpu_count()} cores."
    path.write_text(f"# {title}\n\n{made}\n\n{text}\n", encoding="utf-8")


def parser(text: str | None, tasks: Sequence[str], rows: Sequence[str], name: str) -> argparse.ArgumentParser:
    """The options that tables of runs share; ``name`` is that of the folder of runs and of the result."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--tasks", nargs="+", default=list(tasks), choices=tasks)
    found.add_argument("--rows", nargs="+", default=list(rows), choices=rows)
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    found.add_argument("--rates", type=lambda t: [float(x) for x in t.split(",")], help="compare learning rates only")
    found.add_argument("--runs", type=Path, default=Path("runs") / name, help="folder of the single runs")
    found.add_argument("--out", type=Path, default=Path("docs/results") / name)
    return found
