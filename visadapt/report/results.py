"""Held-out samples, predictions and names that the report asks a trainer, a task and its data for."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from visadapt.data.loader import ExactLoader
from visadapt.report import evaluate

K = TypeVar("K")


def network(task: Any) -> nn.Module:
    """The network that carries the adapters: ``task.model``, or the task itself."""
    model = getattr(task, "model", None)
    return model if isinstance(model, nn.Module) else task


def samples(trainer: Any, most: int) -> Subset | None:
    """At most so many held-out samples, spread evenly over the test (else validation) set."""
    data = getattr(trainer, "datamodule", None)
    found = evaluate.held_out(data) if data is not None else None
    return None if found is None else Subset(found, evaluate.spread(len(found), most))


def predict(trainer: Any, task: Any, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of a whole dataset on this process alone, without touching random states."""
    data = trainer.datamodule
    size = getattr(data, "batch_size", 32)
    loader = ExactLoader(dataset, size, seed=getattr(data, "seed", 0), collate=data.collate)
    with trainer.precision_plugin.forward_context():
        return evaluate.predictions(task, loader)


def source_accuracy(trainer: Any, task: Any) -> tuple[int, int] | None:
    """Right and all samples of the original domain with the adapters off; None where it cannot be said.

    A head that is trained too has no "off", and without adapters there is nothing to switch.
    """
    import visadapt as va

    model = network(task)
    source = getattr(trainer.datamodule, "source_dataloader", None)
    own = {id(p) for adapter in va.adapters(model).values() for p in adapter.parameters()}
    if source is None or not own or any(p.requires_grad and id(p) not in own for p in task.parameters()):
        return None
    loader = source()
    if loader is None:
        return None
    with va.strength(model, 0.0):
        labels, found = predict(trainer, task, loader.dataset)
    return int((labels == found).sum()), len(labels)


def domain(trainer: Any, source: bool = False) -> str:
    """Name of the domain of the data, or of the original one."""
    fallback = "original domain" if source else "held-out data"
    return str(getattr(trainer.datamodule, "source_domain" if source else "domain", None) or fallback)


def base_name(task: Any) -> str:
    """Name of the base network, as its backbone gives it."""
    name = getattr(getattr(task, "backbone", None), "name", None)
    return str(name or type(network(task)).__name__)


def to_tensorboard(trainer: Any, tag: str, image: np.ndarray) -> None:
    """Show a picture (height, width, 3) in each TensorBoard logger."""
    from lightning.pytorch.loggers import TensorBoardLogger

    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, image, trainer.global_step, dataformats="HWC")


def peak_memory() -> tuple[float, str]:
    """Peak memory in MiB and what it is: of the device's allocator on CUDA, else of the whole process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20, "tensors on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return float("nan"), "unknown"
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, "whole process"


def in_peft(model: nn.Module) -> bool:
    """Whether a PEFT folder holds the adapters exactly: tried, not guessed from the method."""
    import visadapt as va

    if not va.adapters(model):
        return False
    with TemporaryDirectory() as folder:
        try:
            va.export(model, Path(folder) / "peft")
        except ValueError:
            return False
    return True


def base_hash(task: Any) -> str:
    """Hash of the base weights, as the task took it before it adapted them; empty if it took none."""
    return str((getattr(task, "base", None) or {}).get("sha256", ""))


def gathered(trainer: Any, rows: dict[K, Any]) -> dict[K, Any]:
    """The rows of all ranks by a key such as the index of the sample (a sample that two ranks saw counts once)."""
    if trainer.world_size == 1:
        return rows
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, rows)
    return {index: row for part in parts for index, row in part.items()}
