"""What a command refuses before it starts: folders that are not its own, places it cannot write, negative numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from visadapt.cli.errors import UserError

RESOLVED = ("last", "best", "hpc", "registry")  # names of checkpoints that Lightning looks up itself


def place(command: str, run_dir: Path, checkpoint: str | None) -> None:
    """Check the folder of a run in its first process alone: the others start when that one may have written.

    Raises:
        UserError: it cannot be written to, or a new run would overwrite what it holds.
    """
    from lightning.fabric.utilities import rank_zero

    if getattr(rank_zero.rank_zero_only, "rank", 0):
        return
    unwritable(run_dir, "--run_dir", folder=True)
    if command == "fit":
        taken(run_dir, checkpoint)


def taken(run_dir: Path, checkpoint: str | None) -> None:
    """A new run goes into a folder of its own; only one that goes on from a checkpoint in it may write there.

    The events file that TensorBoard leaves when a run fails before it begins does not count.

    Args:
        run_dir: Folder that the command line chose.
        checkpoint: What it resumes from.

    Raises:
        UserError: the folder holds something else.
    """
    if not run_dir.is_dir() or all("tfevents" in path.name for path in run_dir.iterdir()):
        return
    if checkpoint in RESOLVED:
        return
    if checkpoint and Path(checkpoint).resolve().is_relative_to(run_dir.resolve()):
        return
    last = run_dir / "checkpoints" / "last.ckpt"
    resume = f", or go on with --ckpt_path {last}" if last.is_file() else ""
    held = "a run already" if (run_dir / "config.yaml").is_file() else "files already"
    raise UserError("--run_dir", f"the folder '{run_dir}' holds {held}", f"choose another --run_dir{resume}")


def unwritable(path: Path, option: str, folder: bool = False) -> None:
    """Check that a file, or with ``folder`` a folder, can be made at ``path``.

    Raises:
        UserError: a file stands in the way, or its folder is not ours to write into.
    """
    place = path if folder else path.absolute().parent
    while not place.exists() and place != place.parent:
        place = place.absolute().parent
    if not place.is_dir():
        raise UserError(option, f"'{place}' is a file, not a folder", f"choose another {option}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(option, f"the folder '{place}' cannot be written to", f"choose another {option}")


def negative(config: Any) -> None:
    """Numbers below zero that would end in a traceback of torch or numpy.

    Args:
        config: That of one command: ``model`` and ``data`` with their ``init_args``.

    Raises:
        UserError: one of them is negative.
    """
    data, model = (_inside(config.get(part)) for part in ("data", "model"))
    optimizer = _inside(model.get("optimizer"))
    for key, value, hint in (
        ("data.num_workers", data.get("num_workers"), "0 reads the data in the process itself"),
        ("data.seed", data.get("seed"), "give 0 or more"),
        ("model.optimizer.init_args.lr", optimizer.get("lr"), "give a small positive number such as 1e-3"),
    ):
        if isinstance(value, (int, float)) and value < 0:
            raise UserError(key, f"must not be negative, got {value}", hint)


def _inside(part: Any) -> Any:
    """The options of a class of the configuration; an empty mapping where there are none."""
    return (part.get("init_args") if hasattr(part, "get") else None) or {}
