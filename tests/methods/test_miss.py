"""MiSS against explicit tiling, as a LoRA, and against PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product


def tiled(shard: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    change = torch.stack([shard[:, c % shard.shape[1]] for c in range(shape[1])], 1)
    return torch.cat([change] * (shape[0] // len(change)))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": 64}, {"rank": 2, "mini": 2}])
def test_equals_the_dense_formula(options, host):
    compare(host, va.MiSS(**options), lambda w, b, p: (w + tiled(p["shard"], w.shape), b))


@pytest.mark.parametrize("host", HOSTS)
def test_is_a_lora_of_fixed_sums(host):
    _, adapter, _ = place(host, va.MiSS(rank=2))
    down, up = adapter.factors()
    close(product(up, down), adapter.delta())
    assert set(down.unique().tolist()) <= {0.0, 1.0}


def test_parameter_count():
    assert count(place("linear", va.MiSS(rank=3))[1]) == 3 * 10
    assert count(place("linear", va.MiSS(rank=3, mini=2))[1]) == 3 * 2
    assert count(place("conv", va.MiSS(rank=3))[1]) == 3 * 8 * 3 * 2


def test_a_shard_of_all_inputs_is_any_update():
    _, adapter, _ = place("linear", va.MiSS(rank=7))
    close(adapter.delta(), adapter.shard)


def test_mini_must_divide():
    with pytest.raises(ValueError, match="mini=3 does not divide its 10 outputs"):
        place("linear", va.MiSS(mini=3))


@pytest.mark.slow  # PEFT imports transformers: 10 s on a busy machine
def test_equals_peft():
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    base = nn.Sequential(nn.Linear(8, 6)).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    model = va.adapt(nn.Sequential(nn.Linear(8, 6)).double(), va.MiSS(rank=4), "0")
    model[0].load_state_dict({k: v for k, v in base[0].state_dict().items()}, strict=False)
    (adapter,) = va.adapters(model).values()
    nn.init.normal_(adapter.shard)
    other = peft.get_peft_model(base, peft.MissConfig(r=4, target_modules=["0"])).base_model.model[0]
    with torch.no_grad():
        other.miss_block["default"] = nn.Parameter(adapter.shard.t().clone())
    close(model(x), other(x), 1e-6)
