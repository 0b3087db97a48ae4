"""SALT against U · Σ' · Vᵀ written out, what it can reach, and a basis that does not drift."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, salt
from visadapt.maths.svd import signed_svd


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("relu", ["diag", "full"])
@pytest.mark.parametrize("top", [0.4, 1.0, 0.0, 3])
def test_equals_the_dense_formula(host, relu, top):
    method = va.SALT(rank=2, top=top, relu=relu)
    compare(host, method, lambda w, b, p: (salt(w, p, relu), b))


@pytest.mark.parametrize("host", HOSTS)
def test_relu_keeps_singular_values_from_turning_negative(host):
    model, adapter, _ = place(host, va.SALT(top=1.0), moved=False)
    with torch.no_grad():
        adapter.scale.fill_(-1.0)
        close(adapter.new_weight(model[0].weight), torch.zeros_like(model[0].weight))


def test_parameter_count():
    n, t, d = 7, 2, 3  # 7 -> 10
    assert count(place("linear", va.SALT(rank=d, top=t))[1]) == 2 * t + 2 * (n - t) * d
    n, t = 8, 4  # a convolution 8 × (5 · 3 · 2), half of it
    assert count(place("conv", va.SALT(rank=d, top=0.5))[1]) == 2 * t + 2 * (n - t) * d
    assert count(place("linear", va.SALT(top=1.0))[1]) == 2 * 7
    assert count(place("linear", va.SALT(rank=d, top=0.0))[1]) == 2 * 7 * d


@pytest.mark.parametrize(("top", "size", "kept"), [(0.1, 4, 1), (0.1, 40, 4), (0.25, 8, 2), (5, 4, 4), (5, 8, 5)])
def test_top_fits_any_layer(top, size, kept):
    model = va.adapt(nn.Sequential(nn.Linear(size, size)), va.SALT(top=top), "0")
    assert len(next(iter(va.adapters(model).values())).scale) == kept


def test_all_singular_values_are_a_scale_and_a_shift():
    model, adapter, _ = place("linear", va.SALT(top=1.0), moved=False)
    u, sigma, vt = torch.linalg.svd(model[0].weight, full_matrices=False)
    with torch.no_grad():
        adapter.scale.fill_(1.3)
        adapter.shift.fill_(0.2)
    close(adapter.new_weight(model[0].weight), (u * (1.3 * sigma + 0.2)) @ vt)


def test_scale_alone_touches_the_top_alone():
    model, adapter, _ = place("linear", va.SALT(top=3), moved=False)
    u, sigma, vt = torch.linalg.svd(model[0].weight, full_matrices=False)
    with torch.no_grad():
        adapter.scale.fill_(1.5)
    close(adapter.delta(), 0.5 * (u[:, :3] * sigma[:3]) @ vt[:3])


def test_without_a_top_every_weight_in_the_span_is_reached():
    model, adapter, _ = place("linear", va.SALT(rank=7, top=0.0), moved=False)
    weight = model[0].weight.detach()
    u, _, vt = signed_svd(weight)
    target = u @ torch.randn(7, 7, dtype=torch.float64) @ vt
    with torch.no_grad():
        adapter.mix_left.copy_(u.t() @ (target - weight) @ vt.t())
        adapter.mix_right.copy_(torch.eye(7))
    close(adapter.new_weight(weight), target)


def test_penalty():
    model, adapter, _ = place("linear", va.SALT(rank=2, top=3, regularizer=0.5), moved=False)
    start = va.penalty(model)
    assert start.item() == 0
    start.backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    sigma = torch.linalg.svdvals(model[0].weight)[:3]
    top = (adapter.scale * sigma + adapter.shift - sigma).square().sum().sqrt()
    mix = (adapter.mix_left @ adapter.mix_right).square().sum().sqrt()
    close(va.penalty(model), 0.5 * (top + mix))
    assert va.penalty(place("linear", va.SALT(), moved=True)[0]).item() == 0


def test_signs_do_not_depend_on_lapack(monkeypatch):
    matrix = torch.randn(6, 9, dtype=torch.float64)
    want, svd = signed_svd(matrix), torch.linalg.svd
    flip = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)

    def flipped(*args, **kwargs):
        u, sigma, vt = svd(*args, **kwargs)
        return u * flip, sigma, flip[:, None] * vt

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    for a, b in zip(signed_svd(matrix), want):
        assert torch.equal(a, b)


def test_nothing_but_the_trained_tensors_is_saved():
    model, _, _ = place("linear", va.SALT())
    held = {k.rsplit(".", 1)[-1] for k in model.state_dict() if ".adapters." in k}
    assert held == {"scale", "shift", "mix_left", "mix_right"}


READ = """
import sys, torch, visadapt as va
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(7, 10), torch.nn.Conv2d(5, 8, 3))
va.load(model, sys.argv[1])
torch.save([model[0](torch.ones(1, 7)), model[1](torch.ones(1, 5, 3, 3))], sys.argv[2])
"""


@pytest.mark.slow  # another process
def test_a_file_means_the_same_in_another_process(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 10), nn.Conv2d(5, 8, 3))
    va.adapt(model, va.SALT(rank=2, top=0.4), ["0", "1"])
    for adapter in va.adapters(model).values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    va.save(model, tmp_path / "salt.safetensors")
    command = [sys.executable, "-c", READ, str(tmp_path / "salt.safetensors"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, timeout=300)
    linear, conv = torch.load(tmp_path / "out.pt")
    close(linear, model[0](torch.ones(1, 7)), 1e-5)
    close(conv, model[1](torch.ones(1, 5, 3, 3)), 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"relu": "all"}, "'diag' or 'full'"), ({"top": -0.1}, "share"), ({"top": 2.5}, "share")],
)
def test_refusals_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        va.adapt(nn.Sequential(nn.Linear(8, 8)), va.SALT(**options), "0")


def test_refuses_a_weight_that_is_not_finite():
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        va.adapt(nn.Sequential(layer), va.SALT(), "0")
