"""Norms and ranks against dense products in float64."""

import math

import pytest
import torch
from safetensors.torch import save_file

import visadapt as va
from apps._spectra import picture, spectra, spectrum
from tests.apps.conftest import noisy

R = torch.Generator().manual_seed(1)


def rand(*shape):
    return torch.randn(*shape, generator=R, dtype=torch.float64).float()


def lora():
    a, b = rand(3, 10), rand(8, 3)
    return {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(6.0)}, 2 * b @ a


def conv():
    a, b = rand(3, 5, 3, 3), rand(8, 3, 1, 1)
    return {"lora_A.weight": a, "lora_B.weight": b}, b.flatten(1) @ a.flatten(1)


def tucker():
    mid, down, up = rand(3, 3, 2, 2), rand(3, 5, 1, 1), rand(8, 3, 1, 1)
    core = torch.einsum("pqkl,qi->pikl", mid, down.flatten(1)).flatten(1)
    return {"lora_mid.weight": mid, "lora_down.weight": down, "lora_up.weight": up}, up.flatten(1) @ core


def loha():
    a, b, c, d = rand(8, 2), rand(2, 10), rand(8, 2), rand(2, 10)
    held = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(1.0)}
    return held, (a @ b) * (c @ d) / 2


def lokr():
    left, a, b = rand(2, 2), rand(4, 3), rand(3, 5)
    held = {"lokr_w1": left, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.5)}
    return held, torch.kron(left, a @ b) / 2


@pytest.mark.parametrize("kind", [lora, conv, tucker, loha, lokr])
def test_singular_values_are_those_of_the_dense_update(tmp_path, kind):
    held, dense = kind()
    save_file({f"lora_unet_mid_block_x.{k}": v for k, v in held.items()}, tmp_path / "a.safetensors")
    (found,), silent = spectra(tmp_path / "a.safetensors")
    values = torch.linalg.svdvals(dense.double())
    values = values[values > 1e-6 * values.max()]
    share = values / values.sum()
    assert not silent
    assert found.norm == pytest.approx(float(dense.double().norm()), rel=1e-5)
    assert found.rank == len(values)
    assert found.effective == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-5)


def test_effective_rank_of_known_spectra():
    assert spectrum("a", torch.ones(5)).effective == pytest.approx(5)
    assert spectrum("a", torch.tensor([3.0, 0, 0])).effective == pytest.approx(1)
    assert spectrum("a", torch.zeros(3)).rank == 0


def test_own_files_tell_of_their_scale_and_of_methods_without_factors(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    noisy(va.adapt(model, va.LoRA(rank=2, alpha=8), ["0"]))
    va.adapt(model, va.SSF(), ["1"], name="other")
    va.save(model, tmp_path / "a.safetensors")
    (found,), silent = spectra(tmp_path / "a.safetensors")
    adapter = next(iter(va.adapters(model).values()))
    dense = 4 * (adapter.up.double() @ adapter.down.double()).detach()
    assert found.norm == pytest.approx(float(dense.norm()), rel=1e-5)
    assert silent == ["1 (other)"]
    assert math.isclose(found.rank, 2)


@pytest.mark.parametrize("layers", [3, 60])
def test_the_picture_names_few_layers_and_draws_many(layers):
    fig = picture([spectrum(f"layer {i}", torch.rand(4, generator=R)) for i in range(layers)])
    assert len(fig.axes[0].get_yticklabels()) == (layers if layers < 40 else 0)
