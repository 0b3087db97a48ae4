"""``visadapt inspect``: recognise an adapter file from its header alone; no torch, nothing is executed."""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visadapt.cli.errors import UserError
from visadapt.cli.recognise import recognise

DIFFUSERS = "pytorch_lora_weights.safetensors"  # diffusers' own file name
_KINDS = 24  # rows of the table of tensors
MAX_HEADER = 100_000_000  # the bound of the safetensors library itself


@dataclass
class Tensor:
    """Header entry of a tensor; ``offset`` is where its bytes begin in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0

    @property
    def size(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


@dataclass
class Description:
    """What a file is.

    Args:
        path: The file or folder.
        kind: Format, for people.
        tensors: Header entries, in the order of the file.
        facts: Rows to print: base, sets, hyper-parameters, targets.
        weights: The safetensors file itself, or None for other formats.
    """

    path: Path
    kind: str
    tensors: list[Tensor] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    weights: Path | None = None


def read_header(path: Path) -> tuple[dict[str, str], list[Tensor]]:
    """Metadata and tensor list of a safetensors file: 8 bytes of length, then JSON.

    Raises:
        UserError: the file is not safetensors, or it is cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise UserError(str(path), "this is not a safetensors file, or it is cut off")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError:
            raise UserError(str(path), "the header of this safetensors file is broken") from None
    metadata = header.pop("__metadata__", {})
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end > size:
        raise UserError(str(path), f"the file is cut off: {size:,} of {8 + length + end:,} bytes")
    start_of_data = 8 + length
    return metadata, [
        Tensor(k, tuple(v["shape"]), v["dtype"], start_of_data + v["data_offsets"][0]) for k, v in header.items()
    ]


def describe(path: Path) -> Description:
    """Recognise a file or folder.

    Raises:
        UserError: it is none that visadapt knows, or what it says of itself is broken.
    """
    try:
        return _describe(path)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(str(path), "what it says of itself is broken", f"{type(error).__name__}: {error}") from error


def _describe(path: Path) -> Description:
    if path.is_dir() and (path / DIFFUSERS).is_file():
        return describe(path / DIFFUSERS)
    if path.is_dir():
        return _folder(path)
    if zipfile.is_zipfile(path):
        return _checkpoint(path)
    metadata, tensors = read_header(path)
    if "visadapt" in metadata:
        kind, facts = "visadapt adapter", _visadapt(json.loads(metadata["visadapt"]))
    else:
        kind, facts = recognise(path, metadata, tensors)
    return Description(path, kind, tensors, facts, path)


def _visadapt(plan: dict[str, Any]) -> list[tuple[str, str]]:
    from visadapt.report.facts import patterns

    base = plan.get("base", {})
    facts = [("base", f"{base.get('name', 'unknown')}  sha256 {base.get('sha256', '')[:16]}")]
    for group in plan["sets"]:
        method = group["method"].rpartition(".")[2]
        values = ", ".join(f"{k}={v}" for k, v in group["hparams"].items())
        sites = list(group["sites"])
        facts.append((f"set '{group['name']}'", f"{method}({values})"))
        facts.append(("  targets", f"{patterns(sites)}  ({len(sites)} layers)"))
        changed = {k: v for k, v in group["sites"].items() if v}
        if changed:
            facts.append(("  overrides", ", ".join(f"{k}: {v}" for k, v in list(changed.items())[:4])))
    facts.append(("loads in", "visadapt; `visadapt export` writes it for other tools"))
    return facts


def _folder(folder: Path) -> Description:
    """A PEFT folder, or one with a PEFT folder for each part of a diffusion model."""
    inside = [] if (folder / "adapter_config.json").is_file() else sorted(folder.glob("*/adapter_config.json"))
    if not inside:
        return _peft_folder(folder)
    found = {config.parent.name: _peft_folder(config.parent) for config in inside}
    tensors = [tensor for part in found.values() for tensor in part.tensors]
    facts = [(f"{name} {key}", value) for name, part in found.items() for key, value in part.facts]
    return Description(folder, "PEFT folders of the parts of a diffusion model", tensors, facts)


def _peft_folder(folder: Path) -> Description:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if (folder / "model_index.json").is_file():
        raise UserError(str(folder), "this is a whole pipeline in diffusers' layout, no adapter")
    if not config.is_file():
        raise UserError(str(folder), "no adapter in this folder", "a PEFT folder holds adapter_config.json")
    values = json.loads(config.read_text(encoding="utf-8"))
    shown = "base_model_name_or_path r lora_alpha alpha target_modules use_dora use_rslora rank_pattern "
    shown += "alpha_pattern modules_to_save"
    facts = [("method", str(values.get("peft_type", "unknown")))]
    facts += [(key, _value(values[key])) for key in shown.split() if values.get(key) not in (None, {}, [], "")]
    tensors = read_header(weights)[1] if weights.is_file() else []
    if not tensors:
        facts.append(("weights", "adapter_model.safetensors is missing"))
    read = values.get("peft_type") in ("LORA", "LOKR", "LOHA")
    own = ", visadapt (va.load, visadapt import)" if read else "; visadapt reads LORA, LOKR and LOHA"
    facts.append(("loads in", f"stock PEFT{own}"))
    return Description(folder, "PEFT folder", tensors, facts, weights if tensors else None)


def _checkpoint(path: Path) -> Description:
    """A torch archive; the restricted loader reads it, so it runs nothing either."""
    import torch

    try:
        content = torch.load(path, weights_only=True, map_location="meta", mmap=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(str(path), "not a file that can be read without running code in it", reason) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = [
        Tensor(k, tuple(v.shape), str(v.dtype).removeprefix("torch."))
        for k, v in state.items()
        if isinstance(v, torch.Tensor)
    ]
    facts = []
    if isinstance(content, dict) and "global_step" in content:
        facts = [("training state", f"epoch {content.get('epoch')}, step {content['global_step']}")]
        if base := content.get("base"):
            facts.append(("base", f"{base.get('name')}  sha256 {base.get('sha256', '')[:16]}"))
        facts.append(("resume", f"visadapt fit --config CONFIG --ckpt_path {path}"))
    kind = "training checkpoint (Lightning)" if facts else "torch archive of tensors"
    return Description(path, kind, tensors, facts)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:8])) + (f" … ({len(value)})" if len(value) > 8 else "")
    if isinstance(value, dict) and len(value) > 4:
        return f"{', '.join(map(str, sorted(set(value.values()))))} ({len(value)} layers of their own)"
    return str(value)


def show(found: Description, norms: bool) -> None:
    """Print a description as tables; with ``norms`` also the norm of each tensor."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    parameters = sum(t.size for t in found.tensors)
    console.print(f"{found.path}: {found.kind}", style="bold", markup=False, highlight=False, soft_wrap=True)
    head = Table(show_header=False)
    head.add_column(style="bold")
    head.add_column(overflow="fold")
    for key, value in found.facts:
        head.add_row(key, value)
    head.add_row("tensors", f"{len(found.tensors)}, {parameters:,} numbers")
    if found.path.is_file():
        head.add_row("size", f"{found.path.stat().st_size:,} bytes")
    console.print(head)
    if norms and found.weights is None:
        raise UserError(str(found.path), "norms are read from safetensors files only")
    console.print(_norms(found.weights) if norms and found.weights else _tensors(found.tensors))


def _tensors(tensors: list[Tensor]) -> Any:
    """Tensors with the numbers of the blocks folded, one row per kind and shape."""
    from rich.table import Table

    table = Table("tensor", "shape", "type", "count", title="Tensors", title_justify="left")
    groups: dict[tuple[str, ...], int] = {}
    for t in tensors:
        name = re.sub(r"(?<=[._])\d+(?=[._])", "*", t.name)
        key = (name, "×".join(map(str, t.shape)) or "scalar", t.dtype)
        groups[key] = groups.get(key, 0) + 1
    for (name, shape, dtype), count in list(groups.items())[:_KINDS]:
        table.add_row(name, shape, dtype, str(count))
    if len(groups) > _KINDS:
        rest = sum(list(groups.values())[_KINDS:])
        table.caption = f"{len(groups) - _KINDS} more kinds, {rest} tensors (--norms lists every tensor)"
    return table


def _norms(weights: Path) -> Any:
    """Frobenius norm and largest magnitude of each tensor."""
    from rich.table import Table
    from safetensors import safe_open

    table = Table("tensor", "shape", "norm", "largest", title="Norms", title_justify="left")
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name).float()
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            table.add_row(name, "×".join(map(str, tensor.shape)), f"{float(tensor.norm()):.4g}", f"{largest:.3g}")
    return table
