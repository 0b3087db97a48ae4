"""LoRA-SB against gradients, signs and an SVD of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, operate, place
from visadapt.core.calibrate import calibrate, waiting
from visadapt.core.train import before_step


def losses(model, inputs, targets):
    return ((model(x) - y).square().mean() for x, y in zip(inputs, targets))


def calibrated(host, method):
    """A host that saw two batches, and the first step of AdamW on its weight by plain operations."""
    model, adapter, x = place(host, method, moved=False)
    weight = model[0]._parameters["weight"].detach().clone().requires_grad_()
    bias = model[0]._parameters["bias"]
    inputs = [x.detach(), torch.randn_like(x)]
    targets = [torch.randn_like(model(x)).detach() for _ in inputs]
    for one, target in zip(inputs, targets):
        (operate(HOSTS[host](), one, weight, bias) - target).square().mean().backward()
    calibrate(model, losses(model, inputs, targets))
    return model, adapter, weight, inputs, targets


def cut(matrix, rank):
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("alpha", [None, 12.0])
def test_starts_at_the_first_step_of_full_tuning_cut_to_its_rank(host, alpha):
    model, adapter, weight, inputs, _ = calibrated(host, va.LoRASB(rank=3, alpha=alpha, step=1e-3))
    step = -1e-3 * weight.grad.flatten(1).sign()
    close(adapter.delta().flatten(1), cut(step, 3))
    moved = weight.detach() + cut(step, 3).view_as(weight)
    close(model(inputs[0]), operate(HOSTS[host](), inputs[0], moved, model[0]._parameters["bias"]))
    eye = torch.eye(3, dtype=torch.float64)
    close(adapter.up.t() @ adapter.up, eye)
    close(adapter.down.flatten(1) @ adapter.down.flatten(1).t(), eye)


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_dense_formula(host):
    _, adapter, _ = place(host, va.LoRASB(rank=3, alpha=6), moved=False)
    up, down = adapter.up.clone(), adapter.down.clone()

    def dense(w, b, p):
        return w + 2.0 * torch.einsum("or,rq,q...->o...", up, p["core"], down), b

    compare(host, va.LoRASB(rank=3, alpha=6), dense)


def test_the_loss_falls_at_once_and_the_gradient_is_the_projected_one():
    model, adapter, weight, inputs, targets = calibrated("linear", va.LoRASB(rank=3, step=1e-4))
    now = sum(losses(model, inputs, targets))
    with va.strength(model, 0):
        before = sum(losses(model, inputs, targets))
    assert now < before
    adapter.core.data.zero_()
    (gradient,) = torch.autograd.grad(sum(losses(model, inputs, targets)), adapter.core)
    close(gradient, adapter.up.t() @ weight.grad @ adapter.down.t())


def test_what_a_step_of_zero_starts_from_and_what_trains():
    model, adapter, *_ = calibrated("conv", va.LoRASB(rank=3, step=0))
    assert not adapter.core.any()
    assert adapter.calibrated
    assert (count(adapter), [n for n, _ in adapter.named_parameters()]) == (9, ["core"])
    assert count(place("tall", va.LoRASB(rank=64))[1]) == 16  # the rank of a (4, 9) matrix
    assert not waiting(model)


def test_without_a_gradient_it_is_the_base_and_refuses_to_train():
    model, adapter, x = place("linear", va.LoRASB(rank=2), moved=False)
    close(model(x), operate(nn.Linear(7, 10), x, model[0].weight, model[0].bias))
    with pytest.raises(ValueError, match="no gradient to start from"):
        before_step(model, 0, 10)
    calibrate(model, losses(model, [x.detach()], [torch.ones(2, 3, 10, dtype=torch.float64)]))
    before_step(model, 0, 10)
    held = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    calibrate(model, (pytest.fail("nothing waits") for _ in range(3)))
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, held[name]), name


def test_the_file_holds_what_the_gradient_gave(tmp_path):
    model, _, _, inputs, _ = calibrated("linear", va.LoRASB(rank=3, step=0.1))
    va.save(model, tmp_path / "a.safetensors")
    fresh, _, _ = place("linear", va.LoRA(), moved=False)
    va.load(va.remove(fresh), tmp_path / "a.safetensors")
    assert torch.equal(fresh(inputs[0]), model(inputs[0]))
    assert not waiting(fresh)
