"""DiffoRA: the gate against the dense formula, the turns of the search, the choice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product
from tests.training import NoisyData, TinyTask, train
from visadapt.core.train import after_backward, after_step, before_step
from visadapt.optim.flat import flatten
from visadapt.optim.moments import of


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_dense_formula(host):
    def dense(w, b, p):
        return w + 2 / (1 + (-p["choice"]).exp()) * product(p["up"], p["down"]), b

    compare(host, va.DiffoRA(rank=3, alpha=6), dense)


def test_open_chosen_and_left_out():
    model, adapter, x = place("linear", va.DiffoRA(rank=3))
    assert count(adapter) == 3 * 17 + 1
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    adapter.chosen.fill_(0)
    close(model(x), base)
    assert len(adapter.components(None)[0]) == 1
    adapter.chosen.fill_(1)
    close(model(x), base + nn.functional.linear(x, product(adapter.up, adapter.down)))
    for fields in ({"keep": 0}, {"search": 1}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            place("linear", va.DiffoRA(**fields))


@pytest.mark.parametrize("flat", [False, True])
def test_the_search_takes_turns_and_then_chooses(flat):
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(5, 5), nn.Tanh())]).double()
    va.adapt(model, va.DiffoRA(rank=2, keep=0.5, search=0.5), "all")
    members = list(va.adapters(model).values())
    optimizer = torch.optim.AdamW(va.parameter_groups(model, 0.05, 0.1))
    optimizer = flatten(optimizer) if flat else optimizer
    moments = of(optimizer)
    for step in range(20):
        before = [(a.down.detach().clone(), a.up.detach().clone(), a.choice.detach().clone()) for a in members]
        before_step(model, step, 20)
        x = torch.randn(16, 5, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        after_backward(model)
        optimizer.step()
        after_step(model, moments)
        for a, (down, up, choice) in zip(members, before):
            if step < 9:
                assert a.chosen == -1
                assert torch.equal(a.choice, choice) == (not step % 2)
                assert torch.equal(a.up, up) == bool(step % 2)
                assert torch.equal(a.down, down) == bool(step % 2)
        if step == 9:
            order = sorted(range(4), key=lambda i: -members[i].choice.item())
            assert [int(a.chosen) for a in members] == [int(i in order[:2]) for i in range(4)]
            assert not any(a.up.any() for a in members)
            assert all(a.down.any() for a in members)
            assert not any(s.any() for a in members for s in moments(a.up).values())
    assert [bool(a.up.any()) for a in members] == [bool(a.chosen) for a in members]


def test_a_run_searches(tmp_path):
    task = TinyTask(dropout=0.0, adapters=[va.Adaptation(va.DiffoRA(rank=2), ["mlp.fc1", "mlp.fc2", "attn.proj"])])
    train(tmp_path, task=task, data=NoisyData(batch_size=4), max_epochs=1)
    assert sum(float(a.chosen) for a in va.adapters(task).values()) == 3
    with pytest.raises(ValueError, match="needs an end"):
        before_step(task.model, 0)


def test_what_is_chosen_stays_in_a_later_training():
    model = va.adapt(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), va.DiffoRA(rank=2, search=0.5), "all")
    members = list(va.adapters(model).values())
    short = va.adapt(nn.Sequential(nn.Linear(5, 5)), va.DiffoRA(rank=2, search=0.01), "all")
    with pytest.raises(ValueError, match="search=0.01 of 20 steps is none"):
        before_step(short, 0, 20)
    optimizer = torch.optim.SGD(va.parameter_groups(model, 0.1, 0.0))
    for step in range(8):
        before_step(model, step % 4, 4)
        model(torch.randn(3, 5)).sum().backward()
        after_backward(model)
        optimizer.step()
        optimizer.zero_grad()
        after_step(model, of(optimizer))
        if step == 1:
            chosen = [a.chosen.clone() for a in members]
        if step == 3:
            learned = [a.up.detach().clone() for a in members]
    assert sorted(a.item() for a in chosen) == [0, 1]
    assert all(torch.equal(a.chosen, b) for a, b in zip(members, chosen))
    assert all(a.up.any() for a, b in zip(members, learned) if b.any()), "not started anew"
