"""OFT and BOFT against dense rotations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place

SIDES = {("linear", 32): 7, ("tall", 4): 3, ("conv", 8): 6}


def rotation(angles: torch.Tensor, side: int) -> torch.Tensor:
    q = torch.zeros(side, side, dtype=angles.dtype)
    pairs = [(i, j) for i in range(side) for j in range(i + 1, side)]
    for value, (i, j) in zip(angles, pairs):
        unit = torch.zeros_like(q)
        unit[i, j], unit[j, i] = 1.0, -1.0
        q = q + value * unit
    eye = torch.eye(side, dtype=angles.dtype)
    return (eye + q) @ torch.linalg.inv(eye - q)


@pytest.mark.parametrize(("host", "block"), SIDES)
def test_oft_equals_the_dense_formula(host, block):
    side = SIDES[host, block]

    def dense(w, b, p):
        turns = torch.block_diag(*(rotation(a, side) for a in p["angles"][0]))
        return (w.flatten(1) @ turns).view_as(w), b

    compare(host, va.OFT(block=block), dense)


def butterfly(angles: torch.Tensor, side: int, level: int) -> torch.Tensor:
    half, size = side // 2, len(angles) * side
    dense, number = torch.zeros(size, size, dtype=angles.dtype), 0
    for first in range(2 * len(angles)):
        if not (first >> level) & 1:
            where = torch.tensor([h * half + k for h in (first, first + (1 << level)) for k in range(half)])
            dense = dense.index_put((where[:, None], where[None]), rotation(angles[number], side))
            number += 1
    return dense


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft_equals_the_product_of_butterflies(factors):
    torch.manual_seed(0)
    layer = nn.Linear(16, 5).double()
    weight, x = layer.weight.detach().clone(), torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    model = va.adapt(nn.Sequential(layer), va.BOFT(block=4, factors=factors), "0")
    (adapter,) = va.adapters(model).values()
    nn.init.normal_(adapter.angles)
    assert len(adapter.angles) == factors
    product = torch.eye(16, dtype=torch.float64)
    for level, angles in enumerate(adapter.angles):
        product = product @ butterfly(angles, 4, level)
    want, probe = x @ (weight @ product).t() + layer.bias, torch.randn(3, 5, dtype=torch.float64)
    found = model(x)
    close(found, want)
    for a, b in zip(torch.autograd.grad(found, [x, adapter.angles], probe),
                    torch.autograd.grad(want, [x, adapter.angles], probe)):  # fmt: skip
        close(a, b)
    close(product @ product.t(), torch.eye(16, dtype=torch.float64))


def test_every_input_reaches_every_other_one():
    """16 inputs in half-blocks of 1: four factors of 2 × 2 rotations give a dense matrix, three do not."""
    for factors, full in ((3, False), (4, True)):
        model = va.adapt(nn.Sequential(nn.Linear(16, 16, bias=False)), va.BOFT(block=2, factors=factors), "0")
        (adapter,) = va.adapters(model).values()
        nn.init.normal_(adapter.angles)
        assert bool((adapter.turn(torch.eye(16), va.core.site.Site(model[0])) != 0).all()) == full


@pytest.mark.parametrize("method", [va.OFT(block=4), va.BOFT(block=4)])
def test_angles_between_rows_stay(method):
    model = va.adapt(nn.Sequential(nn.Conv2d(4, 6, 3)).double(), method, "0")
    (adapter,) = va.adapters(model).values()
    nn.init.normal_(adapter.angles)
    matrix = model[0].weight.detach()
    new = adapter.new_weight(matrix).flatten(1)
    close(new @ new.t(), matrix.flatten(1) @ matrix.flatten(1).t())


def test_parameter_count_and_sides():
    assert count(place("linear", va.OFT())[1]) == 7 * 6 // 2
    assert count(place("conv", va.OFT(block=8))[1]) == 5 * 6 * 5 // 2  # 30 inputs: the largest divisor is 6
    assert count(va.adapters(va.adapt(nn.Sequential(nn.Linear(768, 8)), va.BOFT(), "0"))["0.adapters.default"]) == (
        2 * 96 * 28
    )
    odd = va.adapters(va.adapt(nn.Sequential(nn.Linear(6, 8)), va.BOFT(), "0"))["0.adapters.default"]
    assert odd.angles.shape == (1, 1, 15)  # 6 is no multiple of 4: one factor, OFT


def test_no_weight_is_formed_for_vectors():
    model = va.adapt(nn.Sequential(nn.Linear(64, 64)), va.OFT(block=4), "0")
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model(torch.randn(3, 64, requires_grad=True))
    assert shapes.count((64, 64)) <= 1  # W itself


def test_inputs_without_a_divisor_are_refused():
    with pytest.raises(ValueError, match="its 7 inputs have no divisor from 2 to block=4"):
        place("linear", va.OFT(block=4))
    assert set(HOSTS) == {h for h, _ in SIDES}
