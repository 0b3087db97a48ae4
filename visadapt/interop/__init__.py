"""Files of other tools: written so that those tools load them, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from torch import nn

from visadapt.core.state import load_native
from visadapt.interop.peft import export_peft, import_peft

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["export", "export_peft", "import_peft", "load"]


def load(model: Model, path: str | Path, strict: bool = False, name: str | None = None) -> Model:
    """Rebuild the adapters of a visadapt file or a PEFT folder on a model.

    Args:
        model: the base.
        path: `adapter.safetensors` of visadapt, or a folder with `adapter_config.json`.
        strict: refuse a base that is not the one it was trained on, instead of warning.
        name: name of the set.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the file is of another kind or does not fit the model.
    """
    if Path(path).is_dir():
        return import_peft(model, path, name or "default")
    return load_native(model, path, strict, name)


def export(model: nn.Module, path: str | Path, format: Literal["peft"] = "peft", rank: int | None = None) -> float:
    """Write the adapters in the format of another tool.

    Args:
        model: the adapted model.
        path: folder to write.
        format: "peft".
        rank: rank of the SVD for methods that are not low-rank; None refuses them.

    Returns:
        The largest relative error of a layer's update; 0.0 if all are exact.

    Raises:
        ValueError: an unknown format, or a change that the format cannot hold.
    """
    if format != "peft":
        raise ValueError(f"format {format!r} is not written; there is 'peft'")
    return export_peft(model, path, rank)
