"""GLoRA against the dense formula in all its forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product

FORMS = {
    "default": {},
    "low rank": {"gain": "lora", "update": "lora"},
    "vectors": {"gain": "vector", "update": "vector"},
    "scalars": {"gain": "scalar", "update": "scalar", "bias_gain": "scalar", "shift": "scalar", "prompt": "none"},
    "shift alone": {"gain": "none", "update": "none", "bias_gain": "none", "prompt": "none"},
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_dense_formula(form, host):
    def matrix(p, name, w):
        if f"{name}_up" in p:
            return product(p[f"{name}_up"], p[f"{name}_down"])
        row = p.get(f"{name}_row", torch.zeros(1, dtype=w.dtype)).expand(len(w))
        return row.view(-1, *[1] * (w.dim() - 1)).expand_as(w)

    def dense(w, b, p):
        new = w + w * matrix(p, "gain", w) + matrix(p, "update", w)
        bias = torch.zeros(len(w), dtype=w.dtype) if b is None else b + b * p.get("bias_gain_row", 0)
        if "prompt_column" in p:
            bias = bias + w.flatten(1) @ p["prompt_column"]
        return new, bias + p["shift_row"]

    compare(host, va.GLoRA(rank=2, **FORMS[form]), dense)


def test_frozen_weights_are_meant_whatever_acts_before():
    model, adapter, _ = place("linear", va.GLoRA(update="none"))
    base = model[0].weight.detach().clone()
    va.adapt(model, va.LoRA(rank=2), "0", name="other", freeze=False)
    other = va.adapters(model, "other")["0.adapters.other"]
    nn.init.normal_(other.up)
    want = base + adapter.gain_row[:, None] * base + other.up @ other.down
    with va.merged(model):
        close(model[0].weight, want.detach())


def test_parameter_count():
    assert count(place("linear", va.GLoRA(rank=2))[1]) == 10 + 2 * (7 + 10) + 7 + 10 + 10
    assert count(place("tall", va.GLoRA(rank=2))[1]) == 4 + 2 * (9 + 4) + 9 + 4  # no bias, no D
    assert count(place("linear", va.GLoRA(**FORMS["scalars"]))[1]) == 4


def test_refusals():
    none = dict.fromkeys(("gain", "update", "prompt", "bias_gain", "shift"), "none")
    for options, words in (({"gain": "matrix"}, "gain='matrix'"), (none, "'none'"),
                           ({**none, "bias_gain": "vector"}, "'none'")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            place("tall", va.GLoRA(**options))
