"""One few-shot training of the shipped base: rows, settings, the loop and its figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn

import visadapt as va
from visadapt.backbones import TimmViT
from visadapt.callbacks.calibrate import Calibrate
from visadapt.core.calibrate import calibrate
from visadapt.core.stack import TaskStack
from visadapt.core.train import after_backward, after_step, before_step
from visadapt.data.digits import Digits
from visadapt.optim.schedule import Schedule
from visadapt.tasks.classification import Classification

TARGETS = ["attention", "mlp"]
BATCH = 32


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: What the table says.
        adapter: Makes the method, or None.
        trains: ``Classification.train``.
        pretrained: Start from the base rather than from random weights.
    """

    name: str
    adapter: Callable[[], va.Adapter] | None = None
    trains: Literal["adapters", "head", "all"] = "adapters"
    pretrained: bool = True


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    base: str = "tiny_digits"
    domain: str = "inverted"
    source: str = "upright"
    shots: int = 10
    steps: int = 300


METHODS = [name for name, method in va.METHODS.items() if not issubclass(method, TaskStack)]


def rows(rank: int) -> list[Row]:
    """The reference rows, then every method of the catalogue that is not for sequences of tasks."""
    references = [
        Row("frozen base"),
        Row("linear probe", trains="head"),
        Row("from scratch", trains="all", pretrained=False),
        Row("full fine-tuning", trains="all"),
    ]
    return references + [Row(name, partial(prototype, name, rank)) for name in METHODS]


def prototype(name: str, rank: int) -> va.Adapter:
    """A method with its defaults, at the rank of the table if it has one."""
    method = va.METHODS[name]
    return method(rank=rank) if "rank" in method().hparams() else method()


def build(row: Row, setting: Setting, seed: int) -> Classification:
    """The task of a row, built and adapted."""
    torch.manual_seed(seed)
    adaptations = [va.Adaptation(row.adapter(), TARGETS)] if row.adapter else []
    trains = "head" if row.name == "frozen base" else row.trains
    task = Classification(
        TimmViT(setting.base, pretrained=row.pretrained), 10, adaptations, train=trains, label_smoothing=0.1
    )
    task.configure_model()
    return task


def data(setting: Setting, task: Classification, seed: int) -> Digits:
    """The data module of a seed, with the backbone's transform."""
    found = Digits(setting.domain, setting.source, setting.shots, batch_size=BATCH, seed=seed, drop_last=True)
    found.transform = task.preprocess(train=False)
    return found


def fit(task: Classification, module: Digits, lr: float, steps: int) -> float:
    """Train a task by hand; returns seconds of process time."""
    model = task.train()
    optimizer = torch.optim.AdamW(va.parameter_groups(task.model, lr, weight_decay=0.05))
    scheduler = Schedule(warmup=0.1).scheduler(optimizer, steps)
    loader = module.train_dataloader()
    calibrate(task.model, (task.criterion(model(x), y) for x, y in islice(loader, Calibrate().batches)))
    started, step, epoch = time.process_time(), 0, 0
    while step < steps:
        loader.batch_sampler.set_epoch(epoch)
        for images, labels in loader:
            before_step(task.model, step, steps)
            loss = task.criterion(model(images), labels) + va.penalty(task.model)
            optimizer.zero_grad()
            loss.backward()
            after_backward(task.model)
            optimizer.step()
            after_step(task.model)
            scheduler.step()
            step += 1
            if step == steps:
                break
        epoch += 1
    return time.process_time() - started


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any) -> float:
    """Share of a loader's samples that are told right."""
    model.eval()
    right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return torch.cat(right).mean().item()


@dataclass(frozen=True)
class Job:
    """One training: validated if ``validate``, else tested."""

    row: Row
    setting: Setting
    lr: float
    seed: int
    validate: bool


def run(job: Job) -> dict[str, float]:
    """Train and measure; runs in a process of its own, on one thread."""
    torch.set_num_threads(1)
    task = build(job.row, job.setting, job.seed)
    module = data(job.setting, task, job.seed)
    seconds = fit(task, module, job.lr, job.setting.steps)
    found = {"seconds": seconds, "parameters": float(trainable(task))}
    if job.validate:
        return found | {"accuracy": accuracy(task.model, module.val_dataloader())}
    found["accuracy"] = accuracy(task.model, module.test_dataloader())
    if job.row.adapter is not None:
        with va.strength(task.model, 0.0):
            found["source_off"] = accuracy(task.model, module.source_dataloader())
    return found


def trainable(task: nn.Module) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in task.parameters() if p.requires_grad)
