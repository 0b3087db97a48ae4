"""LoCA against dense cosine transforms, and its phases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, compare, count, place
from visadapt.core.train import after_step, before_step


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("size", [6, 200])
def test_equals_a_sum_of_cosines(size, host):
    def basis(n, k):
        wave = torch.cos(math.pi * (2 * torch.arange(n).double() + 1) * k / (2 * n)) * (2 / n) ** 0.5
        return wave / 2**0.5 if k == 0 else wave

    def dense(w, b, p):
        out, fan_in = w.flatten(1).shape
        total = torch.zeros(out, fan_in, dtype=w.dtype)
        for value, (u, v) in zip(p["spectrum"], p["places"].t().detach().clamp(0, 1)):
            row, column = round((u * (out - 1)).item()), round((v * (fan_in - 1)).item())
            total = total + value * torch.outer(basis(out, row), basis(fan_in, column))
        # The gradient of places is not autograd's: tests/maths/test_cosine.py has it.
        return w + 2.0 * total.view_as(w), b

    compare(host, va.LoCA(count=size, alpha=2.0), dense, autograd=False)


def test_phases():
    """Values, then places, in turn; then values alone. What does not train does not move."""
    model, adapter, x = place("conv", va.LoCA(count=5, moving=8, value_steps=2, place_steps=2), moved=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    trained = []
    for step in range(12):
        before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
        before_step(model, step, 12)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        after_step(model)
        trained.append({n for n, p in adapter.named_parameters() if not torch.equal(p, before[n])})
    values, places = {"spectrum"}, {"places"}
    assert trained == [values] * 2 + [places] * 2 + [values] * 2 + [places] * 2 + [values] * 4
    assert adapter.places.min() >= 0
    assert adapter.places.max() <= 1


@pytest.mark.parametrize(("total", "moving"), [(200, 20), (None, 0)])
def test_places_move_in_a_tenth_of_the_steps(total, moving):
    model, adapter, _ = place("linear", va.LoCA(count=5, value_steps=1, place_steps=1))
    found = []
    for step in range(40):
        before_step(model, step, total)
        found.append(adapter.places.requires_grad)
        assert adapter.spectrum.requires_grad != found[-1]
    assert found == [step < moving and step % 2 == 1 for step in range(40)]


def test_parameter_count_and_what_is_saved():
    _, adapter, _ = place("linear", va.LoCA(count=9), moved=False)
    assert count(adapter) == 3 * 9
    assert set(adapter.state_dict()) == {"spectrum", "places"}
    assert not adapter.spectrum.any()


def test_layers_share_tables():
    model = va.adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), va.LoCA(count=2), ["0", "1"])
    first, second = va.adapters(model).values()
    assert first.row_table is first.column_table
    assert first.row_table is second.column_table


def test_refusals():
    for options, words in (({"count": 0}, "count=0"), ({"value_steps": 0}, "value_steps=0")):
        with pytest.raises(ValueError, match=words):
            place("linear", va.LoCA(**options))
