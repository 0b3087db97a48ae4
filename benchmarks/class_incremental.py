"""Compare methods on a sequence of tasks: configs/class_incremental/, several seeds, one table and a picture.

    python -m benchmarks.class_incremental --jobs 2                          # what docs/results/class_incremental holds
    python -m benchmarks.class_incremental --jobs 2 --rates 0.001,0.003,0.01 # validation accuracy by learning rate

Every row is a run of ``visadapt fit`` with a configuration of its own on top of the sequence's, so that anyone can
repeat a single one. The seed draws the order of the classes, the order of the images and the start; the rows that the
comparison turns on have twice as many. Intervals are of 95 % (Student's t over the seeds; differences are paired,
seed by seed). Rates are compared on validation images, with an order of classes that the table does not have. The
pictures show the accuracy on the way, what the update of each task is worth at the end, and the loss on the straight
way from the weights after the first task to those after the last.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _path, _runs

CONFIGS = Path("configs/class_incremental")
SEQUENCES = {"digits_sdlora": "digits, 5 tasks of 2 classes"}
ROWS = {
    "joint": "all at once (upper bound)",
    "known_task": "LoRA per task, task known (oracle)",
    "replay": "LoRA with replay of 10 images a class",
    "ranpac": "RanPAC",
    "means": "nearest class mean",
    "probe": "new head alone",
    "full": "full fine-tuning",
    "sequential": "sequential LoRA, its best rate",
    "sequential_same_rate": "sequential LoRA, SD-LoRA's rate",
    "inf_lora": "InfLoRA",
    "dual_lora": "DualLoRA (reconstructed)",
    "o_lora": "O-LoRA",
    "n_lora": "N-LoRA",
    "c_lora": "controlled LoRA",
    "codyra": "CoDyRA",
    "sd_lora": "SD-LoRA",
    "sd_lora_rr": "SD-LoRA-RR",
    "sd_lora_kd": "SD-LoRA-KD",
    "sd_lora_released": "SD-LoRA, directions as released",
}
FIGURES = {"last accuracy": 100.0, "average accuracy": 100.0, "forgetting": 100.0}
MAIN = "sd_lora"  # what every row is compared with
TURN = ("sequential", "sequential_same_rate", MAIN)  # what that turns on: twice the seeds, and their way is drawn
WAYS = ("known_task", "replay", "ranpac", *TURN)  # whose accuracies on the way are drawn
SEARCH_SEED = 99


def command(sequence: str, row: str, seed: int, folder: Path, rate: float | None = None) -> list[str]:
    """Command line of one run; with a ``rate`` it is compared on validation images."""
    configs = [CONFIGS / f"{sequence}.yaml", CONFIGS / "rows" / f"{row}.yaml"]
    line = [*_runs.command("fit", configs, seed, folder, rate), f"--data.order_seed={seed}", f"--model.seed={seed}"]
    if rate is not None:
        return [*line, "--data.evaluate=val"]
    return [*line, "--model.keep_tasks=true"] if row in TURN else line


def run(sequence: str, row: str, seed: int, out: Path, jobs: int) -> dict[str, Any]:
    """Facts of one run, which is made unless it is there."""
    folder = out / sequence / row / str(seed)
    _runs.make(command(sequence, row, seed, folder), folder / "run.json", jobs)
    return json.loads((folder / "run.json").read_text()) | {"folder": folder}


def search(sequence: str, rows: list[str], rates: list[float], out: Path, jobs: int) -> str:
    """Markdown: last accuracy on validation images of each row at each learning rate, in per cent."""

    def tried(row: str, rate: float) -> str:
        folder = out / "rates" / sequence / row / f"{rate:g}"
        _runs.make(command(sequence, row, SEARCH_SEED, folder, rate), folder / "run.json", jobs)
        return f"{100 * json.loads((folder / 'run.json').read_text())['figures']['last accuracy']:.1f}"

    return _runs.search(sequence, {row: ROWS[row] for row in rows}, rates, jobs, tried)


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; not a number for a single value."""
    from scipy import stats

    found = torch.tensor(values, dtype=torch.float64)
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(correction=min(1, len(found) - 1)) / len(found) ** 0.5
    return found.mean().item(), float(half)


def interval(values: Sequence[float]) -> str:
    """Mean ± half of its 95 % interval."""
    mean, half = bounds(values)
    return f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(sequence: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row per method with SD-LoRA's lead in last accuracy; minutes are the least of the seeds."""
    headings = [SEQUENCES[sequence], *FIGURES, "SD-LoRA's lead", "trainable", "minutes"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    last = {row: [100 * facts["figures"]["last accuracy"] for facts in runs] for row, runs in found.items()}
    for row, runs in found.items():
        cells = [
            interval([scale * facts["figures"][name] for facts in runs]) if name in runs[0]["figures"] else ""
            for name, scale in FIGURES.items()
        ]
        lead = [main - value for main, value in zip(last.get(MAIN, []), last[row], strict=False)]  # of seeds in both
        cells.append("" if row == MAIN or not lead else interval(lead))
        minutes = min(facts["minutes"] for facts in runs)
        lines.append(f"| {ROWS[row]} | {' | '.join(cells)} | {runs[0]['trainable']:,} | {minutes:.1f} |")
    return "\n".join(lines)


def _sizes(folder: Path) -> list[float]:
    """What the update of each task is worth at the end of a run."""
    with (folder / "update_sizes.csv").open() as file:
        return [float(value) for value in list(csv.reader(file))[-1][1:]]


def picture(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Last accuracy of all rows, the way there of some, and what each task is worth in SD-LoRA and its variants."""
    from visadapt.report import plots

    fig = plots.figure(13, 4.6)
    left, middle, right = fig.subplots(1, 3)
    for place, (row, runs) in enumerate(found.items()):
        mean, half = bounds([100 * facts["figures"]["last accuracy"] for facts in runs])
        left.errorbar(mean, -place, xerr=half, fmt="o", markersize=4, capsize=2, color="C1" if row == MAIN else "C0")
        if row in WAYS:
            after = [[v for n, v in facts["figures"].items() if n.startswith("accuracy after task")] for facts in runs]
            way = 100 * torch.tensor(after).mean(0)
            middle.plot(range(1, len(way) + 1), way, marker="o", markersize=3, label=ROWS[row])
        if row.startswith(MAIN):
            sizes = torch.tensor([_sizes(facts["folder"]) for facts in runs]).mean(0)
            right.plot(range(1, len(sizes) + 1), sizes, marker="o", markersize=3, label=ROWS[row])
    left.set_yticks([-place for place in range(len(found))], [ROWS[row] for row in found], fontsize=8)
    left.set_xlabel("%, 95 % interval")
    titles = ("last accuracy", "accuracy on the tasks so far, %", "mean norm of each task's update, at the end")
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set_title(title, color=plots.INK, fontsize=10)
        axes.grid(alpha=0.25)
    for axes in (middle, right):
        axes.set_xlabel("task")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=7, loc="lower left")
    plots.save(fig, path)


def path_picture(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss on the first task and on all of them, on the way from after the first task to the end; mean over seeds."""
    from visadapt.report import plots

    fig = plots.figure(11, 3.6)
    panels = fig.subplots(1, 2)
    for row in (row for row in TURN if row in found):
        loss = torch.stack([_path.losses(facts["folder"]) for facts in found[row]])
        way = torch.linspace(0, 1, loss.shape[1])
        for axes, values in zip(panels, (loss[..., 0], loss.mean(2)), strict=True):
            (line,) = axes.plot(way, values.mean(0), marker="o", markersize=3, label=ROWS[row])
            axes.fill_between(way, values.amin(0), values.amax(0), alpha=0.15, color=line.get_color())
    for axes, title in zip(panels, ("loss on the first task", "mean loss on all tasks"), strict=True):
        axes.set_title(title, color=plots.INK, fontsize=10)
        axes.set_xlabel("from the weights after task 1 (0) to the last (1)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7)
    plots.save(fig, path)


def main() -> None:
    """Run what is missing, write the table, single results and the pictures."""
    parser = _runs.parser(__doc__, list(SEQUENCES), list(ROWS), "class_incremental")
    parser.add_argument("--image", type=Path, default=Path("docs/images/class_incremental.png"))
    parser.set_defaults(seeds=5)
    options = parser.parse_args()
    if options.rates:
        for sequence in options.tasks:
            print(search(sequence, options.rows, options.rates, options.runs, options.jobs))
        return
    wanted = [
        (sequence, row, seed)
        for sequence in options.tasks
        for row in options.rows
        for seed in range(options.seeds * (2 if row in TURN else 1))
    ]
    results = _runs.each(run, options.jobs, [(*job, options.runs, options.jobs) for job in wanted])
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (sequence, row, _), facts in zip(wanted, results, strict=True):
        found.setdefault(sequence, {}).setdefault(row, []).append(facts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sequence", "row", "seed", "figure", "value"])
        for (sequence, row, seed), facts in zip(wanted, results, strict=True):
            costs = {name: facts[name] for name in ("trainable", "minutes")}
            writer.writerows([sequence, row, seed, name, value] for name, value in (facts["figures"] | costs).items())
    text = "\n\n".join(table(sequence, rows) for sequence, rows in found.items())
    _runs.write_page(options.out.with_suffix(".md"), "Class-incremental learning", text)
    picture(found[options.tasks[0]], options.image)
    if any(row in TURN for row in options.rows):
        path_picture(found[options.tasks[0]], options.image.with_stem(f"{options.image.stem}_path"))
    print(text)


if __name__ == "__main__":
    main()
