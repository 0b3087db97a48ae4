"""DyLoRA: prefixes of components against the dense formula, what a step draws and trains."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, operate, place, product
from visadapt.core.train import after_step, before_step


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("use", "scale"), [(None, 1.5), (2, 3.0)])
def test_equals_the_dense_formula(host, use, scale):
    b = use or 4
    compare(
        host,
        va.DyLoRA(rank=4, alpha=6, use=use),
        lambda w, c, p: (w + scale * product(p["up"][:, :b], p["down"][:b]), c),
    )


@pytest.mark.parametrize("host", HOSTS)
def test_a_step_has_the_rank_that_it_draws(host):
    model, adapter, x = place(host, va.DyLoRA(rank=4))
    for step in range(6):
        before_step(model, step, 6)
        b = adapter.rank_now
        weight = model[0].weight + 4 / b * product(adapter.up[:, :b], adapter.down[:b])
        want, probe = operate(model[0], x, weight, model[0].bias), None
        got = model(x)
        close(got, want)
        probe = torch.randn_like(want)
        sources = [x, adapter.down, adapter.up]
        for a, c in zip(torch.autograd.grad(got, sources, probe), torch.autograd.grad(want, sources, probe)):
            close(a, c)
        model.eval()
        close(model(x), operate(model[0], x, model[0].weight + adapter.delta(), model[0].bias))
        model.train()
        after_step(model)
        close(adapter.delta(), product(adapter.up, adapter.down))


@pytest.mark.parametrize("last_only", [False, True])
def test_which_components_a_step_trains(last_only):
    model, adapter, x = place("linear", va.DyLoRA(rank=6, last_only=last_only))
    before_step(model, 3, None)
    b = adapter.rank_now
    model(x).square().sum().backward()
    trained = adapter.up.grad.any(0)
    want = torch.arange(6) == b - 1 if last_only else torch.arange(6) < b
    assert torch.equal(trained, want)
    assert torch.equal(adapter.down.grad.any(1), want)


def test_ranks_are_uniform_the_same_everywhere_and_again():
    model = va.adapt(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)), va.DyLoRA(smallest=3), "all")
    first, second = va.adapters(model).values()
    seen = []
    for step in range(600):
        before_step(model, step, 600)
        assert first.rank_now == second.rank_now
        seen.append(first.rank_now)
    found = Counter(seen)
    assert set(found) == {3, 4, 5, 6, 7, 8}
    assert all(abs(n - 100) < 40 for n in found.values())
    before_step(model, 17, 600)
    assert first.rank_now == seen[17]
    other = place("linear", va.DyLoRA(smallest=3, seed=1))[1]
    again = []
    for step in range(20):
        other.before_step(step, 600)
        again.append(other.rank_now)
    assert again != seen[:20]


def test_the_largest_rank_alone_is_lora():
    model, adapter, x = place("linear", va.DyLoRA(rank=3, smallest=3, alpha=5))
    before_step(model, 0, None)
    lora, other, _ = place("linear", va.LoRA(rank=3, alpha=5))
    other.load_state_dict(adapter.state_dict())
    close(model(x), lora(x))
    assert count(adapter) == count(other) == 3 * 17


def test_components_are_prefixes_and_refusals_say_why():
    adapter = place("linear", va.DyLoRA(rank=4, use=3))[1]
    for rank in (None, 1, 2, 4):
        down, up = adapter.components(rank)
        close(down, adapter.down[: rank or 3])
        close(up, adapter.up[:, : rank or 3] * 4 / (rank or 3))
    with pytest.raises(ValueError, match="has no rank 5"):
        adapter.components(5)
    with pytest.raises(ValueError, match="smallest=0.*1 to rank=8"):
        place("linear", va.DyLoRA(smallest=0))
    with pytest.raises(ValueError, match="use=9"):
        place("linear", va.DyLoRA(use=9))
