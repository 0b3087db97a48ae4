"""DDP waits for the gradient of every tensor: which methods have one in each step, and what a task tells it."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import visadapt as va
from tests.training import TinyTask, train
from visadapt.core.calibrate import calibrate
from visadapt.core.train import after_backward, after_step, before_step, next_task, penalty

STEPS = 24
OPTIONS = {"DVLoRA": {"warmup": 3}, "LoCA": {"count": 8}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of one process, which asks of a model what a group of many does."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def steps(name, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    va.adapt(model, va.METHODS[name](**OPTIONS.get(name, {})), "all")
    x = torch.randn(4, 16)
    calibrate(model, (model(x).square().mean() for _ in range(1)))
    wrapped = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step in range(STEPS):
        if step == STEPS // 2:
            next_task(model)
        before_step(model, step, STEPS)
        (wrapped(x).square().mean() + penalty(model)).backward()
        after_backward(model)
        optimizer.step()
        optimizer.zero_grad()
        after_step(model)


@pytest.mark.parametrize("name", va.METHODS)
def test_every_tensor_has_a_gradient_in_each_step_unless_the_method_says_that_they_take_turns(alone, name):
    if va.METHODS[name].takes_turns:
        with pytest.raises(RuntimeError, match="finished reduction"):
            steps(name)
    steps(name, find_unused_parameters=va.METHODS[name].takes_turns)


class Told(L.Callback):
    """What DDP is told."""

    def on_train_start(self, trainer, module):
        self.unused = trainer.strategy.model.find_unused_parameters


@pytest.mark.parametrize(("method", "expected"), [(va.DVLoRA(rank=2, warmup=3), True), (va.LoRA(rank=2), False)])
def test_a_task_tells_ddp_of_methods_that_take_turns(tmp_path, method, expected):
    told = Told()
    task = TinyTask(dropout=0.0, adapters=[va.Adaptation(method, ["mlp.fc1"])])
    train(tmp_path, told, task=task, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=1)
    assert told.unused == expected
