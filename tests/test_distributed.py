"""Two processes see what one sees: DDP and FSDP2 (``ModelParallelStrategy``) on gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visadapt.data.loader import ExactBatches

SCRIPT = Path(__file__).with_name("distributed_run.py")


def run(folder, *options, check=True):
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    if not check:
        return done
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


def alike(one, two):
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["val"] == pytest.approx(two["val"], rel=1e-5)
    assert one["norms"].keys() == two["norms"].keys()
    assert list(one["norms"].values()) == pytest.approx(list(two["norms"].values()), rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Results of one process, per method, run once."""
    results = {}

    def result(method, *options):
        key = (method, *options)
        if key not in results:
            results[key] = run(tmp_path_factory.mktemp("one"), "--method", method, *options)
        return results[key]

    return result


CASES = [
    ("ddp", "lora"), ("ddp views", "lora"), ("ddp", "hydra"),
    ("fsdp2", "lora"), ("fsdp2", "dora"), ("fsdp2", "salt"),
    ("ddp", "dv lora"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "method"), CASES)
def test_two_processes_equal_one(tmp_path, one_process, strategy, method):
    two = run(tmp_path, "--strategy", strategy, "--devices", 2, "--method", method)
    alike(one_process(method), two)


@pytest.mark.slow
def test_fsdp2_resumes_with_averages(tmp_path, one_process):
    """A sharded run saves whole tensors to one file, is killed, and goes on to the results of one process."""
    options = ["--strategy", "fsdp2", "--devices", 2, "--ema", 0.9]
    assert run(tmp_path, *options, "--kill-at", 5, check=False).returncode != 0
    saved = torch.load(tmp_path / "last.ckpt")
    assert all(type(t) is torch.Tensor for t in saved["state_dict"].values())
    assert all(".adapters." in name or ".head." in name for name in saved["state_dict"])
    two = run(tmp_path, *options, "--resume", tmp_path / "last.ckpt")
    one = one_process("lora", "--ema", 0.9)
    assert two["losses"] == pytest.approx(one["losses"][-len(two["losses"]) :], rel=1e-5)
    alike({**one, "losses": []}, {**two, "losses": []})


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_shares_cover_the_data_in_equal_numbers_of_batches(world, size, batch):
    for shuffle in (False, True):
        ranks = [list(ExactBatches(size, batch, shuffle, 0, rank, world)) for rank in range(world)]
        seen = [index for batches in ranks for one in batches for _, index in one]
        assert {len(batches) for batches in ranks} == {len(ExactBatches(size, batch, shuffle, 0, 0, world))}
        assert all(0 < len(one) <= batch for batches in ranks for one in batches)
        assert set(seen) == set(range(size))
        if world == 1 or (not shuffle and batch > 1 and size >= world):
            assert len(seen) == size  # evaluation counts every sample once


def test_two_shares_make_the_batches_of_one():
    one = list(ExactBatches(20, 8, shuffle=True, seed=3))
    two = [list(ExactBatches(20, 4, shuffle=True, seed=3, rank=rank, world_size=2)) for rank in range(2)]
    for whole, a, b in zip(one, *two):
        assert sorted(whole) == sorted(a + b)
