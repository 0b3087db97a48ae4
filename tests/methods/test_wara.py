"""WaRA: the fold against pywt's inverse transforms, and what each reading collapses to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pywt
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, analysis, close, compare, count, place, product, synthesis2, wara
from visadapt.maths.wavelet import HIGH, LOW, synthesis_taps, synthesise


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("wavelet", "levels"), [("haar", 1), ("haar", 3), ("db2", 1), ("sym4", 2), ("db5", 1)])
def test_equals_the_dense_formula(host, wavelet, levels):
    # Sizes 7, 9 and 5 are odd, and db5 (10 taps) is longer than the signals.
    method = va.WaRA(rank=2, alpha=3, wavelet=wavelet, levels=levels)
    compare(host, method, lambda w, b, p: (w + 1.5 * wara(p, w.shape, 2, wavelet, levels), b))


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "coif1", "sym5"])
def test_taps_are_the_transpose_of_pywt_analysis(wavelet):
    n = 12
    taps, offsets = synthesis_taps(wavelet)
    t = analysis(wavelet, n)
    close(t @ t.t(), torch.eye(n, dtype=torch.float64))
    coefficients = torch.eye(n // 2, dtype=torch.float64)[..., None]
    for band, rows in ((LOW, t[: n // 2]), (HIGH, t[n // 2 :])):
        close(synthesise(coefficients, taps[:, :, band : band + 1], offsets, n)[..., 0], rows)


@pytest.mark.parametrize("levels", [1, 2])
def test_equals_pywt_inverse_2d(levels):
    torch.manual_seed(0)
    model = va.adapt(nn.Sequential(nn.Linear(12, 16)).double(), va.WaRA(rank=2, wavelet="db2", levels=levels), "0")
    (adapter,) = va.adapters(model).values()
    coefficients = []
    for down, up in zip(adapter.down, adapter.up):
        nn.init.normal_(up)
        bands = [(up[:, i : i + 2] @ down[i : i + 2]).detach().numpy() for i in range(0, len(down), 2)]
        lh, hl, hh = bands[-3:]
        coefficients.append((hl, lh, hh))  # pywt: horizontal = high along rows, then vertical, diagonal
        if len(bands) == 4:
            coefficients.append(bands[0])
    image = pywt.waverec2(coefficients[::-1], "db2", mode="periodization")
    assert np.allclose(adapter.delta().detach().numpy(), image, atol=1e-10)


@pytest.mark.parametrize("host", ["linear", "conv"])
@pytest.mark.parametrize("mode", ["full", "shared", "activation"])
def test_other_readings_equal_their_formulas(host, mode):
    def dense(w, b, p):
        down, up, (out, in_) = p["down.0"], p["up.0"], w.shape[:2]
        block = product(up, down)
        if mode == "full":
            return w + synthesis2(block, "db2", out, in_), b
        zero = torch.zeros_like(block)
        rows = [[block, block], [block, block]] if mode == "shared" else [[block, zero], [zero, block]]
        return w + synthesis2(torch.cat([torch.cat(r, 1) for r in rows], 0), "db2", out, in_), b

    compare(host, va.WaRA(rank=2, mode=mode, wavelet="db2"), dense)


@pytest.mark.parametrize(("out", "in_", "kernel"), [(10, 7, ()), (8, 5, (3, 2))])
def test_parameter_count(out, in_, kernel):
    taps, half = math.prod(kernel), lambda n: (n + 1) // 2
    host = "conv" if kernel else "linear"
    four = 4 * 3 * (half(out) + half(in_) * taps)
    assert count(place(host, va.WaRA(rank=3))[1]) == four
    outer = 3 * 3 * (half(out) + half(in_) * taps)
    inner = 4 * 3 * (half(half(out)) + half(half(in_)) * taps)
    assert count(place(host, va.WaRA(rank=3, levels=2))[1]) == outer + inner
    assert count(place(host, va.WaRA(rank=3, mode="full"))[1]) == 2 * four / 4
    assert count(place(host, va.WaRA(rank=3, mode="shared"))[1]) == four / 4
    assert count(place(host, va.WaRA(rank=3, mode="activation"))[1]) == four / 4


def update(mode: str, rank: int = 2, **options) -> tuple[va.Adapter, torch.Tensor]:
    torch.manual_seed(0)
    model = va.adapt(nn.Sequential(nn.Linear(32, 24)).double(), va.WaRA(rank=rank, mode=mode, **options), "0")
    (adapter,) = va.adapters(model).values()
    for up in adapter.up:
        nn.init.normal_(up)
    return adapter, adapter.delta().detach()


def test_subbands_do_not_collapse():
    adapter, delta = update("subband")
    assert torch.linalg.matrix_rank(delta) == 4 * 2
    assert delta[1::2].abs().max() > 0.1
    assert delta[:, 1::2].abs().max() > 0.1
    down, up = adapter.factors()
    close(delta, up @ down)
    assert down.shape == (8, 32)
    # the low-low band alone repeats rows and columns
    with torch.no_grad():
        adapter.up[0][:, 2:] = 0
    low = adapter.delta()
    close(low[::2], low[1::2])
    close(low[:, ::2], low[:, 1::2])


def test_what_the_other_readings_collapse_to():
    adapter, delta = update("shared")
    assert not delta[1::2].abs().max() > 1e-12
    assert not delta[:, 1::2].abs().max() > 1e-12
    close(delta[::2, ::2], 2 * (adapter.up[0] @ adapter.down[0]))
    adapter, delta = update("activation")
    close(delta, torch.kron(adapter.up[0] @ adapter.down[0], torch.eye(2, dtype=torch.float64)))
    assert torch.linalg.matrix_rank(update("activation", wavelet="db2")[1]) == 2 * 2
    adapter, delta = update("full")
    assert torch.linalg.matrix_rank(delta) == 2
    close(delta.norm(), (adapter.up[0] @ adapter.down[0]).norm())


def test_levels_multiply_the_rank():
    assert torch.linalg.matrix_rank(update("subband", rank=1, levels=3)[1]) == 3 * 3 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wavelet": "bior2.2"}, "not orthonormal"),
        ({"wavelet": "dmey"}, "not orthonormal"),
        ({"wavelet": "harr"}, "no wavelet 'harr'"),
        ({"mode": "token_grid"}, "LoRA exactly"),
        ({"mode": "tokens"}, "use one of subband"),
        ({"levels": 0}, "at least 1"),
        ({"levels": 2, "mode": "full"}, "only with mode='subband'"),
    ],
)
def test_refusals_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        va.adapt(nn.Sequential(nn.Linear(8, 8)), va.WaRA(**options), "0")
