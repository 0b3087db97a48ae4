"""LoHa against the Hadamard product, its two forms, and PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, loha, place


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("rank", [1, 4])  # two thin products, and a dense ΔW
def test_equals_the_dense_formula(host, rank):
    method = va.LoHa(rank=rank, alpha=2 * rank)
    compare(host, method, lambda w, b, p: (w + loha(p, 2.0), b))
    assert place(host, method)[1].fusable == (rank == 1)


def test_parameter_count():
    assert count(place("linear", va.LoHa(rank=3))[1]) == 2 * 3 * (7 + 10)
    assert count(place("conv", va.LoHa(rank=3))[1]) == 2 * 3 * (5 * 3 * 2 + 8)


@pytest.mark.parametrize("host", ["linear", "conv"])
def test_is_a_lora_of_rank_squared(host):
    _, adapter, _ = place(host, va.LoHa(rank=2, alpha=3))
    down, up = adapter.factors()
    assert down.shape[0] == up.shape[1] == 4
    close(torch.einsum("or,r...->o...", up, down), adapter.delta())
    assert torch.linalg.matrix_rank(adapter.delta().flatten(1)) == 4


def test_start():
    torch.manual_seed(0)
    model = va.adapt(nn.Sequential(nn.Linear(500, 400)), va.LoHa(rank=8), "0")
    (adapter,) = va.adapters(model).values()
    assert not adapter.up_b.any()
    for name, std in {"down_a": 1.0, "down_b": 1.0, "up_a": 0.1}.items():
        assert getattr(adapter, name).std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.slow  # PEFT imports transformers: 10 s on a busy machine
def test_equals_peft():
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    model, adapter, x = place("linear", va.LoHa(rank=3, alpha=6))
    base = va.remove(copy.deepcopy(model))
    other = peft.get_peft_model(base, peft.LoHaConfig(r=3, alpha=6, target_modules=["0"])).base_model.model[0]
    pairs = {"hada_w1_a": "up_a", "hada_w1_b": "down_a", "hada_w2_a": "up_b", "hada_w2_b": "down_b"}
    for theirs, ours in pairs.items():
        getattr(other, theirs)["default"].data = getattr(adapter, ours).data
    close(model(x), other(x))
