"""Preconditioned gradients against the formula, and the invariance that they are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import visadapt as va
from tests.methods.reference import HOSTS, close, place
from tests.training import TinyTask, train
from visadapt.callbacks.riemannian import Riemannian
from visadapt.core.train import next_task
from visadapt.optim.riemannian import precondition


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    y = model(x)
    torch.manual_seed(3)
    (y * torch.randn_like(y)).sum().backward()


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_formula(host):
    model, adapter, x = place(host, va.LoRA(rank=3))
    backward(model, x)
    up, down = adapter.up.detach(), adapter.down.detach().flatten(1)
    eye = 0.1 * torch.eye(3, dtype=torch.float64)
    of_up = adapter.up.grad @ torch.linalg.inv(down @ down.t() + eye)
    of_down = torch.linalg.inv(up.t() @ up + eye) @ adapter.down.grad.flatten(1)
    assert precondition(model, damping=0.1) == 2
    close(adapter.up.grad, of_up)
    close(adapter.down.grad.flatten(1), of_down)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("on", [True, False])
def test_the_first_order_change_does_not_depend_on_the_split(host, on):
    def change(mix: Tensor) -> Tensor:
        model, adapter, x = place(host, va.LoRA(rank=3, alpha=6))
        with torch.no_grad():
            adapter.up.copy_(adapter.up @ mix)
            adapter.down.copy_(torch.einsum("rq,q...->r...", torch.linalg.inv(mix), adapter.down))
        backward(model, x)
        if on:
            precondition(model, damping=0.0)
        up, down = adapter.up.detach(), adapter.down.detach().flatten(1)
        return adapter.up.grad @ down + up @ adapter.down.grad.flatten(1)

    torch.manual_seed(7)
    plain, mixed = change(torch.eye(3).double()), change(torch.randn(3, 3).double() + torch.eye(3))
    error = ((plain - mixed).norm() / plain.norm()).item()
    assert error < 1e-9 if on else error > 0.1


def test_frozen_halves_count_in_the_inverse_and_have_no_gradient():
    model, adapter, x = place("linear", va.B4M(rank=4))
    backward(model, x)
    down, up = (t.detach() for t in adapter.factors())
    want = adapter.up.grad @ torch.linalg.inv(down @ down.t())
    other = torch.linalg.inv(up.t() @ up) @ adapter.down.grad
    assert precondition(model, damping=0.0) == 2
    close(adapter.up.grad, want, 1e-8)
    close(adapter.down.grad, other, 1e-8)


def test_zero_factors_and_other_methods():
    model, adapter, x = place("linear", va.LoRA(rank=3), moved=False)  # up is zero
    va.adapt(model, va.LoHa(rank=2), "0", "other")
    backward(model, x)
    others = [p.grad.clone() for p in va.adapters(model, "other")["0.adapters.other"].parameters()]
    assert precondition(model) == 2
    assert adapter.up.grad.isfinite().all()
    assert not adapter.down.grad.any()
    for p, before in zip(va.adapters(model, "other")["0.adapters.other"].parameters(), others):
        assert torch.equal(p.grad, before)
    fixed, adapter, x = place("linear", va.LoRA(rank=3, freeze_down=True))
    backward(fixed, x)
    assert precondition(fixed) == 1


def test_in_a_run_the_optimiser_sees_preconditioned_gradients(tmp_path):
    def run(*callbacks) -> dict[str, Tensor]:
        task = TinyTask(adapters=[va.Adaptation(va.LoRA(rank=2), ["attn.proj", "mlp.fc1"])])
        train(tmp_path / str(len(callbacks)), *callbacks, task=task, max_steps=3)
        return {k: v.detach().clone() for k, v in task.named_parameters() if v.requires_grad}

    with_it, without = run(Riemannian()), run()
    assert with_it.keys() == without.keys()
    assert not any(torch.equal(with_it[k], without[k]) for k in with_it if k.endswith(".down"))


def test_a_run_without_factor_pairs_is_told(tmp_path):
    task = TinyTask(adapters=[va.Adaptation(va.SSF(), ["attn.proj"])])
    with pytest.raises(ValueError, match="LoRA, B4M"):
        train(tmp_path, Riemannian(), task=task, max_steps=1)


@pytest.mark.parametrize("method", [va.OLoRA(rank=2, tasks=3), va.DyLoRA(rank=4, use=2)], ids=repr)
def test_factors_of_more_or_fewer_components_are_left_alone(method):
    model, adapter, x = place("linear", method)
    next_task(model)  # of the first; evaluation uses two components of the second
    model.eval()
    backward(model, x)
    before = adapter.up.grad.clone()
    assert precondition(model) == 0
    assert torch.equal(adapter.up.grad, before)
