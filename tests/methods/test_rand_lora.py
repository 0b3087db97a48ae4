"""RandLoRA against the sum of its bases, its rank, and the bases themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, compare, count, place


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("rank", [2, 3])
def test_equals_the_dense_formula(rank, host):
    method = va.RandLoRA(rank=rank, alpha=1.5)
    _, placed, _ = place(host, method)
    a, b = placed.right, placed.left  # (rank, min), (max, n, rank)

    def dense(w, bias, p):
        total = sum(b[:, j] @ torch.diag(p["lamda"][j]) @ a @ torch.diag(p["gamma"][j]) for j in range(len(p["lamda"])))
        out, fan_in = w.flatten(1).shape
        total = 1.5 / rank * (total if out >= fan_in else total.t())
        return w + total.reshape(w.shape), bias

    compare(host, method, dense)


def test_parameter_count_falls_with_the_rank():
    assert count(place("linear", va.RandLoRA(rank=2))[1]) == 4 * (2 + 7)  # ⌈7 / 2⌉ bases
    assert count(place("linear", va.RandLoRA(rank=7))[1]) == 1 * (7 + 7)
    assert count(place("linear", va.RandLoRA(rank=50))[1]) == 1 * (7 + 7)


def test_count_on_vit_base():
    """3,566,592 parameters at rank 6 on qkv, fc1 and fc2 of twelve blocks, as PEFT counts them."""
    model = nn.Sequential(nn.Linear(768, 2304), nn.Linear(768, 3072), nn.Linear(3072, 768))
    va.adapt(model, va.RandLoRA(rank=6), ["0", "1", "2"])
    assert 12 * va.summary(model).trainable == 3_566_592


def test_the_update_has_full_rank():
    _, adapter, _ = place("linear", va.RandLoRA(rank=2))
    assert torch.linalg.matrix_rank(adapter.delta()) == 7


@pytest.mark.parametrize(("bases", "zeros"), [("uniform", 0.0), ("sparse", 2 / 3), ("very_sparse", 1 - 2 / 256**0.5)])
def test_bases_have_unit_deviation_and_their_share_of_zeros(bases, zeros):
    model = va.adapt(nn.Sequential(nn.Linear(128, 256)), va.RandLoRA(rank=16, bases=bases), "0")
    (adapter,) = va.adapters(model).values()
    left = adapter.left
    assert abs(left.std().item() - 1) < 0.05
    assert abs((left == 0).float().mean().item() - zeros) < 0.02
    assert bases == "uniform" or len(left.unique()) == 3


def test_layers_share_bases_and_a_file_has_none():
    model = va.adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), va.RandLoRA(rank=2), ["0", "1"])
    first, second = va.adapters(model).values()
    assert first.left is second.left
    assert first.right is second.right
    assert set(first.state_dict()) == {"lamda", "gamma"}


def test_an_unknown_basis_is_refused():
    with pytest.raises(ValueError, match="bases='normal'"):
        va.adapt(nn.Sequential(nn.Linear(4, 4)), va.RandLoRA(bases="normal"), "0")
