"""Gradients of frozen weights: whose they are, on which rows, and that nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from visadapt.core.calibrate import calibrate


class Keeps(va.LoRA):
    """A LoRA that writes down the gradient that it is shown."""

    awaits_gradient = True
    seen = None

    def calibrate(self, gradient):
        self.seen, self.awaits_gradient = gradient, False


class Net(nn.Module):
    """A Linear with a set on some rows, a transposed convolution, a weight that is read, and a trained head."""

    def __init__(self):
        super().__init__()
        self.first, self.up = nn.Linear(4, 6), nn.ConvTranspose1d(6, 3, 2, stride=2)
        self.read, self.head = nn.Linear(4, 4), nn.Linear(3, 1)

    def forward(self, x):
        y = self.up(self.first(nn.functional.linear(x, self.read.weight)).transpose(-1, -2))
        return self.head(y.transpose(-1, -2))


def adapted():
    torch.manual_seed(0)
    model = Net().double()
    va.adapt(model, Keeps(rank=2), ["first:1/2", "up", "read.weight"])
    model.head.requires_grad_(True)
    return model, [torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3)]


def test_each_sees_the_gradient_of_its_own_rows_in_canonical_layout():
    model, batches = adapted()
    plain = Net().double()
    plain.load_state_dict(va.remove(adapted()[0]).state_dict())
    for x in batches:
        plain(x).square().mean().backward()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    calibrate(model, (model(x).square().mean() for x in batches))
    read, first, up = (
        next(a for path, a in va.adapters(model).items() if path.startswith(n)) for n in ("read", "first", "up")
    )
    torch.testing.assert_close(first.seen, plain.first.weight.grad[3:])
    torch.testing.assert_close(up.seen, plain.up.weight.grad.transpose(0, 1))
    torch.testing.assert_close(read.seen, plain.read.weight.grad)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert model.head.weight.grad.eq(1).all(), "gradients that were there are left alone"


def test_one_gradient_of_the_weights_is_alive_at_a_time():
    torch.manual_seed(0)
    model = va.adapt(nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)]), Keeps(rank=1), "all")
    alive = []
    for layer in model:
        layer.register_full_backward_hook(lambda *_: alive.append(sum(m.weight.grad is not None for m in model)))
    calibrate(model, (model(torch.randn(2, 4, requires_grad=True)).square().sum() for _ in range(2)))
    assert len(alive) == 10
    assert max(alive) <= 1


def test_what_cannot_be():
    model, batches = adapted()
    with pytest.raises(ValueError, match="generator that computes"):
        calibrate(model, [model(batches[0]).detach().sum()])
    with pytest.raises(ValueError, match=r"gradient of 'read' is zero everywhere|gradient of 'first' is zero"):
        calibrate(model, (0.0 * model(x).sum() for x in batches))
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, (model(x / 0).sum() for x in batches))
    assert not model.first.weight.requires_grad
    assert model.head.weight.requires_grad
    calibrate(va.remove(model), (pytest.fail("nobody waits") for _ in range(3)))
