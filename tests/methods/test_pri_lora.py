"""PRILoRA: ranks by depth, and what is pruned, against plain references."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product
from visadapt.core.state import tensors
from visadapt.core.train import after_step, before_step


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("prune", [0.0, 0.5])
def test_equals_the_dense_formula(host, prune):
    method = va.PRILoRA(rank=3, alpha=6, prune=prune)
    compare(host, method, lambda w, b, p: (w + 2 * product(p["up"], p["down"]), b))


def test_ranks_rise_with_depth():
    model = va.adapt(nn.Sequential(*[nn.Linear(6, 6) for _ in range(12)]), va.PRILoRA(), "all")
    ranks = [len(a.down) for a in va.adapters(model).values()]
    assert ranks == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    assert sum(ranks) == 12 * 8
    assert [count(a) for a in va.adapters(model).values()] == [12 * r for r in ranks]
    model = va.adapt(nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)]), va.PRILoRA(rank=3, spread=0), "all")
    assert {len(a.down) for a in va.adapters(model).values()} == {3}


def test_a_file_brings_the_ranks_back(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])

    model = va.adapt(base(), va.PRILoRA(), ["3", "0", "2"])
    for p in model.parameters():
        nn.init.normal_(p) if p.requires_grad else None
    again = va.load(base(), va.save(model, tmp_path / "a.safetensors"))
    x = torch.randn(2, 6)
    assert torch.equal(again(x), model(x))
    assert {k.rpartition(".")[2] for k in tensors(model)} == {"down", "up"}


@pytest.mark.parametrize("host", ["linear", "conv"])
def test_pruning_takes_the_least_of_size_times_input(host):
    model, adapter, x = place(host, va.PRILoRA(rank=3, interval=2, prune=0.5, momentum=0.6))
    norms = 0
    for step in range(2):
        before_step(model, step, None)
        seen = x.detach() * (step + 1)
        seen[..., 0] *= 3
        model(seen)
        flat = seen.flatten(0, -2) if host == "linear" else seen.movedim(1, -1).flatten(0, -2)
        norms = 0.6 * norms + 0.4 * flat.norm(dim=0)
        model(seen * 100)  # a second batch of the step, or a recomputation, is not measured
        before = adapter.down.detach().clone()
        after_step(model)
        if step == 0:
            assert torch.equal(adapter.down, before)
    close(adapter.norms, norms, 1e-6)
    importance = (before.abs() * norms.view(-1, *[1] * (before.dim() - 2))).flatten(1)
    half = importance.shape[1] // 2
    for row, was, score in zip(adapter.down.flatten(1), before.flatten(1), importance):
        least = score.argsort()[:half]
        assert not row[least].any()
        assert int((row == 0).sum()) == half
        assert torch.equal(row[row != 0], was[row != 0])


def test_evaluation_measures_nothing_and_a_loop_without_steps_goes_by_size():
    model, adapter, x = place("linear", va.PRILoRA(interval=1))
    model.eval()(x)
    model.train()(x)
    assert not adapter.norms.any()
    before_step(model, 0, None)
    after_step(model)
    assert int((adapter.down == 0).sum()) == 8 * 3


def test_refusals():
    view = nn.Sequential(nn.MultiheadAttention(6, 2))
    with pytest.raises(ValueError, match="set prune=0"):
        va.adapt(view, va.PRILoRA(), "0.in_proj_weight:q")
    va.adapt(view, va.PRILoRA(prune=0), "0.in_proj_weight:q")
    for fields in ({"spread": 2}, {"prune": 1}, {"interval": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            place("linear", va.PRILoRA(**fields))
