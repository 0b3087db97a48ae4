"""BeamLoRA against the dense formula, and its events against a plain reading of the algorithm."""

from __future__ import annotations

from math import cos, pi

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product
from visadapt.core.state import tensors
from visadapt.core.train import after_step, before_step
from visadapt.optim.flat import flatten
from visadapt.optim.moments import of


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_dense_formula(host):
    def dense(w, b, p):
        e = (p["score"] / 0.5).exp()
        return w + 2 * product(p["up"] * (3 * e / e.sum()), p["down"]), b

    compare(host, va.BeamLoRA(rank=3, alpha=6, temperature=0.5), dense)


def test_it_starts_as_lora_and_scores_count_by_their_differences():
    _, adapter, _ = place("linear", va.BeamLoRA(rank=4), moved=False)
    close(adapter.gates(), torch.ones(4, dtype=torch.float64))
    assert not adapter.up.any()
    assert count(adapter) == 4 * 17 + 4
    _, adapter, _ = place("linear", va.BeamLoRA(rank=4))
    before = adapter.delta().detach()
    with torch.no_grad():
        adapter.score += 0.3
    close(adapter.delta(), before, 1e-7)


def two(**fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    return va.adapt(model, va.BeamLoRA(rank=4, interval=0.2, **fields), "all")


def run(model, watch=lambda step, moments: None, flat=False, total=20):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(va.parameter_groups(model, 0.02))
    optimizer = flatten(optimizer) if flat else optimizer
    moments = of(optimizer)
    for step in range(total):
        before_step(model, step, total)
        x = torch.randn(16, 5, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x[:, :4].square()).square().mean().backward()
        optimizer.step()
        watch(step, moments, False)
        after_step(model, moments)
        watch(step, moments, True)


@pytest.mark.parametrize("flat", [False, True])
def test_an_event_prunes_and_copies(flat):
    model = two(keep=0.8)
    members = list(va.adapters(model).values())
    old, before, events = {}, {}, []

    def state(moments):
        found = {}
        for i, a in enumerate(members):
            for name in ("down", "up", "score"):
                p = getattr(a, name)
                for key, tensor in {"": p, **moments(p)}.items():
                    found[i, name, key] = tensor.detach().clone()
        return found

    def watch(step, moments, after):
        done, now = step + 1, state(moments)
        if not after:
            before.clear(), before.update(now)
            return
        if done % 4 == 2:
            old.clear(), old.update(now)
        if done not in (4, 8, 12):
            assert all(torch.equal(now[k], before[k]) for k in now), "nothing happens between events"
            return
        share = 1 - 0.2 * (1 + cos(pi * done / 13.4)) / 2
        gates = [4 * torch.softmax(before[i, "score", ""] / 0.05, 0) for i in range(2)]
        ranked = sorted(((g.item(), i, j) for i in range(2) for j, g in enumerate(gates[i])), reverse=True)
        weak, ahead = [[], []], 0.0
        for g, i, j in ranked:
            if ahead >= share * 8:
                weak[i].insert(0, j)
            ahead += g
        for i in range(2):
            pruned = weak[i][:2]
            events.append(len(pruned))
            best = gates[i].argsort(descending=True)[: len(pruned)].tolist()
            used = []
            for j in range(4):
                if j not in pruned:
                    close(now[i, "down", ""][j], before[i, "down", ""][j])
                    close(now[i, "up", "exp_avg"][:, j], before[i, "up", "exp_avg"][:, j])
                    continue
                (k,) = [k for k in best if torch.equal(now[i, "down", ""][j], old[i, "down", ""][k])]
                used.append(k)
                for key in ("", "exp_avg", "exp_avg_sq"):
                    assert torch.equal(now[i, "down", key][j], old[i, "down", key][k])
                    assert torch.equal(now[i, "up", key][:, j], old[i, "up", key][:, k])
                close(now[i, "score", ""][[j, k]], before[i, "score", ""][[j, k]].mean().expand(2))
            assert sorted(used) == sorted(best)
            if pruned:
                assert not now[i, "score", "exp_avg"].any()

    run(model, watch, flat)
    assert sum(events) > 0


def test_with_all_of_the_sum_kept_nothing_is_pruned():
    model, other = two(keep=1.0), two(keep=1.0, until=0.0)
    run(model, lambda *_: None)
    run(other, lambda *_: None)
    for a, b in zip(va.adapters(model).values(), va.adapters(other).values()):
        assert torch.equal(a.delta(), b.delta())


def test_files_leave_out_the_copies_and_the_end_must_be_known():
    model = two()
    assert {k.rpartition(".")[2] for k in tensors(model)} == {"down", "up", "score"}
    with pytest.raises(ValueError, match="need an end"):
        before_step(model, 0)
    after_step(model)
