"""SoRA against the dense formula, its proximal step, and what is left of it as a LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product
from visadapt.core.check import move
from visadapt.core.train import after_step


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_dense_formula(host):
    compare(host, va.SoRA(rank=3, alpha=6), lambda w, b, p: (w + 2 * product(p["up"] * p["gate"], p["down"]), b))


def test_gates_of_one_are_lora_and_the_start_is_as_said():
    model, adapter, x = place("linear", va.SoRA(rank=4000), moved=False)
    assert not adapter.up.any()
    assert abs(adapter.gate.std() - 1) < 0.05
    model, adapter, x = place("linear", va.SoRA(rank=3))
    with torch.no_grad():
        adapter.gate.fill_(1)
    lora, other, _ = place("linear", va.LoRA(rank=3))
    other.load_state_dict({k: v for k, v in adapter.state_dict().items() if k != "gate"})
    close(model(x), lora(x))
    assert count(adapter) == 3 * (7 + 10) + 3


@pytest.mark.parametrize(
    ("released", "want"), [(False, [0.2, -0.05, 0.0, 0.0]), (True, [0.2, 0.0, 0.0, 0.0])], ids=["prox", "released"]
)
def test_the_proximal_step(released, want):
    model, adapter, _ = place("linear", va.SoRA(rank=4, threshold=0.1, released=released), moved=False)
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor([0.3, -0.15, 0.1, -0.05]))
    after_step(model)
    close(adapter.gate.detach(), torch.tensor(want, dtype=torch.float64), 1e-7)


def test_larger_thresholds_leave_fewer_components_and_a_closed_gate_may_open():
    left = []
    for threshold in (0.0, 0.05, 0.2):
        model, adapter, x = place("linear", va.SoRA(rank=8, threshold=threshold), moved=False)
        target = torch.nn.functional.linear(x, torch.randn(10, 7, dtype=torch.float64)).detach()
        optimizer = torch.optim.AdamW(va.parameter_groups(model, 0.01))
        for _ in range(20):
            optimizer.zero_grad()
            (model(x.detach()) - target).square().mean().backward()
            optimizer.step()
            after_step(model)
        left.append(int(adapter.gate.count_nonzero()))
    assert left[0] == 8 > left[1] > left[2]
    model, adapter, x = place("linear", va.SoRA(rank=3))
    with torch.no_grad():
        adapter.gate.zero_()
    model(x).sum().backward()
    assert adapter.gate.grad.all()


def test_its_components_are_the_open_ones():
    adapter = move(place("conv", va.SoRA(rank=5, alpha=2))[0])[0].adapters["default"]
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor([0.0, -0.7, 0.1, 0.0, 0.3]))
    down, up = adapter.components(None)
    assert len(down) == 3
    close(product(up, down), adapter.delta())
    down, up = adapter.components(2)
    close(down, adapter.down[[1, 4]])
    close(up, adapter.up[:, [1, 4]] * torch.tensor([-0.7, 0.3]).double() * 0.4, 1e-6)
    nn.init.zeros_(adapter.gate)
    assert adapter.components(None)[0].shape[0] == 1, "a LoRA has at least one component"
