"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
