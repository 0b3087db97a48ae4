"""DoRA against the dense formula: norm axis, gradient through the norm, magnitudes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, dora, operate, place, product
from visadapt.core.train import parameter_groups


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("detach", [True, False])
def test_equals_the_dense_formula(host, axis, detach):
    compare(
        host,
        va.DoRA(rank=2, alpha=3, axis=axis, detach_norm=detach),
        lambda w, b, p: (dora(w, p["down"], p["up"], p["magnitude"], 1.5, axis, detach), b),
    )


def test_parameter_count():
    assert count(place("linear", va.DoRA(rank=3))[1]) == 3 * (7 + 10) + 10
    assert count(place("linear", va.DoRA(rank=3, axis="in"))[1]) == 3 * (7 + 10) + 7
    assert count(place("conv", va.DoRA(rank=3))[1]) == 3 * 5 * 3 * 2 + 8 * 3 + 8


@pytest.mark.parametrize("axis", ["out", "in"])
def test_equals_lora_where_the_magnitude_is_the_norm(axis):
    model, adapter, x = place("conv", va.DoRA(rank=2, axis=axis))
    weight = model[0].weight + product(adapter.up, adapter.down)
    with torch.no_grad():
        order = weight if axis == "out" else weight.transpose(0, 1)
        adapter.magnitude.copy_(order.flatten(1).norm(dim=1))
    close(model(x), operate(model[0], x, weight, model[0].bias))


def test_rebuild_reads_the_weights_that_were_loaded_behind_it():
    model, _, x = place("linear", va.DoRA(rank=2), moved=False)
    with torch.no_grad():
        model[0].weight.mul_(3).add_(0.1)
    plain = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert not torch.allclose(model(x), plain)
    va.rebuild(model)
    close(model(x), plain)


def test_the_magnitude_does_not_decay():
    model, adapter, _ = place("linear", va.DoRA(rank=2), moved=False)
    before = adapter.magnitude.detach().clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.1, weight_decay=0.5))
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    down = adapter.down.detach().clone()
    for _ in range(5):
        optimizer.step()
    assert torch.equal(adapter.magnitude, before)
    assert adapter.down.norm() < 0.9 * down.norm()


@pytest.mark.slow  # PEFT imports transformers: 10 s on a busy machine
def test_equals_peft():
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    model, adapter, x = place("linear", va.DoRA(rank=3, alpha=6))
    base = va.remove(copy.deepcopy(model))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True)
    other = peft.get_peft_model(base, config).base_model.model[0].double()
    with torch.no_grad():
        other.lora_A["default"].weight.copy_(adapter.down)
        other.lora_B["default"].weight.copy_(adapter.up)
        other.lora_magnitude_vector["default"].weight.copy_(adapter.magnitude)
    close(model(x), other(x))


@pytest.mark.parametrize("host", ["linear", "conv"])
def test_rows_of_zeros_stay_and_a_weight_of_zeros_is_refused(host):
    model, adapter, x = place(host, va.DoRA(rank=2), moved=False)
    with torch.no_grad():
        model[0].weight[1] = 0
        nn.init.normal_(adapter.down)
    va.rebuild(model)
    model(x).square().sum().backward()
    assert adapter.magnitude[1] == adapter.magnitude.grad[1] == 0
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    nn.init.normal_(adapter.up)
    with va.merged(model):
        assert model[0].weight.isfinite().all()
        assert not model[0].weight[1].any()
    with torch.no_grad():
        nn.init.zeros_(model[0].weight)
    va.remove(model)
    with pytest.raises(ValueError, match="its weight is zero"):
        va.adapt(model, va.DoRA(rank=2), "0")
