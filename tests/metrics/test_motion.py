"""Trajectories: found on drawn clips of every kind; figures against float64 references and what would break them."""

import math

import numpy as np
import pytest
import torch

from visadapt.data.moving import DIRECTIONS, KINDS, MOTIONS, clip
from visadapt.metrics.motion import centres, correlation, deviation, directed, drift


def drawn(kind, count=12, size=32, frames=8):
    """Clips (B, F, 3, H, W) in 0 … 1, their true centres, and the names of their motions."""
    clips = [clip(7, index, frames, size, kind=kind) for index in range(count)]
    videos = torch.stack([torch.from_numpy(frames) for frames, _, _ in clips]).permute(0, 1, 4, 2, 3) / 255
    truth = torch.stack([torch.from_numpy(labels["centres"]) for _, _, labels in clips])
    return videos, truth, [list(MOTIONS)[labels["motion"]] for _, _, labels in clips]


@pytest.mark.parametrize("kind", KINDS)
def test_centres_on_real_clips(kind):
    videos, truth, motions = drawn(kind)
    found = centres(videos)
    assert (found.shape, found.dtype) == (truth.shape, torch.float64)
    assert correlation(found, truth).min() > 0.98
    assert correlation(found, truth).mean() > 0.995
    assert deviation(found, truth).mean() < 0.01
    if kind in ("moving", "digits"):
        wanted = torch.tensor([DIRECTIONS[motion] for motion in motions])
        assert directed(found, wanted).all()
        assert not directed(found, -wanted).any()
        assert not directed(found, wanted.flip(1)).any()


def test_centres_at_other_sizes_and_with_one_frame():
    videos, truth, _ = drawn("orbit", 4, 64)
    assert correlation(centres(videos), truth).min() > 0.99
    assert torch.allclose(centres(videos[:, :1])[:, 0], centres(videos)[:, 0])


def test_nothing_is_nothing():
    videos, _, _ = drawn("moving", 2)
    videos[0, 3] = 0.5 + 0.01 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = centres(videos)
    assert found[0, 3].isnan().all()
    assert found.isfinite().sum() == 2 * 8 * 2 - 2
    wanted = torch.tensor([[1, 0], [1, 0]])
    assert not directed(centres(torch.full((2, 4, 3, 16, 16), 0.3)), wanted).any()
    assert correlation(centres(torch.full((2, 4, 3, 16, 16), 0.3)), torch.rand(4, 2)).tolist() == [0, 0]


def test_correlation_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 7, 2))
    for i, value in enumerate(correlation(torch.tensor(a), torch.tensor(b)).tolist()):
        x, y = ((p[i] - p[i].mean(0)).ravel() for p in (a, b))
        assert value == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)), abs=1e-14)
    line = torch.tensor(b[:1])
    assert correlation(3 * line + 0.2, line).item() == pytest.approx(1)
    assert correlation(-line, line).item() == pytest.approx(-1)
    assert correlation(line * 0 + 0.4, line).item() == 0, "what stands still follows nothing"
    assert correlation(line.flip(1), line).item() < 1


def test_deviation_is_that_of_the_formula():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 3, 7, 2))
    for i, value in enumerate(deviation(torch.tensor(a), torch.tensor(b)).tolist()):
        off = (a[i] - a[i].mean(0)) - (b[i] - b[i].mean(0))
        assert value == pytest.approx(np.sqrt((off**2).sum(1)).mean(), abs=1e-14)
    assert deviation(torch.tensor(a) + 0.3, torch.tensor(a)).max() < 1e-14
    lost = torch.tensor(a)
    lost[0, 2] = torch.nan
    seen = [i for i in range(7) if i != 2]
    assert deviation(lost, torch.tensor(b))[0].item() == pytest.approx(
        deviation(lost[:1, seen], torch.tensor(b)[:1, seen])[0].item()
    )
    assert correlation(lost, torch.tensor(b))[0].item() == pytest.approx(
        correlation(lost[:1, seen], torch.tensor(b)[:1, seen])[0].item()
    )


def test_drift_is_the_slope_of_a_fitted_line():
    rng = np.random.default_rng(2)
    paths = rng.normal(size=(3, 6, 2))
    slopes = [np.polyfit(np.linspace(0, 1, 6), path, 1)[0] for path in paths]
    assert np.allclose(drift(torch.tensor(paths)), slopes, atol=1e-12)
    paths[1, 4] = np.nan
    kept = [0, 1, 2, 3, 5]
    slopes[1] = np.polyfit(np.linspace(0, 1, 6)[kept], paths[1, kept], 1)[0]
    assert np.allclose(drift(torch.tensor(paths)), slopes, atol=1e-12)


def test_directed_wants_a_way_and_no_detour():
    time = torch.linspace(0, 1, 5, dtype=torch.float64)
    right = torch.tensor([[1, 0]])

    def going(x, y):
        return torch.stack([x * time, y * time], 1)[None]

    assert directed(going(0.2, 0.0), right).item()
    assert not directed(going(0.05, 0.0), right).item(), "too short"
    assert not directed(going(0.2, 0.25), right).item(), "rather down"
    assert not directed(going(-0.2, 0.0), right).item()
    assert directed(going(0.05, 0.0), right, least=0.04).item()
