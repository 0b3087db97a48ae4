"""Cutting adapter files to a rank: methods that order their components become plain LoRAs. No base is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visadapt.cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from visadapt.core.adapter import Adapter


def truncate_file(file: Path, output: Path, rank: int | None) -> None:
    """Write the components that matter most as LoRA, set by set and layer by layer; what else was trained stays."""
    from visadapt.core.files import replacing, serialise
    from visadapt.core.state import find_method, read
    from visadapt.interop.files import read_keys
    from visadapt.methods import METHODS, LoRA

    if output.suffix != ".safetensors":
        raise UserError("--output", f"'{output}' should end in .safetensors")
    if rank is not None and rank < 1:
        raise UserError("--rank", f"{rank} is no rank", "give 1 or more")
    plan, held = read(file)
    metadata = read_keys(file)[0]
    left, ranks = 0, []
    for entry in plan["sets"]:
        method: type[Adapter] = find_method(entry["method"])
        sites = {}
        for label, overrides in entry["sites"].items():
            prefix = _prefix(label, entry["name"], held)
            mine = {k.removeprefix(prefix): held.pop(k) for k in list(held) if k.startswith(prefix)}
            down, up = _cut(method(**{**entry["hparams"], **overrides}), mine, rank)
            held |= {f"{prefix}down": down, f"{prefix}up": up}
            sites[label] = {"rank": len(down)}
            ranks.append(len(down))
            left += down.numel() + up.numel()
        lora = METHODS["LoRA"]
        entry.update(method=f"{lora.__module__}.{lora.__qualname__}", hparams=LoRA(rank=max(ranks)).hparams())
        entry["sites"] = {k: v if v["rank"] != max(ranks) else {} for k, v in sites.items()}
    with replacing(output) as temporary:
        temporary.write_bytes(serialise(held, {**metadata, "visadapt": json.dumps(plan)}))
    spread = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    print(f"{output}: LoRA of {spread} on {len(ranks)} layers, {left:,} numbers, {output.stat().st_size:,} bytes")


def _prefix(label: str, name: str, held: dict[str, Tensor]) -> str:
    """Where the tensors of a target are: `layer:part` at `layer.adapters.name_part.`, a parameter's at its module."""
    head, _, part = label.partition(":")
    tail = f"_{part.replace('/', 'of')}" if part else ""
    layer, _, param = head.rpartition(".")
    for path in (f"{head}.adapters.{name}{tail}.", f"{layer}.adapters.{name}_{param}{tail}."):
        path = path.removeprefix(".")
        if any(k.startswith(path) for k in held):
            return path
    raise ValueError(f"the file names the target '{label}', and holds no tensors of it")


def _cut(adapter: Any, mine: dict[str, Tensor], rank: int | None) -> tuple[Tensor, Tensor]:
    """Down and up of the components kept, with every scale in them."""
    from visadapt.core.adapter import LowRank

    if not isinstance(adapter, LowRank):
        raise ValueError(
            f"{type(adapter).__name__} has no components to cut; `visadapt export --rank` takes the nearest low rank"
        )
    for name, tensor in mine.items():
        if "." not in name:
            adapter.register_buffer(name, tensor)
    down, up = adapter.components(rank)
    return down.contiguous().clone(), up.contiguous().clone()
