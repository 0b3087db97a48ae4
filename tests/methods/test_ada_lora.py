"""AdaLoRA against the dense formula, and its budget against a plain-Python reading of the algorithm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product
from visadapt.core.check import move
from visadapt.core.state import tensors
from visadapt.core.train import after_backward, after_step, before_step, penalty


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_dense_formula(host):
    compare(host, va.AdaLoRA(rank=3, alpha=6), lambda w, b, p: (w + 2 * product(p["up"] * p["gain"], p["down"]), b))


@pytest.mark.parametrize("host", HOSTS)
def test_the_penalty_wants_orthonormal_vectors(host):
    model, adapter, _ = place(host, va.AdaLoRA(rank=3, orthogonality=0.3))
    p, q, eye = adapter.up, adapter.down.flatten(1), torch.eye(3, dtype=torch.float64)
    want = 0.3 * (torch.linalg.norm(p.t() @ p - eye) ** 2 + torch.linalg.norm(q @ q.t() - eye) ** 2)
    close(penalty(model), want)
    for a, b in zip(
        torch.autograd.grad(penalty(model), [p, adapter.down]), torch.autograd.grad(want, [p, adapter.down])
    ):
        close(a, b)
    assert count(adapter) == adapter.down.numel() + adapter.up.numel() + 3


def two(**fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    return va.adapt(model, va.AdaLoRA(rank=4, keep=0.5, orthogonality=0.0, interval=2, **fields), "all")


def run(model, steps, total, watch=lambda step: None, start=0):
    generator = torch.Generator().manual_seed(start)
    optimizer = torch.optim.AdamW(va.parameter_groups(model, 0.02))
    for step in range(start, steps):
        before_step(model, step, total)
        x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x[:, :4].square()).square().mean().backward()
        after_backward(model)
        before = {n: (p * p.grad).detach() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        after_step(model)
        watch((step, before))


def test_the_budget_and_the_importances_follow_the_algorithm():
    model, total = two(), 40
    members = list(va.adapters(model).items())
    mean, spread = {}, {}

    def watch(seen):
        step, products = seen
        done = step + 1
        if done < 20:
            for name, now in products.items():
                mean[name] = 0.85 * mean.get(name, 0) + 0.15 * now.abs()
                spread[name] = 0.85 * spread.get(name, 0) + 0.15 * (now.abs() - mean[name]).abs()
        zeros = [(a.gain == 0).tolist() for _, a in members]
        if done <= 4:
            assert not any(map(any, zeros))
            return
        if done % 2 and done < 20:
            return
        left = max(0.0, 1 - (done - 4) / 16) ** 3
        kept = round(4 + 4 * left)
        scores = []
        for path, _ in members:
            p, q, g = (mean[f"{path}.{n}"] * spread[f"{path}.{n}"] for n in ("up", "down", "gain"))
            scores += [(g[i] + p[:, i].mean() + q[i].mean()).item() for i in range(4)]
        threshold = sorted(scores, reverse=True)[kept - 1]
        assert [z for each in zeros for z in each] == [score < threshold for score in scores], f"step {step}"

    run(model, total, total, watch)
    assert sum(int(a.gain.count_nonzero()) for _, a in members) == 4
    down, up = members[0][1].components(None)
    close(product(up, down), members[0][1].delta())


def test_the_file_leaves_out_what_only_training_needs_and_a_resumed_run_has_it():
    straight, stopped = two(), two()
    run(straight, 8, 40)
    run(stopped, 8, 40)
    again = two()
    again.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for model in (straight, again):
        run(model, 24, 40, start=8)
    for a, b in zip(straight.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)
    assert {k.rpartition(".")[2] for k in tensors(straight)} == {"down", "up", "gain"}


def test_without_an_end_there_is_no_budget():
    model = move(two())
    with pytest.raises(ValueError, match="needs an end"):
        before_step(model, 0)
    with pytest.raises(ValueError, match="keep=0"):
        place("linear", va.AdaLoRA(keep=0))
    after_step(model)
    assert all(a.gain.all() for a in va.adapters(model).values()), "a loop without `before_step` cuts nothing"
