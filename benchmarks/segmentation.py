"""Compare adapters on map tiles: the configurations in configs/segmentation/, several seeds, one table.

    python -m benchmarks.segmentation --jobs 2                         # what docs/results/segmentation holds
    python -m benchmarks.segmentation --jobs 2 --rates 0.001,0.003     # validation IoU per learning rate, seed 0

Every row is a run of ``visadapt fit`` with a configuration of its own on top of the task's, so that anyone can repeat
a single one; the seed draws the tiles, the shots and the start. Runs that are there already are not made again. IoU is
that of 80 test tiles, the same for all, over the corpus. The oracle rows train nothing: SAM as shipped is told the box
of every connected piece of the truth.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from benchmarks import _runs

CONFIGS = Path("configs/segmentation")
TASKS = ("railway_10shot", "vineyard_10shot", "railway_full", "vineyard_full")
ROWS = {
    "scratch": "from scratch",
    "decoder": "decoder only",
    "full": "full fine-tuning",
    "dora_in": "DoRA, norms of inputs",
    "dora_out": "DoRA, norms of outputs",
    "lora": "LoRA",
    "wara": "WaRA",
    "salt": "SALT",
}
ORACLE = "oracle"


def command(task: str, row: str, seed: int, folder: Path, rate: float | None = None) -> list[str]:
    """Command line of one run; a ``rate`` replaces the configuration's."""
    configs = [CONFIGS / f"{task}.yaml", CONFIGS / "rows" / f"{row}.yaml"]
    return _runs.command("test" if row == ORACLE else "fit", configs, seed, folder, rate)


def run(task: str, row: str, seed: int, out: Path, jobs: int) -> dict[str, str | float]:
    """Result of one run, which is made unless it is there."""
    folder = out / task / row / str(seed)
    done = folder / ("metrics.csv" if row == ORACLE else "run.json")
    _runs.make(command(task, row, seed, folder), done, jobs)
    if row == ORACLE:
        return {"iou": _runs.metric(folder, "test/iou"), "trainable": 0, "minutes": 0.0}
    facts = json.loads(done.read_text())
    figures = {name: value for name, value in facts["figures"].items() if name.startswith("IoU after")}
    return {"iou": next(iter(figures.values())), "trainable": facts["trainable"], "minutes": facts["minutes"]}


def search(task: str, rows: list[str], rates: list[float], out: Path, jobs: int) -> str:
    """Markdown: validation IoU in per cent of each row at each learning rate, for seed 0."""

    def tried(row: str, rate: float) -> str:
        folder = out / "rates" / task / row / f"{rate:g}"
        _runs.make(command(task, row, 0, folder, rate), folder / "run.json", jobs)
        return f"{100 * _runs.metric(folder, 'val/iou'):.1f}"

    return _runs.search(task, {row: ROWS[row] for row in rows}, rates, jobs, tried)


def cells(found: dict[tuple[str, str], list[dict[str, str | float]]], row: str, tasks: list[str]) -> list[str]:
    """IoU of a row in each task, in per cent, with the standard deviation over the seeds."""
    return [_runs.spread([100 * float(result["iou"]) for result in found.get((task, row), ())]) for task in tasks]


def table(found: dict[tuple[str, str], list[dict[str, str | float]]], tasks: list[str]) -> str:
    """Markdown: a row per configuration, a column per task, then what it costs.

    Minutes are the least of the seeds: whatever else the machine does only adds to them.
    """
    names = [f"{task.replace('_', ', ').replace('10shot', '10 shots')}" for task in tasks]
    lines = [f"| row | {' | '.join(names)} | trainable | minutes |", "|---" * (len(tasks) + 3) + "|"]
    for row, title in {ORACLE: "no adaptation, oracle boxes", **ROWS}.items():
        results = found.get((tasks[0], row), [])
        if not results:
            continue
        cost = f"{min(float(r['minutes']) for r in results):.1f}" if row != ORACLE else ""
        lines.append(
            f"| {title} | {' | '.join(cells(found, row, tasks))} | {int(results[0]['trainable']):,} | {cost} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, write the table and the single results."""
    options = _runs.parser(__doc__, TASKS, [ORACLE, *ROWS], "segmentation").parse_args()
    if options.rates:
        rows = [row for row in options.rows if row != ORACLE]
        for task in options.tasks:
            print(search(task, rows, options.rates, options.runs, options.jobs))
        return
    # The test tiles are the same for every seed, so the oracle has one result.
    wanted = [
        (task, row, seed)
        for task in options.tasks
        for row in options.rows
        for seed in range(1 if row == ORACLE else options.seeds)
    ]
    results = _runs.each(run, options.jobs, [(*job, options.runs, options.jobs) for job in wanted])
    found: dict[tuple[str, str], list[dict[str, str | float]]] = {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "row", "seed", "iou", "trainable", "minutes"])
        for (task, row, seed), result in zip(wanted, results, strict=True):
            found.setdefault((task, row), []).append(result)
            writer.writerow([task, row, seed, *result.values()])
    text = table(found, options.tasks)
    _runs.write_page(options.out.with_suffix(".md"), "Adapters of SAM on map tiles", text)
    print(text)


if __name__ == "__main__":
    main()
