"""SD-LoRA over several tasks against dense sums in float64; its variants and what a new task leaves as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, operate, place, product
from visadapt.core.train import next_task, parameter_groups
from visadapt.maths.low_rank import inner, norm


def learn(adapter, seed=0):
    """Factors and magnitudes as if a task had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (adapter.down, adapter.up):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
        adapter.magnitude.add_(0.3 * torch.randn(adapter.magnitude.shape, generator=generator, dtype=torch.float64))


def dense(adapter):
    """B A of the task under way."""
    return product(adapter.up.detach().clone(), adapter.down.detach().clone())


@pytest.mark.parametrize("host", HOSTS)
def test_first_task_is_lora_with_a_magnitude(host):
    compare(host, va.SDLoRA(rank=3), lambda w, b, p: (w + p["magnitude"][0] * product(p["up"], p["down"]), b))


@pytest.mark.parametrize("magnitudes", ["shared", "layer"])
@pytest.mark.parametrize("host", HOSTS)
def test_output_and_gradients_over_four_tasks(host, magnitudes):
    model, adapter, x = place(host, va.SDLoRA(rank=2, tasks=5, magnitudes=magnitudes), moved=False)
    layer, directions = model[0], []
    for task in range(4):
        learn(adapter, task)
        if task < 3:
            found = dense(adapter)
            directions.append(found / found.norm() if magnitudes == "layer" else found)
            next_task(model)
    alpha, down, up = (t.detach().clone().requires_grad_() for t in (adapter.magnitude, adapter.down, adapter.up))
    weight = layer.weight + sum(a * d for a, d in zip(alpha, directions)) + alpha[3] * product(up, down)
    want, got = operate(layer, x, weight, layer._parameters["bias"]), model(x)
    close(got, want, 1e-10)
    probe = torch.randn_like(want)
    ours = torch.autograd.grad(got, [x, adapter.magnitude, adapter.down, adapter.up], probe)
    theirs = torch.autograd.grad(want, [x, alpha, down, up], probe)
    for a, b in zip(ours, theirs):
        close(a, b, 1e-10)
    assert ours[1][:4].all(), "every finished task's magnitude learns"
    assert not ours[1][4:].any(), "the next tasks' do not"
    close(va.merge(model)(x), want, 1e-9)


@pytest.mark.parametrize("options", [{}, {"magnitudes": "layer"}, {"ranks": [3, 2, 1]}], ids=str)
def test_a_new_task_changes_nothing_and_leaves_the_old_ones_alone(options):
    model, adapter, x = place("conv", va.SDLoRA(rank=3, tasks=4, **options), moved=False)
    for task in range(3):
        learn(adapter, task)
        before, old = model(x), adapter.past_down.clone()
        next_task(model)
        close(model(x), before, 1e-12)
        assert torch.equal(adapter.past_down[: task * 3], old[: task * 3])
        assert not adapter.up.any()
        assert adapter.down.any()
    with pytest.raises(ValueError, match="room for tasks=4"):
        next_task(model)


def test_the_released_way_weighs_by_norms_and_starts_again():
    model, adapter, x = place("linear", va.SDLoRA(rank=2, tasks=3, directions="released", start=0.8), moved=False)
    learn(adapter)
    norms, found = adapter.down.norm() * adapter.up.norm(), dense(adapter)
    next_task(model)
    assert adapter.magnitude.unique().tolist() == [0.8]
    want = operate(model[0], x, model[0].weight + 0.8 * found / norms.detach(), model[0].bias)
    close(model(x), want)


def test_magnitudes_are_one_parameter_for_all_layers_of_a_set():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    va.adapt(model, va.SDLoRA(rank=2, tasks=3), ["0", "1"])
    first, second = va.adapters(model).values()
    assert first.magnitude is second.magnitude
    trained = [p for group in parameter_groups(model, 1e-3, 0.1) for p in group["params"]]
    assert len(trained) == 5
    x = torch.randn(5, 4, dtype=torch.float64)
    for task in range(2):
        learn(first, task)
        learn(second, task + 7)
        before = model(x)
        next_task(model)
        close(model(x), before, 1e-12)
    assert first.offset is not second.offset


def test_each_layer_its_own_where_asked_for():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    va.adapt(model, va.SDLoRA(rank=2, magnitudes="layer"), ["0", "1"])
    first, second = va.adapters(model).values()
    assert first.magnitude is not second.magnitude


def test_ranks_of_tasks():
    model, adapter, x = place("linear", va.SDLoRA(rank=4, tasks=4, ranks=[4, 2, 1]), moved=False)
    for rank in (4, 2, 1, 1):
        learn(adapter)
        model(x).square().sum().backward()
        assert (adapter.down.grad.abs().sum(1) > 0).sum() == rank
        adapter.down.grad = None
        if adapter.done < 3:
            next_task(model)
    assert (adapter.past_up != 0).any(0).tolist() == [True] * 4 + [True, True, False, False] + [
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(ValueError, match=r"ranks=\[9\]"):
        place("linear", va.SDLoRA(rank=4, ranks=[9]))


def test_a_direction_that_is_known_is_not_kept():
    model, adapter, x = place("linear", va.SDLoRA(rank=4, tasks=4, threshold=1e-9), moved=False)
    for task in range(2):
        learn(adapter, task)
        with torch.no_grad():  # rank 2, so that a sum of both has rank 4
            adapter.up[:, 2:] = 0
        next_task(model)
    pairs = [[t.clone() for t in adapter.direction(k)] for k in range(2)]
    learn(adapter, 5)
    with torch.no_grad():
        adapter.down.copy_(torch.cat([pairs[0][0][:2], pairs[1][0][:2]]))
        adapter.up.copy_(torch.cat([0.7 * pairs[0][1][:, :2], -0.2 * pairs[1][1][:, :2]], 1))
    before = model(x)
    next_task(model)
    close(model(x), before, 1e-9)
    assert not adapter.past_up[:, 8:12].any()
    close(adapter.offset[:2], adapter.magnitude[2] * torch.tensor([0.7, -0.2], dtype=torch.float64), 1e-8)


@pytest.mark.parametrize(("residual", "threshold", "kept"), [("relative", 0.5, True), ("rmse", 0.5, False)])
def test_the_residual_is_measured_as_asked(residual, threshold, kept):
    method = va.SDLoRA(rank=1, tasks=3, threshold=threshold, residual=residual)
    model, adapter, _ = place("linear", method, moved=False)
    for task in range(2):  # two random directions: the relative residual is near 1, per element it is near 1/8.4
        learn(adapter, task)
        next_task(model)
    assert bool(adapter.past_up[:, 1].any()) is kept


def test_inner_products_of_factors():
    a, b, c, d = (torch.randn(s, dtype=torch.float64) for s in [(3, 2, 5), (7, 3), (4, 2, 5), (7, 4)])
    close(inner(a, b, c, d), (product(b, a) * product(d, c)).sum())
    close(norm(a, b), product(b, a).norm())


def test_files_carry_all_tasks(tmp_path):
    model, adapter, x = place("linear", va.SDLoRA(rank=2, tasks=4), moved=False)
    for task in range(3):
        learn(adapter, task)
        next_task(model)
    learn(adapter, 9)
    va.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)  # as in `place`
    again = va.load(nn.Sequential(nn.Linear(7, 10)).double(), tmp_path / "a.safetensors", strict=True)
    assert next(iter(va.adapters(again).values())).done == 3
    assert torch.equal(again(x), model(x))


def test_parameter_count():
    assert count(place("linear", va.SDLoRA(rank=3, tasks=5))[1]) == 3 * (7 + 10) + 5


def test_refusals():
    with pytest.raises(ValueError, match="done=5 of tasks=5"):
        place("linear", va.SDLoRA(tasks=5, done=5))
    with pytest.raises(ValueError, match="no `threshold`"):
        place("linear", va.SDLoRA(threshold=0.1, directions="released"))
