"""LoRA against the dense formula, its options, and PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("method", "scale"), [(va.LoRA(rank=3), 1.0), (va.LoRA(rank=4, alpha=6, rslora=True), 3.0)])
def test_equals_the_dense_formula(host, method, scale):
    compare(host, method, lambda w, b, p: (w + scale * product(p["up"], p["down"]), b))


def test_parameter_count():
    assert count(place("linear", va.LoRA(rank=3))[1]) == 3 * (7 + 10)
    assert count(place("conv", va.LoRA(rank=3))[1]) == 3 * 5 * 3 * 2 + 8 * 3


def test_lora_fa_trains_up_alone():
    model, adapter, x = place("linear", va.LoRA(rank=3, freeze_down=True))
    assert [n for n, _ in adapter.named_parameters()] == ["up"]
    assert "0.adapters.default.down" in model.state_dict()
    y, down = model(x), adapter.down
    weight = model[0].weight + product(adapter.up, down)
    want = nn.functional.linear(x, weight, model[0].bias)
    close(y, want)
    probe = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, [x, adapter.up], probe), torch.autograd.grad(want, [x, adapter.up], probe)):
        close(a, b)


def test_dropout_acts_on_the_update_and_in_training_alone():
    model, adapter, x = place("linear", va.LoRA(rank=3, dropout=0.5))
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        adapter.up.zero_()
    close(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
    nn.init.normal_(adapter.up)
    model.eval()
    close(model(x), nn.functional.linear(x, model[0].weight + adapter.delta(), model[0].bias))


def test_kaiming_bound_and_zero_start():
    _, adapter, _ = place("linear", va.LoRA(rank=64), moved=False)
    assert not adapter.up.any()
    assert 0.9 / 7**0.5 < adapter.down.abs().max() <= 1 / 7**0.5


@pytest.mark.slow  # PEFT imports transformers: 10 s on a busy machine
@pytest.mark.parametrize("host", ["linear", "tall"])  # PEFT crashes on dilated convolutions
def test_equals_peft(host):
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    model, adapter, x = place(host, va.LoRA(rank=3, alpha=6))
    base = va.remove(copy.deepcopy(model))
    other = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])).base_model.model[0]
    with torch.no_grad():
        other.lora_A["default"].weight.copy_(adapter.down)
        other.lora_B["default"].weight.copy_(adapter.up)
    other.lora_A.double(), other.lora_B.double()
    close(model(x), other(x), 1e-6)


def test_dropout_is_refused_where_inputs_are_not_seen():
    model = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="not seen where a weight is read"):
        va.adapt(model, va.LoRA(dropout=0.1), "in_proj_weight")
    va.adapt(model, va.LoRA(), "in_proj_weight")
