"""FourierFT against sums of cosines and PEFT's formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, compare, count, place


@pytest.mark.parametrize("host", HOSTS)
def test_equals_a_sum_of_cosines(host):
    method = va.FourierFT(count=9, alpha=20.0)
    places = place(host, method)[1].places

    def dense(w, b, p):
        out, fan_in = w.flatten(1).shape
        rows, columns = torch.arange(out)[:, None], torch.arange(fan_in)[None]
        total = torch.zeros(out, fan_in, dtype=w.dtype)
        for value, where in zip(p["spectrum"], places.tolist()):
            u, v = divmod(where, fan_in)
            turns = (u * rows).double() / out + (v * columns).double() / fan_in
            total = total + value * torch.cos(2 * math.pi * turns)
        return w + 20.0 / (out * fan_in) * total.view_as(w), b

    compare(host, method, dense)


def test_parameter_count_places_and_start():
    _, adapter, _ = place("linear", va.FourierFT(count=30), moved=False)
    assert count(adapter) == 30
    assert len(adapter.places.unique()) == 30
    assert adapter.places.max() < 70
    assert not adapter.spectrum.any()
    assert set(adapter.state_dict()) == {"spectrum"}
    assert count(place("linear", va.FourierFT())[1]) == 70  # all there are
    assert place("linear", va.FourierFT(start="normal"), moved=False)[1].spectrum.std() > 0.5


def test_layers_of_a_shape_share_places_and_seeds_differ():
    def places(seed):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 7))
        va.adapt(model, va.FourierFT(count=5, seed=seed), ["0", "1", "2"])
        return [a.places for a in va.adapters(model).values()]

    first, second, third = places(0)
    assert first is second
    assert not torch.equal(first, third)
    assert not torch.equal(first, places(1)[0])


def test_refusals():
    for options, words in (({"count": 0}, "count=0"), ({"start": "one"}, "start='one'")):
        with pytest.raises(ValueError, match=words):
            place("linear", va.FourierFT(**options))
