"""DV-LoRA against the dense formula, and its two phases."""

from __future__ import annotations

import pytest
import torch

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product
from visadapt.core.train import before_step, parameter_groups


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_dense_formula(host):
    def dense(w, b, p):
        up = torch.diag(p["outer"]) @ p["up"] @ torch.diag(p["inner"])
        return w + 2.0 * product(up, p["down"]), b

    compare(host, va.DVLoRA(rank=3, alpha=6), dense)


def test_gains_of_one_are_lora():
    _, adapter, _ = place("linear", va.DVLoRA(rank=3), moved=False)
    torch.nn.init.normal_(adapter.up)
    close(adapter.delta(), product(adapter.up, adapter.down))


def test_phases():
    """Factors move before the switch and gains after it, also under weight decay and momentum."""
    model, adapter, x = place("linear", va.DVLoRA(rank=2, warmup=3), moved=False)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, 0.1))
    for step in range(6):
        before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
        before_step(model, step, 6)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        moved = {n for n, p in adapter.named_parameters() if not torch.equal(p, before[n])}
        assert moved == ({"up", "down"} if step < 3 else {"inner", "outer"})  # A moves by decay in the first step
    before_step(model, 0, 6)
    assert adapter.up.requires_grad
    assert not adapter.inner.requires_grad


def test_without_phases_all_four_train():
    model, adapter, _ = place("linear", va.DVLoRA(warmup=None))
    before_step(model, 0, 6)
    assert all(p.requires_grad for p in adapter.parameters())


def test_parameter_count_and_start():
    _, adapter, _ = place("conv", va.DVLoRA(rank=3, start="uniform"), moved=False)
    assert count(adapter) == 3 * 5 * 3 * 2 + 8 * 3 + 3 + 8
    assert adapter.outer.abs().max() <= 1
    assert adapter.outer.min() < 0
    assert not adapter.up.any()


def test_refusals():
    for options, words in (({"warmup": 0}, "warmup=0"), ({"start": "zero"}, "start='zero'")):
        with pytest.raises(ValueError, match=words):
            place("linear", va.DVLoRA(**options))
