"""One row of the comparison on one task: its size, its learning rate, its runs. Results that are there stay."""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch

import visadapt as va
from benchmarks import _budget
from benchmarks._contests import CONTESTS, Contest, Stage, Trains, quiet
from visadapt.callbacks.chain import Chain
from visadapt.callbacks.ensemble import Ensemble
from visadapt.core.files import replacing

SEARCH_SEED = 99
CHAINS = ("RACLoRA", "XGBLoRA")
ENSEMBLES = ("LoRADropout",)


@dataclass(frozen=True)
class Plan:
    """What all rows of a table share.

    Args:
        runs: Folder of the single results.
        seeds: Runs of a row in the table; their seeds are 0, 1, …
        rates: Learning rates that a row with adapters tries, on the validation split and a seed of its own.
        whole_rates: Those of a row that trains the head or the whole network.
        steps: Of each training, by task; none takes the task's own.
        rank: The budget is what LoRA of this rank trains.
    """

    runs: Path
    seeds: int = 5
    rates: tuple[float, ...] = (1e-3, 5e-3, 2.5e-2)
    whole_rates: tuple[float, ...] = (3e-4, 1e-3, 5e-3)
    steps: int | None = None
    rank: int = 8


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        row: A method of the catalogue, or a reference of the task.
        options: Hyper-parameters of the method; None for a reference.
        rate: Learning rate.
        seed: Of the images, of their order and of the start.
        stage: What it is scored on.
    """

    row: str
    options: dict[str, Any] | None
    rate: float
    seed: int
    stage: Stage

    def adapters(self, contest: Contest) -> list[va.Adaptation]:
        """The set of the row, if it has one."""
        if self.options is None:
            return []
        return [va.Adaptation(va.METHODS[self.row](**self.options), list(contest.targets))]


def begin() -> None:
    """Settings of a process that trains: one thread, and nothing of Lightning's on the terminal."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def train(contest: Contest, job: Job) -> dict[str, Any]:
    """Train and score; the score of a run whose loss is not finite is null."""
    task = contest.task(job.adapters(contest), contest.references.get(job.row, Trains()), job.rate, job.seed)
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    parameters = trained if job.options is None else _budget.count(task.model)
    callbacks: list[L.Callback] = [Chain(math.ceil(contest.steps / _budget.LINKS))] if job.row in CHAINS else []
    started, score = time.process_time(), None
    try:
        quiet(max_steps=contest.steps, limit_val_batches=0, callbacks=callbacks).fit(task, contest.data(job.seed))
        seconds = time.process_time() - started
        means = [Ensemble()] if job.row in ENSEMBLES and contest.ensembles else []
        score = contest.score(task, job.stage, means)
    except FloatingPointError:
        seconds = time.process_time() - started
    found: dict[str, Any] = {"score": score, "parameters": parameters, "seconds": seconds}
    if job.options is not None:
        found["bytes"] = _size(task.model)
    return found


def _size(model: torch.nn.Module) -> int:
    """Bytes of the adapter file, without what the task trains besides."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".adapters." in f".{name}")
    with TemporaryDirectory() as folder:
        return va.save(model, Path(folder) / "adapter.safetensors").stat().st_size


def stored(path: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """A result that is there and was made with the same settings."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found["result"] if found["wanted"] == json.loads(json.dumps(wanted)) else None


def keep(path: Path, wanted: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Write a result with the settings that it belongs to."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"wanted": wanted, "result": result}, indent=1), encoding="utf-8")
    return result


def run(contest: Contest, job: Job, folder: Path) -> dict[str, Any]:
    """The result of one training, which is made unless it is there."""
    path = folder / f"{job.stage}-{job.rate:g}-{job.seed}.json"
    wanted = contest.settings() | asdict(job)
    found = stored(path, wanted)
    return keep(path, wanted, train(contest, job)) if found is None else found


def options(contest: Contest, row: str, plan: Plan, folder: Path) -> dict[str, Any]:
    """Hyper-parameters of a method at the budget, or why it refuses; looked for unless they are there."""
    path, wanted = folder / "options.json", contest.settings() | {"row": row, "rank": plan.rank}
    if (found := stored(path, wanted)) is not None:
        return found
    model = contest.task([], Trains(), 0.0, 0).model
    budget = _budget.parameters(model, contest.targets, va.METHODS["LoRA"](rank=plan.rank))
    assert budget is not None
    try:
        found = {"options": _budget.nearest(row, model, contest.targets, budget, contest.steps).hparams()}
    except ValueError as error:
        found = {"refused": str(error)}
    return keep(path, wanted, found | {"budget": budget})


def row(task: str, name: str, plan: Plan) -> dict[str, Any]:
    """All of a row on a task: its options, the rate that it chose, its runs by seed; or why it is refused."""
    begin()
    contest, folder = CONTESTS[task](plan.steps), plan.runs / task / name
    found: dict[str, Any] = {"task": task, "row": name}
    chosen = None
    if name in va.METHODS:
        made = options(contest, name, plan, folder)
        found |= made
        if "refused" in made:
            return found
        chosen = made["options"]
    rates = plan.rates if name in va.METHODS else plan.whole_rates
    best = rates[0]
    if len(rates) > 1:
        tried = {rate: run(contest, Job(name, chosen, rate, SEARCH_SEED, "val"), folder)["score"] for rate in rates}
        worst = -math.inf
        best = max(rates, key=lambda r: worst if tried[r] is None else contest.better * tried[r])
        found["tried"] = {f"{rate:g}": score for rate, score in tried.items()}
    jobs = [Job(name, chosen, best, seed, "test") for seed in range(plan.seeds)]
    return found | {"rate": best, "runs": [run(contest, job, folder) for job in jobs]}


def base_score(task: str, plan: Plan) -> float:
    """The score of the base on the test images, which needs no training."""
    begin()
    contest, path = CONTESTS[task](plan.steps), plan.runs / task / "base.json"
    found = stored(path, contest.settings())
    if found is None:
        found = keep(path, contest.settings(), {"score": contest.score(contest.task([], Trains(), 0.0, 0), "test")})
    return float(found["score"])
