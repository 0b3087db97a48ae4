"""VeRA against the dense formula, what layers share, and what a file holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, compare, count, place


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_dense_formula(host):
    _, placed, _ = place(host, va.VeRA(rank=6))
    a, b = placed.down, placed.basis

    def dense(w, bias, p):
        change = torch.diag(p["outer"]) @ b @ torch.diag(p["inner"]) @ a.flatten(1)
        return w + change.view_as(w), bias

    compare(host, va.VeRA(rank=6), dense)


def test_parameter_count_and_start():
    _, adapter, _ = place("conv", va.VeRA(rank=6), moved=False)
    assert count(adapter) == 6 + 8
    assert (adapter.inner == 0.1).all()
    assert not adapter.outer.any()
    assert not adapter.state_dict().keys() & {"down", "basis"}, "frozen matrices are drawn again, not saved"


def test_layers_share_the_matrices_and_seeds_differ():
    def built(seed):
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 9))
        return list(va.adapters(va.adapt(model, va.VeRA(rank=64, seed=seed), ["0", "1", "2"])).values())

    first, second, third = built(0)
    assert first.down is third.down
    assert first.basis is not second.basis
    assert torch.equal(built(0)[0].basis, first.basis)
    assert not torch.equal(built(1)[0].down, first.down)
    bound = (6 / 64) ** 0.5
    assert 0.95 * bound < first.basis.abs().max() <= bound


def test_the_input_is_not_kept():
    """A is frozen, so only A x (rank numbers a position) is needed in backward."""
    model = va.adapt(nn.Sequential(nn.Linear(64, 64)), va.VeRA(rank=4), "0")
    kept = []
    x = torch.randn(100, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        model(x)
    assert 100 * 4 * 4 in kept
    assert 100 * 64 * 4 not in kept
