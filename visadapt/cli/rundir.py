"""Where a run writes: one folder for weights, metrics, events, pictures and the model card; and what it left there."""

from __future__ import annotations

import itertools
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from visadapt.cli.main import find_config
from visadapt.report.facts import ADAPTER


def config_name(config: str | None, fallback: str = "run") -> str:
    """Name of a run: that of its configuration, and that of the first run where ``config`` is a run's own."""
    if not config:
        return fallback
    path = Path(config).resolve()
    return path.parent.parent.name if path.name == "config.yaml" else path.stem


def new_run_dir(command: str, config: str | None, made_by_run: str | None, fallback: str = "run") -> Path:
    """Folder of a new run: ``runs/<name>/<time>``, or ``<run>/<command>`` where it uses what a run has made.

    Args:
        command: fit, validate, test or predict.
        config: Last configuration file of the command line.
        made_by_run: Checkpoint or adapter file that the command reads.
        fallback: Name where there is no configuration file.
    """
    if command != "fit" and made_by_run and (found := find_config(made_by_run)):
        return found.parent / command
    base = Path("runs") / config_name(config, fallback)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    path, n = base / stamp, 1
    while path.exists():  # two runs started within one second
        path, n = base / f"{stamp}-{n}", n + 1
    return path


def discard(run_dir: Path) -> None:
    """Remove the folder of a run that failed before it began: it holds nothing but TensorBoard's empty file."""
    files = [path for path in run_dir.rglob("*") if path.is_file()] if run_dir.is_dir() else []
    if not files or any("tfevents" not in path.name for path in files):
        return
    for path in files:
        path.unlink()
    for folder in (run_dir, run_dir.parent, run_dir.parent.parent):
        if next(folder.iterdir(), None) is not None:
            break
        folder.rmdir()


def loggers(run_dir: Path, command: str) -> list[Any] | bool:
    """Loggers that write into ``run_dir``: CSV, TensorBoard too for ``fit``, none for ``predict``.

    Lightning's CSV logger deletes the table of a run that goes on in its folder: that is kept, as ``metrics_1.csv`` and
    so on.
    """
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    if command == "predict":
        return False
    table = run_dir / "metrics.csv"
    if getattr(rank_zero_only, "rank", 0) == 0 and table.is_file():
        earlier = (run_dir / f"metrics_{number}.csv" for number in itertools.count(1))
        table.rename(next(path for path in earlier if not path.exists()))
    places: dict[str, Any] = {"save_dir": str(run_dir.parent), "name": "", "version": run_dir.name}
    csv = CSVLogger(**places)
    return [csv, TensorBoardLogger(**places, default_hp_metric=False)] if command == "fit" else [csv]


def set_names(paths: list[str]) -> list[str | None]:
    """Names of the sets of several adapter files; one file alone keeps its own.

    The name of the file, or of its folder where that is always the same ("adapter"), and of the folder above that
    where it is a time: ``runs/subject/20250101-120000/adapter.safetensors`` is "subject".
    """
    if len(paths) < 2:
        return [None] * len(paths)
    found: list[str | None] = []
    for path in map(Path, paths):
        parts = [path.stem if path.is_file() else path.name, *(folder.name for folder in path.resolve().parents)]
        usual = ("adapter", "pytorch_lora_weights", "peft_adapter", "diffusers_adapter")
        stem = next((p for p in parts if p not in usual and not re.fullmatch(r"[\d-]*", p)), "set")
        name = re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-") or "set"
        found.append(name if name not in found else f"{name}-{len(found) + 1}")
    return found


def adapter_file(path: str) -> str:
    """The adapter file of a run's folder; anything else as it is."""
    inside = Path(path) / ADAPTER
    return str(inside) if inside.is_file() else path
