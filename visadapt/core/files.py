"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside a file, to write to: with the end of the block it takes the file's place.

    After an error, also one in the middle of writing, the file is as it was and the temporary one is gone; a process
    that is killed leaves the file as it was. The folder is made if it is missing.

    Args:
        path: the file to make or to replace.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_state(model: nn.Module, path: str | Path) -> int:
    """Write the plain state dict of a model as safetensors; returns the number of tensors."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        temporary.write_bytes(serialise(state, {"format": "pt"}))
    return len(state)


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file: the same ones for the same content.

    The library writes several entries of metadata in another order each time; here they are sorted. (Its `save_file`
    besides makes files that only their owner can read.)

    Args:
        tensors: contiguous tensors that share no memory.
        metadata: strings.
    """
    content = save(dict(tensors), dict(metadata))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[start:]
