"""HRA against a product of dense reflections."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place


def chain(vectors: torch.Tensor) -> torch.Tensor:
    product = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    for v in vectors:
        product = product @ (torch.eye(len(v), dtype=v.dtype) - 2 * torch.outer(v, v) / v.dot(v))
    return product


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_dense_formula(host):
    compare(host, va.HRA(rank=4), lambda w, b, p: ((w.flatten(1) @ chain(p["vectors"])).view_as(w), b))


def test_angles_between_rows_stay_and_pairs_start_as_the_identity():
    model, adapter, _ = place("conv", va.HRA(rank=4), moved=False)
    weight = model[0].weight.detach()
    close(adapter.new_weight(weight).detach(), weight)
    assert torch.equal(adapter.vectors[0], adapter.vectors[1])
    assert not torch.equal(adapter.vectors[1], adapter.vectors[2])
    nn.init.normal_(adapter.vectors)
    new, old = adapter.new_weight(weight).flatten(1), weight.flatten(1)
    close(new @ new.t(), old @ old.t())


def test_penalty():
    _, adapter, _ = place("linear", va.HRA(rank=2, orthogonality=0.5))
    with torch.no_grad():
        adapter.vectors.zero_()
        adapter.vectors[0, 0], adapter.vectors[1, :2] = 3.0, torch.tensor([3.0, 4.0])
    assert abs(adapter.penalty().item() - 0.5 * 2 * 0.6**2) < 1e-12
    assert place("linear", va.HRA())[1].penalty() is None


def test_parameter_count_and_refusal():
    assert count(place("linear", va.HRA(rank=4))[1]) == 4 * 7
    assert count(place("conv", va.HRA(rank=4))[1]) == 4 * 5 * 3 * 2
    with pytest.raises(ValueError, match="rank=3"):
        place("linear", va.HRA(rank=3))


@pytest.mark.slow  # PEFT imports transformers: 10 s on a busy machine
def test_equals_peft():
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    model, adapter, x = place("linear", va.HRA(rank=4))
    base = nn.Sequential(nn.Linear(7, 10)).double()
    base[0].load_state_dict({k: v for k, v in model[0].state_dict().items() if "adapters" not in k})
    other = peft.get_peft_model(base, peft.HRAConfig(r=4, target_modules=["0"])).base_model.model[0]
    with torch.no_grad():
        other.hra_u["default"].copy_(adapter.vectors.t())
    other.double()
    turned = other.get_base_layer().weight @ other.get_delta_weight("default")
    close(model(x), nn.functional.linear(x, turned, other.get_base_layer().bias), 1e-6)
