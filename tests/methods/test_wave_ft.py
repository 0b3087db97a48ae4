"""WaveFT against PyWavelets' matrices."""

from __future__ import annotations

import pytest
import torch

import visadapt as va
from tests.methods.reference import HOSTS, analysis, close, compare, count, place


def dense_of(wavelet: str, alpha: float, places: torch.Tensor):
    def dense(w, b, p):
        out, fan_in = w.flatten(1).shape
        rows, columns = analysis(wavelet, out), analysis(wavelet, fan_in)
        grid = torch.zeros(len(rows) * len(columns), dtype=w.dtype)
        for value, where in zip(p["spectrum"], places):
            grid = grid.index_put((where[None],), value[None], accumulate=True)
        change = rows.t() @ grid.view(len(rows), len(columns)) @ columns
        return w + alpha * change[:out, :fan_in].reshape(w.shape), b

    return dense


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_equals_the_dense_formula(wavelet, host):
    method = va.WaveFT(count=11, alpha=3.0, wavelet=wavelet)
    compare(host, method, dense_of(wavelet, 3.0, place(host, method)[1].places))


def test_a_coefficient_has_the_size_of_its_wavelet():
    """T is orthonormal: ‖ΔW‖ is the norm of the coefficients where both sizes are even."""
    _, adapter, _ = place("conv", va.WaveFT(count=13, alpha=2.0))
    close(adapter.delta().norm(), 2 * adapter.spectrum.norm())


def test_parameter_count_and_what_is_saved():
    _, adapter, _ = place("linear", va.WaveFT(count=30), moved=False)
    assert count(adapter) == 30
    assert len(adapter.places.unique()) == 30
    assert set(adapter.state_dict()) == {"spectrum"}
    assert count(place("linear", va.WaveFT())[1]) == 70


def test_refusals():
    with pytest.raises(ValueError, match="count=0"):
        place("linear", va.WaveFT(count=0))
    with pytest.raises(ValueError, match="not orthonormal"):
        place("linear", va.WaveFT(wavelet="bior2.2"))
