"""Bottleneck adapters against their formula on plain layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visadapt as va
from tests.methods.reference import CONV, HOSTS, close, count, operate, place

KINDS = {"relu": F.relu, "gelu": F.gelu, "silu": lambda z: z * torch.sigmoid(z)}


def channels(y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A matrix over the channels of a Linear's or convolution's output."""
    if y.dim() == 3:
        return y @ weight.t() + bias
    return torch.einsum("oc,nchw->nohw", weight, y) + bias[:, None, None]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("where", ["sequential", "parallel"])
def test_equals_the_formula(where, activation, host):
    model, a, x = place(host, va.Bottleneck(rank=3, place=where, activation=activation, scale=0.5))
    layer = model[0]
    y = operate(layer, x, layer.weight, layer.bias)
    if where == "sequential":
        z = channels(y, a.down, a.down_bias)
    elif x.dim() == 3:
        z = x @ a.down.t() + a.down_bias
    else:
        z = F.conv2d(x, a.down, a.down_bias, **CONV)
    want = y + 0.5 * channels(KINDS[activation](z), a.up, a.up_bias)
    found, probe, sources = model(x), torch.randn_like(y), [x, *a.parameters()]
    close(found, want)
    for p, q in zip(torch.autograd.grad(found, sources, probe), torch.autograd.grad(want, sources, probe)):
        close(p, q)


def test_start_and_parameter_count():
    model, adapter, x = place("linear", va.Bottleneck(rank=3), moved=False)
    close(model(x), F.linear(x, model[0].weight, model[0].bias))
    assert count(adapter) == 2 * 10 * 3 + 3 + 10
    assert count(place("conv", va.Bottleneck(rank=3, place="parallel"))[1]) == 5 * 6 * 3 + 3 * 8 + 3 + 8
    wide = va.adapt(nn.Sequential(nn.Linear(3072, 768)), va.Bottleneck(rank=48), "0")
    assert va.summary(wide).trainable == 74_544  # a block of ViT-B at reduction 16


def test_it_cannot_be_merged():
    model, _, _ = place("linear", va.Bottleneck())
    with pytest.raises(ValueError, match="not affine"):
        va.merge(model)


def test_refusals():
    for options, words in (({"place": "before"}, "place='before'"), ({"activation": "tanh"}, "activation='tanh'")):
        with pytest.raises(ValueError, match=words):
            place("linear", va.Bottleneck(**options))
    with pytest.raises(ValueError, match="grouped convolution"):
        va.adapt(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), va.Bottleneck(place="parallel"), "0")
