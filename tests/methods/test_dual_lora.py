"""DualLoRA: both parts against dense sums, and what a new task cannot change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import close, count, place
from visadapt.core.train import after_step, next_task, tell_inputs


def dense(layer, x, adapter, tasks):
    """The formula, task by task and sample by sample."""
    y, r, p = nn.functional.linear(x, layer.weight, layer.bias), adapter.rank, adapter.up_residual.shape[1]
    for k in range(tasks + 1):
        now = k == tasks
        down = adapter.down if now else adapter.past_down[k * r : (k + 1) * r]
        up = adapter.up if now else adapter.past_up[:, k * r : (k + 1) * r]
        c = adapter.up_residual if now else adapter.past_residual[:, k * p : (k + 1) * p]
        psi = adapter.basis[:, k * p : (k + 1) * p]
        y = y + x @ down.t() @ up.t()
        for i, sample in enumerate(x):
            h = sample[0]
            weight = ((psi.t() @ h).square().sum() / h.square().sum()).detach()
            y = y + weight * torch.zeros_like(y).index_put((torch.tensor(i),), sample @ psi @ c.t())
    return y


def learn(adapter):
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    adapter.after_step()


def tokens(basis, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 3, basis.shape[1], generator=generator, dtype=torch.float64) @ basis.t()


def test_output_and_gradients_over_three_tasks():
    model, adapter, _ = place("linear", va.DualLoRA(rank=2, bases=2, tasks=3), moved=False)
    for task in range(3):
        x = torch.randn(5, 3, 7, dtype=torch.float64)
        tell_inputs(model, "begin_task", lambda x=x: model(x))
        learn(adapter)
        got, want = model(x), dense(model[0], x, adapter, task)
        close(got, want, 1e-10)
        probe = torch.randn_like(want)
        for a, b in zip(*(torch.autograd.grad(y, list(adapter.parameters()), probe) for y in (got, want))):
            close(a, b)
        if task < 2:
            next_task(model)
    with pytest.raises(ValueError, match="room for tasks=3"):
        next_task(model)


def test_the_orthogonal_part_leaves_earlier_class_tokens_alone():
    model, adapter, _ = place("linear", va.DualLoRA(rank=2, bases=4, tasks=3, first=0.9999, last=0.9999), moved=False)
    spaces = torch.linalg.qr(torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    first, second = tokens(spaces[:, :2], 1), tokens(spaces, 2)
    tell_inputs(model, "begin_task", lambda: model(first))
    close(adapter.basis[:, :4] @ adapter.basis[:, :4].t(), spaces[:, :2] @ spaces[:, :2].t())
    learn(adapter)
    learned = model(first)
    next_task(model)
    tell_inputs(model, "begin_task", lambda: model(second))
    close(adapter.memory.t() @ adapter.basis[:, 4:8], torch.zeros(7, 4, dtype=torch.float64))
    learn(adapter)
    after_step(model)
    assert (adapter.down @ adapter.memory).abs().max() < 1e-12
    close(model(first), learned)
    assert not torch.allclose(model(second), dense(model[0], second, adapter, 0))


def test_a_task_with_nothing_new_has_no_directions_of_its_own():
    model, adapter, _ = place("linear", va.DualLoRA(rank=2, bases=2, tasks=4), moved=False)
    same = tokens(torch.eye(7, 1, dtype=torch.float64), 0)  # one direction, as behind a class token in the first block
    for task in range(4):
        tell_inputs(model, "begin_task", lambda: model(same))
        assert adapter.basis[:, 2 * task : 2 * task + 2].count_nonzero() == (1 if task == 0 else 0)
        learn(adapter)
        if task < 3:
            next_task(model)
    close(adapter.memory, torch.eye(7, 1, dtype=torch.float64) @ torch.eye(1, 7, dtype=torch.float64))
    size = adapter.down.norm()
    for _ in range(50):
        after_step(model)
    assert adapter.down.norm() <= size


def test_only_the_first_token_of_a_sample_counts():
    model, adapter, _ = place("linear", va.DualLoRA(rank=2, bases=1, tasks=2), moved=False)
    x = torch.zeros(10, 4, 7, dtype=torch.float64)
    x[:, 0, 2] = torch.linspace(1, 2, 10)
    x[:, 1:, 5] = 100.0
    tell_inputs(model, "begin_task", lambda: model(x))
    close(adapter.basis[:, 0].abs(), torch.eye(7, dtype=torch.float64)[2])


def test_refusals_and_counts():
    with pytest.raises(ValueError, match="token vectors.*use Linear"):
        place("conv", va.DualLoRA())
    model, adapter, _ = place("linear", va.DualLoRA(rank=2, bases=3))
    assert count(adapter) == 2 * 17 + 10 * 3
    with pytest.raises(ValueError, match="not affine"):
        va.merge(model)


def test_a_map_weighs_by_its_mean():
    model, adapter, _ = place("linear", va.DualLoRA(rank=2, bases=3, tasks=2))
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    mean = x.mean((1, 2))
    weight = (mean @ adapter.basis[:, :3]).square().sum(1) / mean.square().sum(1)
    want = nn.functional.linear(x, model[0].weight, model[0].bias) + x @ adapter.down.t() @ adapter.up.t()
    close(model(x), want + weight.view(2, 1, 1, 1) * (x @ adapter.basis[:, :3] @ adapter.up_residual.t()))
