"""NICE: its couplings, and that they can be undone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, count, operate, place
from visadapt.core.site import Site


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_formula(host):
    model, a, x = place(host, va.NICE())
    layer = model[0]
    y = operate(layer, x, layer.weight, layer.bias)
    rows = y if y.dim() == 3 else y.movedim(1, -1)
    half = rows.shape[-1] // 2
    one, two = rows[..., :half], rows[..., half:]
    one = one + F.gelu(two @ a.down_f.t() + a.down_bias_f) @ a.up_f.t() + a.up_bias_f
    two = two + F.gelu(one @ a.down_g.t() + a.down_bias_g) @ a.up_g.t() + a.up_bias_g
    want = torch.cat([one, two], -1)
    close(model(x), want if y.dim() == 3 else want.movedim(-1, 1))


@pytest.mark.parametrize("layer", [nn.Linear(4, 7), nn.Conv2d(4, 6, 3)])
def test_can_be_undone(layer):
    model = va.adapt(nn.Sequential(layer), va.NICE(), "0").double()
    (adapter,) = va.adapters(model).values()
    for p in adapter.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 4, dtype=torch.float64) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5).double()
    y = model(x)
    with va.strength(model, 0.0):
        base = model(x)
    assert not torch.allclose(y, base)
    close(adapter.inverse(y, Site(layer)), base)


def test_start_and_parameter_count():
    model, adapter, x = place("linear", va.NICE(), moved=False)
    close(model(x), F.linear(x, model[0].weight, model[0].bias))
    assert count(adapter) == 2 * (5 * 2 + 2 + 2 * 5 + 5)
    wide = va.adapt(nn.Sequential(nn.Linear(16, 768)), va.NICE(), "0")
    assert va.summary(wide).trainable == 296_064


def test_refusals():
    with pytest.raises(ValueError, match="one output"):
        va.adapt(nn.Sequential(nn.Linear(4, 1)), va.NICE(), "0")
    with pytest.raises(ValueError, match="reduction=0"):
        place("linear", va.NICE(reduction=0))
