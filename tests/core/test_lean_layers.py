"""Lean layers: equal to torch's own, with less kept, and torch's own again where they cannot help."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import visadapt as va
from benchmarks import _counts
from visadapt.core import lean_layers
from visadapt.core.lean import recipe
from visadapt.core.lean_layers import GatedGELU, LeanConv2d, lean


class Block(nn.Module):
    """Norm, SiLU, convolution twice, then a gated GELU over positions, as a UNet has them."""

    def __init__(self, **conv):
        super().__init__()
        self.norm1, self.norm2, self.act = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8), nn.SiLU()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1, **conv), nn.Conv2d(8, 6, 3, padding=1, stride=2)
        self.ff, self.last = GatedGELU(nn.Linear(6, 32)), nn.Linear(16, 6)

    def forward(self, x):
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.act(self.norm2(h + x)))
        return self.last(self.ff(h.flatten(2).transpose(1, 2)))


class Stock(nn.Module):
    """GatedGELU in torch's own operations."""

    def __init__(self, proj):
        super().__init__()
        self.proj = proj

    def forward(self, x):
        h, gate = self.proj(x).chunk(2, -1)
        return h * nn.functional.gelu(gate)


def pair(dtype=torch.float64, trained=False, **conv):
    """The block with torch's layers, and lean."""
    torch.manual_seed(0)
    mine = Block(**conv).to(dtype).requires_grad_(trained)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    stock = copy.deepcopy(mine)
    stock.ff = Stock(stock.ff.proj)
    return stock, lean(mine)


def run(model, x):
    """Output and all gradients."""
    x = x.detach().requires_grad_(True)
    y = model(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(weight.to(y.dtype))
    named = {name.replace("parametrizations", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return y.detach(), x.grad, named


def assert_equal(stock, mine, x, tolerance=1e-12):
    (y, gx, grads), (y2, gx2, grads2) = run(stock, x), run(mine, x)
    assert torch.equal(y, y2), "the same operations in forward"
    torch.testing.assert_close(gx2, gx, rtol=tolerance, atol=tolerance)
    assert grads.keys() == grads2.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grads2[name], grad, rtol=tolerance, atol=tolerance, msg=name)


def saved(model, x):
    return _counts.saved_bytes(lambda: model(x), model).kept


X = torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("conv", [{}, {"padding_mode": "reflect"}, {"groups": 2}, {"bias": False}])
def test_frozen_and_trained(conv):
    stock, mine = pair(**conv)
    assert_equal(stock, mine, X)
    assert saved(mine, X.clone().requires_grad_()) < 0.6 * saved(stock, X.clone().requires_grad_())
    assert_equal(*pair(trained=True, **conv), X)


@pytest.mark.parametrize("method", [va.LoRA(rank=2), va.DoRA(rank=2), va.FLoRA(rank=2), va.LoHa(rank=2), va.SSF()])
@pytest.mark.parametrize("lean_inputs", [True, False])
def test_adapters_on_every_layer(method, lean_inputs):
    models = pair()
    for model in models:
        torch.manual_seed(2)
        va.adapt(model, method, ["conv1", "conv2", "ff.proj", "last"], lean=lean_inputs and model is models[1])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.1)
    assert_equal(*models, X, 1e-10)


def test_an_adapted_layer_keeps_no_input_that_can_be_made_again():
    models = pair()
    for model in models:
        va.adapt(model, va.LoRA(rank=1), ["conv1", "conv2", "last"], lean=model is models[1])
    x = X.clone().requires_grad_()
    both, input_bytes = [saved(model, x) for model in models], X.numel() * 8
    assert both[0] - both[1] > 4 * input_bytes, "two SiLUs, two convolutions' inputs and a gelu"


@pytest.mark.parametrize("layer", [nn.LayerNorm(8), nn.GroupNorm(5, 5)], ids=["layer", "group"])
def test_norms_are_made_again_bit_for_bit(layer):
    for parameter in layer.requires_grad_(False).parameters():
        nn.init.normal_(parameter)
    y = lean(layer)(torch.randn(3, 5, 8, 8).requires_grad_())
    made = recipe(y, y.dtype)
    assert torch.equal(made.run(made.sources), y)


def test_backward_lets_go_of_what_it_used():
    _, mine = pair()
    va.adapt(mine, va.LoRA(rank=1), ["conv2"], lean=True)
    y = mine(X.clone().requires_grad_())
    nodes, open_ = [], [y.grad_fn]
    while open_:
        node = open_.pop()
        nodes.append(node)
        open_ += [parent for parent, _ in node.next_functions if parent is not None]
    recipes = [made for node in nodes for made in (getattr(node, "made", None), getattr(node, "make", None)) if made]
    assert len(recipes) == 3
    assert all(made.sources == () for made in recipes), "held by autograd alone, or backward cannot free it"


def test_autocast_channels_last_and_precisions():
    x = X.float().to(memory_format=torch.channels_last)
    for adapted in (False, True):
        stock, mine = (m.to(memory_format=torch.channels_last) for m in pair(torch.float32))
        if adapted:
            for model in (stock, mine):
                torch.manual_seed(3)
                va.adapt(model, va.LoRA(rank=2), ["conv1", "last"], lean=model is mine)
        with torch.autocast("cpu", torch.bfloat16):
            (y, gx, _), (y2, gx2, _) = run(stock, x), run(mine, x)
        assert y2.dtype == y.dtype == torch.bfloat16
        assert torch.equal(y, y2)
        torch.testing.assert_close(gx2, gx, rtol=2e-2, atol=2e-2)
    stock, mine = pair(torch.bfloat16)
    (y, gx, _), (y2, gx2, _) = run(stock, X.bfloat16()), run(mine, X.bfloat16())
    assert torch.equal(y, y2)
    assert torch.equal(gx, gx2)
    with pytest.raises(RuntimeError, match="type"):
        mine(X.float().requires_grad_())  # as torch: no silent cast


def test_stands_aside(monkeypatch):
    stock, mine = pair()
    x = X.clone().requires_grad_()

    def fail(*_):
        raise AssertionError("a Function of ours ran")

    for name in ("_FrozenConv", "_SiLU", "_GatedGELU"):
        monkeypatch.setattr(getattr(lean_layers, name), "apply", fail)
    with pytest.raises(AssertionError):
        mine(x)
    with torch.no_grad():
        assert torch.equal(mine(x), stock(x))
    assert torch.equal(mine(X), stock(X)), "nothing to differentiate"
    loss = checkpoint(mine, x, use_reentrant=False).square().sum()
    loss.backward()
    expected = run_loss(stock)
    torch.testing.assert_close(x.grad, expected)


def run_loss(model):
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    return x.grad


def test_names_copies_pickles_and_pruning():
    stock, mine = pair()
    assert list(mine.state_dict()) == list(stock.state_dict())
    assert isinstance(mine.conv1, nn.Conv2d)
    assert_equal(stock, copy.deepcopy(mine), X)
    assert_equal(stock, pickle.loads(pickle.dumps(mine)), X)
    va.adapt(mine, va.LoRA(rank=1), ["conv1"])
    va.remove(mine)
    assert type(mine.conv1) is LeanConv2d
    unbatched = X[0].clone().requires_grad_()
    assert torch.equal(mine.conv1(unbatched), stock.conv1(unbatched))
