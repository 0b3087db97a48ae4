"""The literal forms against formulas written once more: they are references, so they must be right."""

import numpy as np
import pytest
import pywt
import torch
from torch import nn

from benchmarks import literal


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(16, 24).double()


@pytest.fixture
def conv():
    torch.manual_seed(0)
    return nn.Conv2d(8, 12, 3, padding=2, dilation=2).double()


def update(form, layer, x):
    return form(x) - layer(x)


def test_flora_is_the_tucker_product(conv):
    form, x = literal.FLoRA(conv, rank=3), torch.randn(2, 8, 7, 7).double()
    dense = torch.einsum("abcd,oa,ib,hc,wd->oihw", form.core, form.up, form.inner, *form.axes)
    assert torch.allclose(update(form, conv, x), conv._conv_forward(x, dense, None))


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym5"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_wara_is_the_inverse_transform_of_pywavelets(linear, wavelet, levels):
    form = literal.WaRA(linear, rank=2, wavelet=wavelet, levels=levels)
    coefficients: list = []
    for level in range(levels, 0, -1):
        band = {name: block.detach().numpy() for name, block in form.blocks(level).items()}
        if level == levels:
            coefficients.append(band["LL"])
        coefficients.append((band["HL"], band["LH"], band["HH"]))  # pywt: high along rows first
    dense = pywt.waverec2(coefficients, wavelet, mode="periodization")
    ours = update(form, linear, torch.eye(16).double()).t().detach().numpy()
    assert np.abs(ours - dense).max() < 1e-12


def test_wara_on_a_convolution_leaves_the_kernel_axes_alone(conv):
    form = literal.WaRA(conv, rank=2)
    blocks = {name: block.detach().numpy() for name, block in form.blocks(1).items()}
    dense = np.stack(
        [
            pywt.idwt2((b["LL"], (b["HL"], b["LH"], b["HH"])), "haar")
            for h in range(3)
            for w in range(3)
            for b in [{name: block[:, :, h, w] for name, block in blocks.items()}]
        ],
        -1,
    ).reshape(12, 8, 3, 3)
    x = torch.randn(2, 8, 7, 7).double()
    assert torch.allclose(update(form, conv, x), conv._conv_forward(x, torch.from_numpy(dense), None))


def test_wara_refuses_sizes_that_it_cannot_halve(linear):
    with pytest.raises(ValueError, match="16 must divide"):
        literal.WaRA(linear, levels=4)


def test_salt_starts_from_the_weight_and_scales_the_top(linear):
    form, x = literal.SALT(linear, top=12, rank=2), torch.randn(5, 16).double()
    with torch.no_grad():
        form.y.zero_()
        assert torch.allclose(form(x), linear(x))
        form.alpha.mul_(2)
    u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    assert torch.allclose(update(form, linear, x), x @ ((u[:, :12] * s[:12]) @ vh[:12]).t())


def test_hydra_is_two_branches_and_one_of_them_sees_the_bias(linear):
    form, x = literal.Hydra(linear, rank=2), torch.randn(5, 16).double()
    f = x @ linear.weight.t() + linear.bias
    p = (x @ form.parallel_down.t() + form.parallel_down_bias) @ form.parallel_up.t() + form.parallel_up_bias
    s = (f @ form.sequential_down.t() + form.sequential_down_bias) @ form.sequential_up.t()
    assert torch.allclose(form(x), f + p + s + form.sequential_up_bias)


def test_ssf_scales_channels(conv):
    form, x = literal.SSF(conv), torch.randn(2, 8, 7, 7).double()
    assert torch.allclose(form(x)[:, 3], conv(x)[:, 3] * form.gamma[3] + form.beta[3])


@pytest.mark.parametrize("name", sorted(literal.FORMS))
def test_every_tensor_gets_a_gradient(conv, name):
    form = literal.FORMS[name](conv.requires_grad_(False), **({"top": 4} if name == "SALT" else {}))
    form(torch.randn(2, 8, 7, 7).double()).square().sum().backward()
    trained = [p for p in form.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
