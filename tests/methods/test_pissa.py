"""PiSSA against the authors' residual form."""

from __future__ import annotations

import pytest
import torch

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_equals_the_residual_form(scale, host):
    def dense(w, b, p):
        u, sigma, vt = torch.linalg.svd(w.detach().flatten(1), full_matrices=False)
        residual = (u[:, 3:] * sigma[3:]) @ vt[3:]
        return residual.view_as(w) + scale * product(p["up"], p["down"]), b

    compare(host, va.PiSSA(rank=3, alpha=3 * scale), dense)


@pytest.mark.parametrize("host", HOSTS)
def test_start(host):
    model, adapter, _ = place(host, va.PiSSA(rank=3, alpha=6), moved=False)
    sigma = torch.linalg.svdvals(model[0].weight.detach().flatten(1))
    close(torch.linalg.svdvals(product(adapter.up, adapter.down).flatten(1).detach())[:3], sigma[:3] / 2)
    close(adapter.up.norm(dim=0), adapter.down.flatten(1).norm(dim=1))  # √Σ on either side
    close(adapter.delta(), torch.zeros_like(model[0].weight))


def test_parameter_count():
    assert count(place("linear", va.PiSSA(rank=3))[1]) == 3 * (7 + 10)
    assert count(place("tall", va.PiSSA(rank=64))[1]) == 4 * (9 + 4)


def test_the_exported_factors_are_the_update(tmp_path):
    model, adapter, x = place("linear", va.PiSSA(rank=2))
    down, up = adapter.factors()
    assert len(down) == 4
    path = va.save(model, tmp_path / "a.safetensors")
    again = va.load(va.remove(place("linear", va.LoRA())[0]), path)
    close(again(x), model(x))
    close(up @ down, adapter.delta())


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="alpha=0"):
        place("linear", va.PiSSA(alpha=0.0))
