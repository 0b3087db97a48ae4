"""LoLDU against an elimination of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place


def eliminate(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P L, D and U of Gaussian elimination with row pivots, step by step."""
    rest, k = weight.clone(), min(weight.shape)
    order = list(range(len(weight)))
    lower = torch.zeros(len(weight), k, dtype=weight.dtype)
    for step in range(k):
        pivot = step + int(rest[step:, step].abs().argmax())
        for matrix in (rest, lower):
            matrix[[step, pivot]] = matrix[[pivot, step]]
        order[step], order[pivot] = order[pivot], order[step]
        lower[step, step] = 1
        lower[step + 1 :, step] = rest[step + 1 :, step] / rest[step, step]
        rest[step + 1 :] -= lower[step + 1 :, step, None] * rest[step].clone()
    placed = torch.empty_like(lower)
    placed[order] = lower
    upper = rest[:k].triu()
    return placed, upper.diagonal(), upper / upper.diagonal()[:, None]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("rank", [3, 768])
def test_equals_the_dense_formula(rank, host):
    def dense(w, b, p):
        left, _, right = eliminate(w.detach().flatten(1))
        r = len(p["diagonal"])
        return w + 2.0 * (left[:, :r] @ torch.diag(p["diagonal"]) @ right[:r]).view_as(w), b

    compare(host, va.LoLDU(rank=rank, alpha=2.0 * rank), dense)


@pytest.mark.parametrize("host", HOSTS)
def test_the_full_diagonal_taken_off_leaves_nothing(host):
    """With all components and z = −D the weight is gone: P L diag(D) U = W."""
    model, adapter, _ = place(host, va.LoLDU(), moved=False)
    weight = model[0].weight.detach()
    adapter.diagonal.data.copy_(-eliminate(weight.flatten(1))[1])
    close(adapter.new_weight(weight).detach(), torch.zeros_like(weight))


def test_parameter_count_and_what_is_saved():
    _, adapter, _ = place("conv", va.LoLDU(rank=3))
    assert count(adapter) == 3
    assert set(adapter.state_dict()) == {"diagonal"}
    assert count(place("conv", va.LoLDU())[1]) == 8


def test_weights_without_a_decomposition_are_refused():
    for value, words in ((float("nan"), "not finite"), (0.0, "not of full rank")):
        layer = nn.Linear(3, 3)
        nn.init.constant_(layer.weight, value)
        with pytest.raises(ValueError, match=words):
            va.adapt(nn.Sequential(layer), va.LoLDU(), "0")
