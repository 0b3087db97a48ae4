"""A text-to-image run that SIGKILL ends in mid-epoch and that is resumed writes the same adapter file, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.diffusion_killed import CASES, KILL_AT, run
from tests.tiny_diffusion import tiny_pipeline

SCRIPT = Path(__file__).parents[1] / "diffusion_killed.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_pipeline(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def killed(base, tmp_path_factory):
    """A folder with what each killed run has left."""
    folder = tmp_path_factory.mktemp("killed")
    root = str(SCRIPT.parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, str(SCRIPT), str(folder), base, *CASES]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_sigkill_and_resume_give_the_file_of_an_unbroken_run(killed, base, tmp_path, case):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cut = killed / case
        assert not (cut / "adapter.safetensors").exists()
        assert torch.load(cut / "last.ckpt")["global_step"] == KILL_AT - 1
        whole = run(tmp_path / "whole", base, case)
        resumed = run(cut, base, case, resume=cut / "last.ckpt")
    finally:
        torch.set_num_threads(before)
    assert resumed.read_bytes() == whole.read_bytes()
    assert (tmp_path / "whole" / "cache").is_dir() == ("cached" in case)
