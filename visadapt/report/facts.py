"""What a run was and what it reached: collected once, then written as JSON, model card and table."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from torch import nn

from visadapt.core.files import replacing

FILE, ADAPTER = "run.json", "adapter.safetensors"


@dataclass
class AdapterSet:
    """The adapters of one name and method.

    Args:
        name: Name of the set.
        method: Class name of the method.
        hparams: Hyper-parameters; where layers differ, those of the first.
        layers: Names of the adapted layers, with their rows.
        parameters: Numbers in all its tensors.
    """

    name: str
    method: str
    hparams: dict[str, Any]
    layers: list[str]
    parameters: int


@dataclass
class RunFacts:
    """Facts of one run. Figures are shares (accuracy, IoU) or values as the task reports them.

    ``kind`` is the ``report_kind`` of the task: "classes", "masks", "pictures" or "videos".
    """

    name: str
    task: str
    base: str
    base_hash: str = ""
    kind: str = "classes"
    sets: list[AdapterSet] = field(default_factory=list)
    trainable: int = 0
    total: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    epochs: int = 0
    steps: int = 0
    minutes: float = 0.0
    step_ms: float | None = None
    peak_memory_mib: float | None = None
    memory_kind: str = ""
    device: str = "cpu"
    adapter_bytes: int = 0
    resumed_from: str | None = None
    started_from: str | None = None
    date: str = field(default_factory=lambda: date.today().isoformat())
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write ``run.json`` (renamed into place)."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_facts(beside: str | Path) -> dict[str, Any]:
    """The ``run.json`` of the run that a file belongs to, up to two folders above it; empty without one."""
    for folder in list(Path(beside).resolve().parents)[:3]:
        if (folder / FILE).is_file():
            return json.loads((folder / FILE).read_text(encoding="utf-8"))
    return {}


def adapter_sets(model: nn.Module) -> list[AdapterSet]:
    """The adapters of a model, grouped by name and method, in the model's order."""
    import visadapt as va

    sets: dict[tuple[str, str], AdapterSet] = {}
    for row, adapter in zip(va.summary(model).rows, va.adapters(model).values(), strict=True):
        key = (row.name, row.method)
        entry = sets.setdefault(key, AdapterSet(*key, adapter.hparams(), [], 0))
        entry.layers.append(row.layer)
        entry.parameters += row.parameters
    return list(sets.values())


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    from importlib.metadata import version

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    return found | {name: version(name) for name in ("visadapt", "torch", "timm", "lightning")}


def patterns(layers: list[str]) -> str:
    """Layer names with their numbers folded: ``blocks.*.attn.qkv`` for all blocks of a model.

    Many kinds of layers, as a UNet has, are told apart by the first and the last names only.
    """
    folded = dict.fromkeys(".".join("*" if part.isdigit() else part for part in layer.split(".")) for layer in layers)
    if len(folded) > 8:
        folded = dict.fromkeys(re.sub(r"^(\w+)\..*?((?:\.\w+){2}(?:\.\*)?)$", r"\1.*\2", name) for name in folded)
    return ", ".join(folded)


def readable(path: Path) -> str:
    """The path as one types it: relative where it lies below the working directory."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
