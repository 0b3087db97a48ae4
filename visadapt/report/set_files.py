"""An adapter file as one file for each of its sets: a motion, say, to be used with the appearance of another run."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from visadapt.core.files import replacing, serialise
from visadapt.core.state import read


def split_sets(path: Path) -> list[Path]:
    """Write ``<set>.safetensors`` beside a file of several sets, for each of them; none for a file of one.

    What else was trained stays in the whole file alone.

    Args:
        path: Adapter file of visadapt.

    Returns:
        The files.
    """
    plan, tensors = read(path)
    names = list(dict.fromkeys(entry["name"] for entry in plan["sets"]))
    if len(names) < 2:
        return []
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    written = []
    for name in names:
        held = {key: value for key, value in tensors.items() if _set_of(key) == name}
        own = plan | {"sets": [entry for entry in plan["sets"] if entry["name"] == name]}
        target = path.with_name(f"{name}.safetensors")
        with replacing(target) as temporary:
            temporary.write_bytes(serialise(held, metadata | {"visadapt": json.dumps(own)}))
        written.append(target)
    return written


def _set_of(key: str) -> str | None:
    """The set of a tensor, whose key is ``<layer>.adapters.<set>_….<tensor>``."""
    _, marker, tail = f".{key}".rpartition(".adapters.")
    return tail.split(".")[0].split("_")[0] if marker else None
