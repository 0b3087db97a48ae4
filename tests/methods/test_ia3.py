"""(IA)³ against the dense formula on both axes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, compare, count, place


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_equals_the_dense_formula(axis, host):
    letters = {"out": "o", "in": "i"}[axis]
    compare(host, va.IA3(axis=axis), lambda w, b, p: (torch.einsum(f"oi...,{letters}->oi...", w, p["gain"]), b))


def test_parameter_count_and_start():
    for axis, size in (("out", 8), ("in", 5)):
        _, adapter, _ = place("conv", va.IA3(axis=axis), moved=False)
        assert count(adapter) == size
        assert (adapter.gain == 1).all()


def test_a_gain_on_inputs_forms_no_weight():
    """It goes to x: forward and backward keep x and nothing of the size of W."""
    model = va.adapt(nn.Sequential(nn.Linear(64, 64)), va.IA3(axis="in"), "0")
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model(torch.randn(3, 64, requires_grad=True))
    assert shapes.count((64, 64)) <= 1  # W itself, for the gradient of x


def test_axes_of_a_transformer_in_one_set():
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12), "fc2": nn.Linear(8, 4)})
    va.adapt(model, va.IA3(), {"qkv:k": {}, "qkv:v": {}, "fc2": {"axis": "in"}})
    assert [count(a) for a in va.adapters(model).values()] == [4, 4, 8]


def test_two_sets_compose():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    x, w = torch.randn(2, 4), layer.weight.detach().clone()
    model = va.adapt(nn.Sequential(layer), va.IA3(axis="in"), "0")
    va.adapt(model, va.IA3(), "0", name="outputs")
    with torch.no_grad():
        for a in va.adapters(model).values():
            a.gain.copy_(torch.arange(1.0, 1 + len(a.gain)))
    want = torch.arange(1.0, 4)[:, None] * w * torch.arange(1.0, 5)
    torch.testing.assert_close(model(x), x @ want.t())


def test_refusals():
    with pytest.raises(ValueError, match="no common gain"):
        va.adapt(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), va.IA3(axis="in"), "0")
    with pytest.raises(ValueError, match="axis='rows'"):
        va.adapt(nn.Sequential(nn.Linear(4, 4)), va.IA3(axis="rows"), "0")
