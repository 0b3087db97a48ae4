"""ALLoRA: LoRA forwards, rows of B with a factor of their own backwards."""

from __future__ import annotations

import pytest
import torch

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product
from visadapt.core.train import after_backward, after_step


def dense_factor(adapter, eta):
    return 1 / (product(adapter.up, adapter.down).flatten(1).norm(dim=1) + 1 / eta**2).sqrt()


@pytest.mark.parametrize("host", HOSTS)
def test_forwards_and_for_the_input_it_is_lora(host):
    compare(host, va.ALLoRA(rank=3), lambda w, b, p: (w + product(p["up"], p["down"]), b))
    assert count(place("linear", va.ALLoRA(rank=3))[1]) == 3 * (7 + 10)


@pytest.mark.parametrize("host", HOSTS)
def test_the_gradient_of_b_is_scaled_row_by_row(host):
    model, adapter, x = place(host, va.ALLoRA(rank=3, eta=2.0))
    close(adapter.factor(), dense_factor(adapter, 2.0).detach())
    for _ in range(2):  # accumulated
        model(x).square().mean().backward()
    up, down = adapter.up.grad.clone(), adapter.down.grad.clone()
    after_backward(model)
    close(adapter.up.grad, dense_factor(adapter, 2.0)[:, None] * up)
    assert torch.equal(adapter.down.grad, down)


def test_at_the_start_the_factor_is_eta():
    _, adapter, _ = place("linear", va.ALLoRA(eta=4.0), moved=False)
    close(adapter.factor(), torch.full((10,), 4.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="eta=0"):
        place("linear", va.ALLoRA(eta=0))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_scaling_the_step_is_a_rate_for_each_row(optimizer):
    model, adapter, x = place("linear", va.ALLoRA(rank=3, eta=3.0, scales="step"))
    plain, other, _ = place("linear", va.LoRA(rank=3))
    other.load_state_dict(adapter.state_dict())
    start, c = adapter.up.detach().clone(), dense_factor(adapter, 3.0).detach()
    for net in (model, plain):
        steps = optimizer(va.parameter_groups(net, 0.1))
        net(x.detach()).square().mean().backward()
        after_backward(net)
        steps.step()
        after_step(net)
    close(adapter.up.detach(), start + c[:, None] * (other.up.detach() - start))
    close(adapter.down.detach(), other.down.detach())
    before = adapter.up.detach().clone()
    after_step(model)
    assert torch.equal(adapter.up, before), "a step is scaled once"
