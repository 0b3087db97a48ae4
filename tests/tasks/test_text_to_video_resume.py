"""A text-to-video run that SIGKILL ends in mid-epoch and that is resumed writes the same adapter file, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.diffusion_killed import KILL_AT
from tests.tiny_video import video_base
from tests.video_killed import CASES, run

SCRIPT = Path(__file__).parents[1] / "video_killed.py"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with what each killed run has left."""
    folder = tmp_path_factory.mktemp("killed")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), str(folder), video_base(), *CASES]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES)
def test_sigkill_and_resume_give_the_file_of_an_unbroken_run(killed, tmp_path, case):
    cut = killed / case
    assert not (cut / "adapter.safetensors").exists()
    assert torch.load(cut / "last.ckpt")["global_step"] == KILL_AT - 1
    whole = run(tmp_path / "whole", video_base(), case)
    resumed = run(cut, video_base(), case, resume=cut / "last.ckpt")
    assert resumed.read_bytes() == whole.read_bytes()
    assert (tmp_path / "whole" / "cache").is_dir() == ("cached" in case)
