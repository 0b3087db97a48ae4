"""A killed run continues with the same bits: order, augmentation, dropout, mixup, optimiser, averages."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from tests.training import Crash, CrashAt, Noisy, TinyTask, train, weights
from visadapt.data.loader import ExactLoader

SCRIPT = Path(__file__).with_name("training.py")


pytestmark = pytest.mark.usefixtures("one_thread")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(*args):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


CASES = {
    "mid-epoch": (5, {}),
    "just saved": (6, {}),
    "last batch": (8, {}),
    "epoch end": (9, {}),
    "second epoch": (13, {}),
    "accumulation": (7, {"accumulate_grad_batches": 2, "every": 1}),
    "last batch saved": (9, {"every": 3}),
    "by steps": (13, {"max_epochs": -1, "max_steps": 18}),
    "by steps, at epoch end": (9, {"max_epochs": -1, "max_steps": 18}),
    "both limits": (9, {"max_steps": 18}),
    "limited batches": (10, {"limit_train_batches": 7, "every": 7}),
    "validation within the epoch": (13, {"val_check_interval": 4, "every": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(tmp_path, case):
    batches, options = CASES[case]
    whole = train(tmp_path / "whole", **options)
    with pytest.raises(Crash):
        train(tmp_path / "cut", CrashAt(batches), **options)
    resumed = train(tmp_path / "cut", resume=tmp_path / "cut" / "last.ckpt", **options)
    assert same(weights(whole), weights(resumed))
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    assert 0 < len(resumed.losses) < len(whole.losses)


@pytest.mark.parametrize("batches", [5, 9, 13])
def test_averages_resume_exactly(tmp_path, batches):
    whole = train(tmp_path / "whole", task=TinyTask(ema_decay=0.9))
    with pytest.raises(Crash):
        train(tmp_path / "cut", CrashAt(batches), task=TinyTask(ema_decay=0.9))
    path = tmp_path / "cut" / "last.ckpt"
    resumed = train(tmp_path / "cut", resume=path, task=TinyTask(ema_decay=0.9))
    assert same(weights(whole), weights(resumed))


def test_batches_do_not_depend_on_workers_or_on_the_global_state():
    def batches(workers, start=0):
        loader = ExactLoader(Noisy(10, train=True), 4, shuffle=True, seed=7, num_workers=workers)
        loader.load_state_dict({"epoch": 1, "batches": start})
        state = torch.get_rng_state()
        found = [image for image, _ in loader]
        assert torch.equal(state, torch.get_rng_state())  # augmentation leaves the model's dropout alone
        return found

    whole = batches(0)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(whole, batches(2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], batches(2, start=1), strict=True))
    other = ExactLoader(Noisy(10, train=True), 4, shuffle=True, seed=7)
    assert not torch.equal(next(iter(other))[0], whole[0])  # another epoch, another order


def test_sigkill_with_workers(tmp_path):
    """A real kill with two workers; the resumed run has none, the batches are the same."""
    killed = run(tmp_path / "cut", "--workers", 2, "--kill-at", 5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = train(tmp_path / "whole", workers=0)
    resumed = train(tmp_path / "cut", workers=2, resume=tmp_path / "cut" / "last.ckpt")
    assert same(weights(whole), weights(resumed))


def test_sigterm_saves_and_says_where(tmp_path):
    left = run(tmp_path / "cut", "--kill-at", 4, "--signal", int(signal.SIGTERM))
    path = tmp_path / "cut" / "last.ckpt"
    assert left.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in left.stderr
    assert f"visadapt: stopped by SIGTERM at step 5; resume with --ckpt_path {path}" in left.stderr
    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "cut", resume=path)
    assert len(resumed.losses) == 18 - 5
    assert same(weights(whole), weights(resumed))


class TermInValidation(L.Callback):
    """SIGTERM in the middle of the first epoch's validation."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_during_validation(tmp_path, capsys):
    whole = train(tmp_path / "whole", task=TinyTask(ema_decay=0.9))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        train(tmp_path / "cut", TermInValidation(), task=TinyTask(ema_decay=0.9))
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "stopped by SIGTERM at step 9" in capsys.readouterr().err
    resumed = train(tmp_path / "cut", resume=tmp_path / "cut" / "last.ckpt", task=TinyTask(ema_decay=0.9))
    assert same(weights(whole), weights(resumed))
    assert len(resumed.losses) == 9


@pytest.fixture(scope="module")
def whole_on_two(tmp_path_factory):
    """Weights of an uninterrupted run on two processes."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, "--devices", 2, "--save", folder / "weights.pt")
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "weights.pt")


def resume_on_two(folder, *options):
    done = run(folder, "--devices", 2, *options, "--resume", folder / "last.ckpt", "--save", folder / "weights.pt")
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "weights.pt")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_sigkill_on_two_processes(tmp_path, whole_on_two, workers):
    killed = run(tmp_path, "--devices", 2, "--workers", workers, "--kill-at", 3)
    assert killed.returncode != 0
    assert same(whole_on_two, resume_on_two(tmp_path, "--workers", workers))


@pytest.mark.slow
def test_averages_resume_exactly_on_two_processes(tmp_path):
    whole = run(tmp_path / "whole", "--devices", 2, "--ema", 0.9, "--save", tmp_path / "whole.pt")
    assert whole.returncode == 0, whole.stderr
    run(tmp_path / "cut", "--devices", 2, "--ema", 0.9, "--kill-at", 7)
    assert same(torch.load(tmp_path / "whole.pt"), resume_on_two(tmp_path / "cut", "--ema", 0.9))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_on_either_of_two_processes(tmp_path, whole_on_two, rank):
    left = run(tmp_path, "--devices", 2, "--kill-at", 3, "--signal", int(signal.SIGTERM), "--rank", rank)
    assert left.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), left.stderr
    assert f"resume with --ckpt_path {tmp_path / 'last.ckpt'}" in left.stderr
    assert "Traceback" not in left.stderr
    assert same(whole_on_two, resume_on_two(tmp_path))
