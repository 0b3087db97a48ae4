"""SSF against its formula, its two starts, and weight decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, compare, count, place


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_dense_formula(host):
    def dense(w, b, p):
        shape = (-1, *[1] * (w.dim() - 1))
        return p["scale"].view(shape) * w, p["shift"] if b is None else p["scale"] * b + p["shift"]

    compare(host, va.SSF(), dense)


def test_parameter_count():
    assert count(place("linear", va.SSF())[1]) == 2 * 10
    assert count(place("conv", va.SSF())[1]) == 2 * 8


def test_starts():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4000), nn.Linear(4, 4000)])
    va.adapt(model, va.SSF(), {"0": {}, "1": {"init": "normal"}})
    plain, paper = va.adapters(model).values()
    assert (plain.scale == 1).all()
    assert not plain.shift.any()
    assert paper.scale.mean().item() == pytest.approx(1.0, abs=2e-3)
    assert paper.scale.std().item() == pytest.approx(0.02, rel=0.1)
    assert paper.shift.std().item() == pytest.approx(0.02, rel=0.1)


def test_nothing_decays():
    assert set(va.SSF.no_decay) == {n for n, _ in place("linear", va.SSF())[1].named_parameters()}


def test_unknown_start():
    with pytest.raises(ValueError, match="'identity' or 'normal'"):
        va.adapt(nn.Sequential(nn.Linear(4, 4)), va.SSF(init="ones"), "0")
