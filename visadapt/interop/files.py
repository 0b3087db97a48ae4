"""Safetensors files of other tools: written whole or not at all, and read with one message for what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from visadapt.core.files import replacing, serialise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write fp32 copies of tensors under a temporary name, then rename.

    Raises:
        ValueError: a tensor holds NaN or infinity.
    """
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise ValueError(f"'{bad[0]}' is not finite ({len(bad)} of {len(tensors)} tensors); nothing was written")
    replace_bytes(path, serialised(tensors, metadata))


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as they are, in their own precision."""
    replace_bytes(path, serialise(tensors, metadata))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file with fp32 copies of the tensors."""
    held = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return serialise(held, metadata)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"'{path}' is no complete safetensors file: {error}") from error


def read_keys(path: Path) -> tuple[dict[str, str], list[str]]:
    """Metadata and tensor names of a safetensors file; nothing of any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, list(file.keys())
    except (SafetensorError, OSError):
        return {}, []
