"""Text-to-video on two processes makes the steps of one, also where sets rest, or differ by process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_video import video_base
from tests.video_processes import CASES

SCRIPT = Path(__file__).parents[1] / "video_processes.py"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(tmp_path, case):
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        command = [sys.executable, str(SCRIPT), str(folder), video_base(), "--devices", str(devices), "--case", case]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, *two = (torch.load(tmp_path / file) for file in ("1/weights_0.pt", "2/weights_0.pt", "2/weights_1.pt"))
    assert len(one) > 8
    for name, tensor in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
