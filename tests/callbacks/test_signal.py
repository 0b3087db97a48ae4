"""Ctrl-C saves what the run has reached; a second one does not wait."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest

from tests.training import train
from visadapt.callbacks.save_on_signal import SaveOnSignal

SCRIPT = Path(__file__).parents[1] / "training.py"


def test_ctrl_c_saves_and_says_where(tmp_path):
    folder = tmp_path / "cut"
    line = [sys.executable, str(SCRIPT), str(folder), "--kill-at", "4", "--signal", str(int(signal.SIGINT))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    left = subprocess.run([*line, "--workers", "2"], env=env, capture_output=True, text=True, timeout=300)
    assert left.returncode == 128 + signal.SIGINT, left.stderr
    assert "Traceback" not in left.stderr
    assert left.stderr.count("Ctrl-C again stops at once") == 1
    path = folder / "last.ckpt"
    assert f"visadapt: stopped by Ctrl-C at step 5; resume with --ckpt_path {path}" in left.stderr
    assert len(train(folder, resume=path).losses) == 18 - 5


class Twice(L.Callback):
    """Two in the middle of one step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as left:  # what Lightning makes of KeyboardInterrupt
            train(tmp_path, Twice())
        assert left.value.code == 1
        assert not (tmp_path / "last.ckpt").exists()
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_worker_of_a_loader_outlives_the_first(capfd):
    callback = SaveOnSignal()
    callback._note(signal.SIGINT, None)  # not the process that speaks
    assert callback.received == signal.SIGINT
    assert not capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        callback._note(signal.SIGINT, None)
