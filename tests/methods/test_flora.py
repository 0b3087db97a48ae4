"""FLoRA against the Tucker product, the three-step form against two factors, and its start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, flora, place
from visadapt.core.site import Site


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_dense_formula(host):
    # rank 6 is cut to the 5 or 4 channels of two hosts, kernel_rank 2 is below 3: all modes differ
    compare(host, va.FLoRA(rank=6, scale=0.7), lambda w, b, p: (w + flora(p, 0.7), b))


def test_parameter_count():
    assert count(place("linear", va.FLoRA(rank=3))[1]) == 3 * 3 + 3 * (7 + 10)
    # Π r_i + Σ dim_i · r_i with ranks (4 outputs, 4 inputs, 2, 2)
    assert count(place("conv", va.FLoRA(rank=4))[1]) == 4 * 4 * 2 * 2 + 8 * 4 + 5 * 4 + 3 * 2 + 2 * 2


LAYERS = {
    "plain": (nn.Conv2d(12, 9, 3, padding=1), (2, 12, 6, 5), None),
    "stride": (nn.Conv2d(12, 9, 3, stride=2, padding=1), (2, 12, 7, 6), None),
    "dilated": (nn.Conv2d(12, 9, (3, 2), dilation=2, padding="same"), (2, 12, 7, 6), None),
    "reflect": (nn.Conv2d(12, 9, 3, padding=1, padding_mode="reflect"), (2, 12, 6, 5), None),
    "circular": (nn.Conv1d(12, 9, 5, padding=2, padding_mode="circular"), (2, 12, 8), None),
    "unbatched": (nn.Conv2d(12, 9, 3), (12, 6, 5), None),
    "3d": (nn.Conv3d(12, 9, (3, 1, 2)), (1, 12, 4, 3, 3), None),
    "transposed": (nn.ConvTranspose2d(12, 9, 3, stride=2, padding=1), (2, 12, 4, 3), None),
    "transposed, output size": (nn.ConvTranspose2d(12, 9, 3, stride=2, padding=1), (2, 12, 4, 3), [8, 6]),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_three_steps_equal_two_factors(kind):
    layer, shape, size = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.ModuleList([layer]).double()
    va.adapt(model, va.FLoRA(rank=2), "0")
    (adapter,) = va.adapters(model).values()
    nn.init.normal_(adapter.core)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    layer.bias.requires_grad_()
    assert adapter.chain() is not None, "this test needs a layer where three steps are cheaper"
    args = () if size is None else (size,)
    site = Site(layer, output_size=size)
    inputs = [x, layer.bias, *adapter.parameters()]
    try:
        with va.strength(model, 0.0):
            base = layer(x, *args)
        with va.strength(model, 0.7):
            fused = layer(x, *args)  # one operation with gradients of its own
        single, two = adapter.side(x, site), site.low_rank(x, *adapter.factors())
        probe = torch.randn_like(base)
        want = [base + 0.7 * two, *torch.autograd.grad(base + 0.7 * two, inputs, probe, retain_graph=True)]
        for found in (fused, base + 0.7 * single):
            for a, b in zip([found, *torch.autograd.grad(found, inputs, probe, retain_graph=True)], want):
                close(a, b)
    finally:
        va.remove(model)
        layer.bias.requires_grad_(False)


def test_three_steps_on_some_rows_and_under_autocast():
    torch.manual_seed(0)
    model = va.adapt(nn.Sequential(nn.Conv2d(12, 10, 3, padding=1)), va.FLoRA(rank=2), "0:1/2")
    (adapter,) = va.adapters(model).values()
    nn.init.normal_(adapter.core)
    x = torch.randn(2, 12, 6, 5)
    plain = model[0]._base.forward(model[0], x)
    assert adapter.chain() is not None
    assert torch.equal(model(x)[:, :5], plain[:, :5])
    with va.merged(model):
        want = model(x)
    close(model(x), want, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert (y.float() - want).abs().max() < 0.03 * want.abs().max()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in adapter.parameters())


def test_three_steps_only_where_they_are_cheaper():
    def steps(layer: nn.Module) -> int:
        model = va.adapt(nn.Sequential(layer), va.FLoRA(rank=8), "0")
        return 2 if next(iter(va.adapters(model).values())).fusable else 3

    assert steps(nn.Conv2d(320, 320, 3, padding=1)) == 3
    assert steps(nn.Conv2d(320, 320, 1)) == 2
    assert steps(nn.Linear(320, 320)) == 2
    assert steps(nn.Conv2d(3, 64, 16, stride=16)) == 2, "patch embedding: a 1×1 on all pixels costs more"
    assert steps(nn.Conv2d(64, 64, 7, groups=64)) == 2


def test_identity_core_is_lora():
    model, adapter, x = place("linear", va.FLoRA(rank=3, scale=1.0))
    with torch.no_grad():
        adapter.core.copy_(torch.eye(3))
    close(model(x) - model[0]._base.forward(model[0], x), x @ adapter.inner @ adapter.up.t())


def test_pointwise_convolution_equals_linear():
    torch.manual_seed(0)
    linear, conv = nn.Linear(6, 9).double(), nn.Conv2d(6, 9, 1).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight[..., None, None])
        conv.bias.copy_(linear.bias)
    models = [va.adapt(nn.Sequential(layer), va.FLoRA(rank=2), "0") for layer in (linear, conv)]
    flat, spatial = (next(iter(va.adapters(m).values())) for m in models)
    with torch.no_grad():
        nn.init.normal_(flat.core)
        spatial.core.copy_(flat.core[..., None, None])
        spatial.up.copy_(flat.up)
        spatial.inner.copy_(flat.inner)
        for axis in spatial.axes:
            axis.fill_(1.0)
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    close(models[1](x), models[0](x.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("host", ["linear", "conv"])
def test_the_core_moves_first_then_everything(host):
    model, adapter, x = place(host, va.FLoRA(rank=2), moved=False)
    start = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        moved = {n for n, p in adapter.named_parameters() if not torch.equal(p, start[n])}
        assert moved == ({"core"} if step == 0 else set(start))


def test_spread_of_the_factors():
    torch.manual_seed(0)
    model = va.adapt(nn.Sequential(nn.Linear(500, 400)), va.FLoRA(rank=8), "0")
    (adapter,) = va.adapters(model).values()
    assert adapter.inner.std().item() == pytest.approx((1 / 16) ** 0.5, rel=0.05)
    assert adapter.up.std().item() == pytest.approx((1 / 16) ** 0.5, rel=0.05)
    assert not adapter.core.any()
