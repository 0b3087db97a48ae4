"""The fused operation against plain autograd in float64: factored and merged forms, rows, gains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visadapt.core import linear_op
from visadapt.core.linear_op import Part, _composed, update


def parts(inputs, gains, rows, train_down=True):
    made = []
    for gain, r in zip(gains, rows):
        width = 12 if r is None else r[1] - r[0]
        down = torch.randn(3, inputs, dtype=torch.float64, requires_grad=train_down)
        up = torch.randn(width, 3, dtype=torch.float64, requires_grad=True)
        scale = (torch.rand(width, dtype=torch.float64) + 0.5).requires_grad_() if gain else None
        made.append(Part(down, up, scale, r))
    return made


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train_down", [False, True])
@pytest.mark.parametrize(
    ("gains", "rows"),
    [([False], [None]), ([True], [None]), ([False, True], [(0, 4), (8, 12)]), ([False, False], [(2, 9), (4, 12)])],
    ids=str,
)
def test_equals_plain_autograd(merged, bias, train_down, gains, rows, monkeypatch):
    monkeypatch.setattr(linear_op, "merged_is_cheaper", lambda n, w: merged)
    torch.manual_seed(0)
    layer = nn.Linear(7, 12, bias=bias).double()
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    made = parts(7, gains, rows, train_down)
    sources = [t for p in made for t in (p.down, p.up, p.gain) if t is not None and t.requires_grad]
    sources += [x, *([layer.bias] if bias else [])]
    y = update(layer, x, layer.weight, layer.bias, made)
    expected = _composed(layer, x, layer.weight, layer.bias, made, None)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, sources, cotangent), torch.autograd.grad(expected, sources, cotangent)):
        torch.testing.assert_close(got, want)


def test_merging_needs_true_fp32_and_many_positions(monkeypatch):
    weight = torch.zeros(768, 768)
    assert linear_op.merged_is_cheaper(2000, weight)
    assert not linear_op.merged_is_cheaper(500, weight)
    assert not linear_op.merged_is_cheaper(2000, weight.bfloat16())
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert not linear_op.merged_is_cheaper(2000, weight)
    assert linear_op.merged_is_cheaper(2000, weight.double())


def test_a_trained_weight_gets_its_gradient_too():
    torch.manual_seed(0)
    layer = nn.Linear(7, 12).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    y = update(layer, x, layer.weight, layer.bias, parts(7, [True], [None]))
    y.sum().backward()
    assert layer.weight.grad is not None


def test_first_layers_need_no_gradient_for_their_input():
    layer = nn.Conv2d(3, 12, 3).requires_grad_(False)
    part = Part(torch.randn(2, 3, 3, 3, requires_grad=True), torch.randn(12, 2, requires_grad=True))
    update(layer, torch.randn(1, 3, 6, 6), layer.weight, layer.bias, [part]).sum().backward()
    assert part.down.grad is not None
