"""Named sets of tensors in a folder of bounded size; the least recently used ones go first."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from visadapt.core.files import replacing

_SUFFIX = ".safetensors"
_STALE = 3600.0  # seconds after which a temporary file has lost its writer


class DiskCache:
    """Several processes may share a folder: files appear whole, and one that vanished is a miss.

    Args:
        folder: Where the files lie; made when the first one is written.
        max_bytes: Size of all files together. Each process looks at the folder again after writing a twentieth of
            it, so several of them may exceed it by that much each.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"cache max_bytes: {max_bytes}, but a size cannot be negative")
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes
        self._total: int | None = None  # bytes in the folder, as far as this process knows
        self._written = 0  # bytes since it looked
        self._broken = False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors under a key; None if there are none, or their file is damaged (it is removed)."""
        path = self._path(key)
        try:
            found = load_file(path)
        except SafetensorError:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        except OSError:
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read
            os.utime(path)  # used now
        return found

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a key, unless they are larger than the whole cache or cannot be written (one warning)."""
        size = sum(t.numel() * t.element_size() for t in tensors.values()) + 4096
        if size > self.max_bytes or self._broken:
            return
        path = self._path(key)
        try:
            self._make_room(size)
            with replacing(path) as temporary:
                save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
        except (OSError, SafetensorError) as error:
            self._broken = True
            warnings.warn(f"cache '{self.folder}' cannot be written ({error}); going on without it", stacklevel=2)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def _make_room(self, size: int) -> None:
        known = self._total
        if known is None or known + size > self.max_bytes or self._written > self.max_bytes // 20:
            known, self._written = self._evict(self.max_bytes - size), 0
        self._total = known + size
        self._written += size

    def _evict(self, limit: int) -> int:
        """Delete the least recently used files beyond a limit, and some more so that this stays rare."""
        files = []
        now = time.time()
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
                if path.suffix == ".tmp" and now - status.st_mtime > _STALE:
                    path.unlink()
                elif path.suffix == _SUFFIX:
                    files.append((status.st_mtime_ns, status.st_size, path))
            except FileNotFoundError:  # another process was faster
                continue
        total = sum(size for _, size, _ in files)
        if total <= limit:
            return total
        for _, size, path in sorted(files):
            if total <= 0.9 * limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total
