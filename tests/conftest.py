"""Its presence puts the repository on the import path: test folders share `tests.tiny`, `tests.training`.

One thread per process, for tests and for what they start: two workers on two cores are several times
faster than two processes of two threads each.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
