"""Compacter against torch.kron, and its shared tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visadapt as va
from tests.methods.reference import close, count, operate, place


def summed(slow: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return sum(torch.kron(slow[i], left[i] @ right[i]) for i in range(len(slow)))


@pytest.mark.parametrize("host", ["linear", "tall", "conv"])
@pytest.mark.parametrize("options", [{"rank": 6, "parts": 2}, {"rank": 4, "parts": 2, "inner": 3}, {"rank": 3}])
def test_equals_the_formula(options, host):
    model, a, x = place(host, va.Compacter(**options))
    layer = model[0]
    y = operate(layer, x, layer.weight, layer.bias)
    down, up = summed(a.slow, a.down_left, a.down_right), summed(a.slow, a.up_left, a.up_right)
    rows = y if y.dim() == 3 else y.movedim(1, -1)
    side = F.gelu(rows @ down + a.down_bias, approximate="tanh") @ up + a.up_bias
    want = y + (side if y.dim() == 3 else side.movedim(-1, 1))
    found, probe, sources = model(x), torch.randn_like(y), [x, *a.parameters()]
    close(found, want)
    for p, q in zip(torch.autograd.grad(found, sources, probe), torch.autograd.grad(want, sources, probe)):
        close(p, q)


def test_all_layers_share_one_tensor_and_it_counts_once():
    """ViT-B with two adapters a block: 24 · 2376 + 64 parameters."""
    model = nn.Sequential(*(nn.Linear(8, 768) for _ in range(2)))
    va.adapt(model, va.Compacter(), ["0", "1"])
    first, second = va.adapters(model).values()
    assert first.slow is second.slow
    assert va.summary(model).trainable == 2 * 2376 + 64
    assert count(first) == 2376 + 64


def test_start_and_split():
    model, adapter, x = place("linear", va.Compacter(rank=6), moved=False)
    close(model(x), F.linear(x, model[0].weight, model[0].bias))
    assert adapter.slow.shape == (2, 2, 2)  # 10 outputs, rank 6: the largest common divisor up to 4
    assert place("tall", va.Compacter(rank=8))[1].slow.shape == (4, 4, 4)


def test_refusals():
    with pytest.raises(ValueError, match="parts=0"):
        place("linear", va.Compacter(parts=0))
    with pytest.raises(ValueError, match="not affine"):
        va.merge(place("linear", va.Compacter())[0])
