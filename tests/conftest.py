"""Its presence puts the repository on the import path: test folders share `tests.tiny`, `tests.training`.

One thread per process, for tests and for what they start: two workers on two cores are several times
faster than two processes of two threads each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch, whatever the environment says: sums are then the same bits in every process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
