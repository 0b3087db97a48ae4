"""O-LoRA, N-LoRA, controlled LoRA, CoDyRA and InfLoRA over several tasks against dense formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, operate, place, product
from visadapt.core.train import after_step, before_step, next_task, penalty, tell_inputs
from visadapt.maths.low_rank import absolute_sum


def learn(adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def trained(method, tasks, host="linear"):
    """A host after so many tasks and in the middle of another; the updates of the finished ones, dense."""
    model, adapter, x = place(host, method, moved=False)
    past = []
    for task in range(tasks):
        learn(adapter, task)
        past.append((adapter.down.detach().clone(), adapter.up.detach().clone()))
        next_task(model)
    learn(adapter, tasks)
    return model, adapter, x, past


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "method", [va.OLoRA(rank=3), va.NonCollisionLoRA(rank=3), va.CLoRA(rank=3)], ids=lambda m: type(m).__name__
)
def test_the_update_is_a_sum_over_tasks(method, host):
    compare(host, method.clone(), lambda w, b, p: (w + product(p["up"], p["down"]), b))
    model, adapter, x, past = trained(method.clone(), 2, host)
    weight = model[0].weight + sum(product(up, down) for down, up in past) + product(adapter.up, adapter.down)
    close(model(x), operate(model[0], x, weight, model[0]._parameters["bias"]))


def gradients(value, adapter):
    found = torch.autograd.grad(value, [adapter.down, adapter.up], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, [adapter.down, adapter.up])]


@pytest.mark.parametrize("absolute", [False, True])
def test_o_lora_penalises_overlap_of_row_spaces(absolute):
    model, adapter, _, past = trained(va.OLoRA(rank=2, orthogonality=0.3, absolute=absolute), 2)
    want = sum((lambda m: m.abs() if absolute else m.square())(adapter.down @ down.t()).sum() for down, _ in past)
    close(penalty(model), 0.3 * want)
    for a, b in zip(gradients(penalty(model), adapter), gradients(0.3 * want, adapter)):
        close(a, b)
    assert place("linear", va.OLoRA())[1].penalty() is None, "the first task has nothing to avoid"


@pytest.mark.parametrize("host", HOSTS)
def test_n_lora_penalises_every_element_of_the_update(host):
    model, adapter, _, _ = trained(va.NonCollisionLoRA(rank=2, sparsity=0.7), 1, host)
    want = 0.7 * product(adapter.up, adapter.down).abs().sum()
    close(penalty(model), want)
    for a, b in zip(gradients(penalty(model), adapter), gradients(want, adapter)):
        close(a, b)


def test_the_absolute_sum_in_parts_is_the_whole():
    down, up = torch.randn(3, 6, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d, u: absolute_sum(d, u, 4), (down.requires_grad_(), up.requires_grad_()))
    close(absolute_sum(down, up, 3), (up @ down).abs().sum())


def test_n_lora_as_released_needs_a_square_layer():
    with pytest.raises(ValueError, match=r"7 inputs.*10 outputs.*of: update"):
        place("linear", va.NonCollisionLoRA(of="released"))
    model = va.adapt(
        nn.Sequential(nn.Linear(5, 5)).double(), va.NonCollisionLoRA(rank=2, sparsity=1.0, of="released"), "0"
    )
    (adapter,) = va.adapters(model).values()
    learn(adapter, 0)
    close(penalty(model), (adapter.down @ adapter.up).abs().sum())


def test_controlled_lora_keeps_directions_out():
    model, adapter, _, _ = trained(va.CLoRA(rank=2, control=0.5, directions=3), 1)
    right, left = adapter.right, adapter.left
    close(right.t() @ right, torch.eye(3, dtype=torch.float64), 1e-6)
    want = 0.25 * ((adapter.down @ right).square().sum() + (adapter.up.t() @ left).square().sum())
    close(penalty(model), want)
    with torch.no_grad():
        adapter.down -= adapter.down @ right @ torch.linalg.pinv(right)
        adapter.up -= torch.linalg.pinv(left.t()) @ left.t() @ adapter.up
    assert penalty(model) < 1e-12
    assert (product(adapter.up, adapter.down) @ right).abs().max() < 1e-7
    assert "0.adapters.default.right" not in model.state_dict(), "made again from the seed"


def test_controlled_lora_from_past_tasks():
    model, adapter, _, past = trained(va.CLoRA(rank=2, basis="past"), 2)
    rows = torch.linalg.qr(torch.cat([down for down, _ in past]).t())[0]
    columns = torch.linalg.qr(torch.cat([up for _, up in past], 1))[0]
    close(penalty(model), 0.5 * ((adapter.down @ rows).square().sum() + (adapter.up.t() @ columns).square().sum()))
    assert place("linear", va.CLoRA(basis="past"))[1].penalty() is None


@pytest.mark.parametrize("host", HOSTS)
def test_codyra_weighs_components(host):
    compare(host, va.CoDyRA(rank=3), lambda w, b, p: (w + product(p["up"] * p["importance"], p["down"]), b))


def test_codyra_over_tasks():
    model, adapter, x = place("linear", va.CoDyRA(rank=3), moved=False)
    learn(adapter, 0)
    with torch.no_grad():
        adapter.importance[1] = 0
    before = model(x)
    next_task(model)
    close(model(x), before)
    assert not adapter.past_up[:, 1].any()
    assert adapter.importance.all()
    assert not adapter.up.any()


def test_codyra_shrinks_after_the_dense_part():
    model, adapter, _ = place("linear", va.CoDyRA(rank=3, threshold=0.1, levels=5), moved=False)
    kappas = []
    for step in range(20):
        before_step(model, step, 20)
        kappas.append(adapter.kappa)
    assert kappas[:10] == [0.0] * 10
    assert kappas[10:] == pytest.approx([0.0, 0.0, 0.025, 0.025, 0.05, 0.05, 0.075, 0.075, 0.1, 0.1])
    with torch.no_grad():
        adapter.importance.copy_(torch.tensor([0.3, -0.15, 0.05]))
    after_step(model)
    close(adapter.importance.detach(), torch.tensor([0.2, -0.05, 0.0], dtype=torch.float64), 1e-7)
    with pytest.raises(ValueError, match="needs an end"):
        before_step(model, 0)


def test_codyra_as_released_kills_up_to_twice_the_threshold():
    _, adapter, _ = place("linear", va.CoDyRA(rank=3, released=True), moved=False)
    adapter.kappa = 0.1
    with torch.no_grad():
        adapter.importance.copy_(torch.tensor([0.3, -0.15, 0.05]))
    adapter.after_step()
    close(adapter.importance.detach(), torch.tensor([0.2, 0.0, 0.0], dtype=torch.float64), 1e-7)


def test_parameter_counts():
    assert (
        count(place("linear", va.OLoRA(rank=3))[1]) == count(place("linear", va.NonCollisionLoRA(rank=3))[1]) == 3 * 17
    )
    assert count(place("linear", va.CLoRA(rank=3))[1]) == 3 * 17
    assert count(place("linear", va.CoDyRA(rank=3))[1]) == 3 * 17 + 3


def inputs(rank, seed):
    """Inputs (50, 7) in a space of so many dimensions, and a little of everything."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(7, rank, generator=generator, dtype=torch.float64))[0]
    return torch.randn(50, rank, generator=generator, dtype=torch.float64) @ basis.t(), basis


def test_inf_lora_learns_where_the_task_is_and_earlier_ones_are_not():
    model, adapter, _ = place("linear", va.InfLoRA(rank=2, tasks=3, first=0.999, last=0.999), moved=False)
    first, basis = inputs(2, 0)
    tell_inputs(model, "begin_task", lambda: model(first))
    close(adapter.down @ adapter.down.t(), torch.eye(2, dtype=torch.float64) / 3)
    close(basis @ basis.t() @ adapter.down.t(), adapter.down.t())
    nn.init.normal_(adapter.up)
    learned = model(first)
    tell_inputs(model, "end_task", lambda: model(first))
    close(adapter.memory, basis @ basis.t())
    next_task(model)
    second = inputs(3, 1)[0] + 0.5 * first
    tell_inputs(model, "begin_task", lambda: model(second))
    assert (adapter.down @ basis).abs().max() < 1e-9
    nn.init.normal_(adapter.up)
    assert not torch.allclose(model(second), nn.functional.linear(second, model[0].weight, model[0].bias))
    close(model(first), learned)
    assert [n for n, _ in adapter.named_parameters()] == ["up"]
    assert count(adapter) == 2 * 10


def test_inf_lora_keeps_the_share_of_energy_that_is_asked_for():
    model, adapter, _ = place("linear", va.InfLoRA(rank=2, tasks=3, first=0.9, last=0.9), moved=False)
    x = torch.randn(50, 7, dtype=torch.float64) * torch.tensor([5, 3, 2, 1, 0.5, 0.2, 0.1], dtype=torch.float64)
    tell_inputs(model, "end_task", lambda: model(x))
    values = torch.linalg.eigvalsh(x.t() @ x).flip(0)
    count = int(adapter.memory.trace().round())
    assert values[:count].sum() >= 0.9 * values.sum() > values[: count - 1].sum()
    before = adapter.memory.clone()
    tell_inputs(model, "end_task", lambda: model(x))
    close(adapter.memory, before)


def test_inf_lora_refuses_convolutions():
    with pytest.raises(ValueError, match="input vectors.*use Linear"):
        place("conv", va.InfLoRA())


def test_inf_lora_has_no_directions_where_the_task_has_no_energy():
    model, adapter, _ = place("linear", va.InfLoRA(rank=4, tasks=3, first=0.999, last=0.999), moved=False)
    first, second = inputs(3, 0)[0], inputs(2, 1)[0]
    tell_inputs(model, "end_task", lambda: model(first))
    next_task(model)
    tell_inputs(model, "begin_task", lambda: model(torch.cat([first, second])))
    assert (adapter.down @ adapter.memory).abs().max() < 1e-9
    gram = torch.zeros(4, 4, dtype=torch.float64)
    gram[:2, :2] = torch.eye(2, dtype=torch.float64) / 3
    close(adapter.down @ adapter.down.t(), gram)
