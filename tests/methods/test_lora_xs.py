"""LoRA-XS against an SVD of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_dense_formula(host):
    method = va.LoRAXS(rank=3, alpha=6)

    def dense(w, b, p):
        u, sigma, vt = torch.linalg.svd(w.detach().flatten(1), full_matrices=False)
        sign = torch.stack([column[column.abs().argmax()].sign() for column in u.t()])[:3]
        left, right = u[:, :3] * sign, sigma[:3, None] * (sign[:, None] * vt[:3])
        return w + 2.0 * (left @ p["core"] @ right).view_as(w), b

    compare(host, method, dense)


def test_the_identity_core_gives_the_best_approximation():
    model, adapter, _ = place("linear", va.LoRAXS(rank=2), moved=False)
    assert not adapter.core.any()
    adapter.core.data.copy_(torch.eye(2))
    u, sigma, vt = torch.linalg.svd(model[0].weight.detach())
    close(adapter.delta().detach(), (u[:, :2] * sigma[:2]) @ vt[:2])


def test_parameter_count():
    assert count(place("conv", va.LoRAXS(rank=3))[1]) == 9
    assert count(place("tall", va.LoRAXS(rank=64))[1]) == 16  # the rank of a (4, 9) matrix


def test_a_weight_without_singular_values_is_refused():
    layer = nn.Linear(3, 3)
    nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        va.adapt(nn.Sequential(layer), va.LoRAXS(), "0")
