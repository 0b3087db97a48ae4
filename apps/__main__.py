"""``python -m apps NAME``: the same as ``visadapt app NAME``."""

import sys

from visadapt.cli.app import run

sys.exit(run(sys.argv[1:]))
