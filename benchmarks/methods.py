"""How well every method of the catalogue adapts, at equal budgets: ``python -m benchmarks.methods --jobs 2``.

    python -m benchmarks.methods --jobs 2                               # what docs/results/methods holds
    python -m benchmarks.methods --tasks digits --rows LoRA DoRA        # some rows
    python -m benchmarks.methods --subset                               # 3 rows, few steps: whether all of it works

Three tasks on shipped bases, made of the classes that `visadapt fit` has (benchmarks/_contests.py). Each method gets
the size at which it trains as many values as LoRA of rank 8 on the same layers, as nearly as it can, and otherwise its
defaults (benchmarks/_budget.py). Its learning rate is the best of three on the validation images, for a seed that the
table does not have; then it is trained for each seed (other training images, another start) and scored on test images
that never change. Intervals are of 95 % (Student's t over the seeds). Single runs are kept as files: those that are
there are not made again. Methods for sequences of tasks are on one task here. Step time, memory and merge error are
those of one block of ViT-B/16, all methods in one run (benchmarks/_costs.py).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import visadapt as va
from benchmarks import _costs, _runs, _standings, _training
from benchmarks._contests import CONTESTS
from visadapt.core.files import replacing

SUBSET = {"rows": ["LoRA", "SSF", "LoRASB"], "seeds": 2, "rates": (5e-3,), "steps": 4, "rounds": 1}


def parser() -> argparse.ArgumentParser:
    """The options."""
    references = dict.fromkeys(name for contest in CONTESTS.values() for name in contest.references)
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--tasks", nargs="+", default=list(CONTESTS), choices=CONTESTS)
    found.add_argument("--rows", nargs="+", default=[*references, *va.METHODS], choices=[*references, *va.METHODS])
    found.add_argument("--seeds", type=int, default=_training.Plan.seeds)
    found.add_argument("--rates", type=float, nargs="+", default=_training.Plan.rates, help="learning rates to try")
    found.add_argument("--steps", type=int, help="of each training, instead of the task's own")
    found.add_argument("--rounds", type=int, default=5, help="of the timing; 0 leaves step times out")
    found.add_argument("--jobs", type=int, default=1, help="rows at a time, one thread each")
    found.add_argument("--subset", action="store_true", help="three rows, few steps; rows and steps may still be given")
    found.add_argument("--runs", type=Path, default=Path("runs/methods"), help="folder of the single runs")
    found.add_argument("--out", type=Path, default=Path("docs/results/methods"))
    found.add_argument("--image", type=Path, default=Path("docs/images/methods.png"))
    return found


def trained(plan: _training.Plan, tasks: Sequence[str], rows: Sequence[str], jobs: int) -> dict[str, dict[str, Any]]:
    """Task → row → its results; rows that a task does not have are left out."""
    wanted = [
        (task, row) for row in rows for task in tasks if row in va.METHODS or row in CONTESTS[task].references
    ]  # fmt: skip
    found: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    with ExitStack() as stack:
        each: Callable[..., Iterable[dict[str, Any]]] = map
        if jobs > 1:
            each = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))).map
        results = each(_training.row, *zip(*wanted), [plan] * len(wanted)) if wanted else []
        for number, result in enumerate(results, 1):
            found[result["task"]][result["row"]] = result
            seconds = sum(run["seconds"] for run in result.get("runs", ()))
            print(f"[{number}/{len(wanted)}] {result['task']} {result['row']}: {seconds:.0f} s", file=sys.stderr)
    return found


def costs(plan: _training.Plan, rows: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Costs of the methods among the rows, measured together unless they are there."""
    wanted = {"methods": [row for row in rows if row in va.METHODS], "rank": plan.rank, "rounds": rounds}
    path = plan.runs / "costs.json"
    found = _training.stored(path, wanted)
    if found is None:
        torch.set_num_threads(1)
        found = _training.keep(path, wanted, _costs.measure(wanted["methods"], plan.rank, rounds))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, then the table, the CSV files and the picture."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    found_parser = parser()
    if "--subset" in given:
        found_parser.set_defaults(**SUBSET)
    options = found_parser.parse_args(given)
    plan = _training.Plan(options.runs, options.seeds, tuple(options.rates), steps=options.steps)
    if options.subset:
        plan = _training.Plan(options.runs, options.seeds, tuple(options.rates), tuple(options.rates), options.steps)
    found = trained(plan, options.tasks, options.rows, options.jobs)
    bases = {task: _training.base_score(task, plan) for task in options.tasks}
    cost = costs(plan, options.rows, options.rounds)
    about = {
        "command": _runs.command_line("methods", given),
        "commit": _runs.commit(),
        "machine": f"torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()})",
    }
    text = _standings.table(found, cost, bases, set(va.METHODS))
    options.out.mkdir(parents=True, exist_ok=True)
    with replacing(options.out / "methods.md") as temporary:
        temporary.write_text(f"# Methods at equal budgets\n\n{text}\n\n{remarks(options, about)}\n", encoding="utf-8")
    _standings.write_csv(options.out / "methods.csv", found, about)
    _standings.write_costs(options.out / "costs.csv", cost, about)
    _standings.picture(options.image, found, cost, set(va.METHODS))
    print(text)


def remarks(options: argparse.Namespace, about: dict[str, str]) -> str:
    """How the table was made, and how to read it."""
    steps = ", ".join(f"{task} {options.steps or CONTESTS[task].steps}" for task in options.tasks)
    return "\n".join(
        [
            *(f"- {name}: `{value}`" for name, value in about.items()),
            f"- mean ± half of the 95 % interval over {options.seeds} seeds; steps: {steps}",
            "- bold: the best method of a column, and those whose paired difference to it has an interval with zero in "
            "it. Everything bold is one group: its order says nothing",
            f"- learning rate of {', '.join(f'{rate:g}' for rate in options.rates)} by the validation images, on seed "
            f"{_training.SEARCH_SEED}",
            "- trained: values in adapters (digits); of the budget: by task; file: the adapter's (digits)",
            "- step and peak: of a training step of one block of ViT-B/16, A is the frozen block; merge error: of its "
            "output in float32, relative",
            "- LoRADropout is scored by the mean of four masks where the task allows it; RACLoRA and XGBLoRA train "
            "in five links; methods for sequences of tasks are on one task",
        ]
    )


if __name__ == "__main__":
    main()
