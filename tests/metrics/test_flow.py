"""Motion fidelity by optical flow: paths follow what moves, and same motions are alike whatever moves."""

import numpy as np
import pytest
import torch

from tests.metrics.test_motion import drawn
from visadapt.data.moving import clip
from visadapt.metrics.flow import fidelity, tracks


@pytest.mark.slow
def test_same_motions_are_alike_and_others_are_not():
    paths, names = [], []
    for kind in ("orbit", "zigzag", "bounce"):
        videos, _, motions = drawn(kind, 3)
        paths += [tracks(video, side=64) for video in videos]
        names += motions
    alike = np.array([[fidelity(a, b) for b in paths] for a in paths])
    same = np.array([[a == b for b in names] for a in names])
    assert np.allclose(np.diag(alike), 1)
    assert alike[same].min() > 0.6
    assert alike[~same].max() < 0.5


def test_paths_follow_what_moves():
    frames, said, labels = clip(0, 0, 8, 32)
    assert said.endswith("on bricks"), "a plain ground has no flow of its own"
    video, truth = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255, torch.from_numpy(labels["centres"])
    paths = tracks(video, grid=8, side=48)
    assert paths.shape == (64, 8, 2)
    middle = paths[:, 4]
    inside = (middle - truth[4]).norm(dim=1).argmin()
    assert (paths[inside].diff(dim=0).mean(0) - truth.diff(dim=0).mean(0)).norm() < 0.02
    corner = middle.norm(dim=1).argmin()
    assert paths[corner].diff(dim=0).abs().max() < 0.01, "the background stands still"


def panned(photo, ways, side=128):
    """A square cut out of a photograph that goes by these many pixels, x and y, in each step."""
    corners = np.cumsum([(np.array(photo.shape[1::-1]) - side) // 2, *ways], axis=0)
    frames = np.stack([photo[y : y + side, x : x + side] for x, y in corners])
    return torch.from_numpy(frames).permute(0, 3, 1, 2) / 255


def test_the_way_of_a_camera_over_photographs_is_found():
    data = pytest.importorskip("skimage.data")  # the pictures are in its wheel
    ways = np.array([(6, 0), (6, 0), (4, 4), (0, 6), (-3, 5)])
    found = {name: tracks(panned(getattr(data, name)(), ways), side=64) for name in ("astronaut", "coffee", "chelsea")}
    truth = torch.from_numpy(-ways / 128)  # what is seen goes the other way
    for name, paths in found.items():
        inside = paths[((paths > 0.05) & (paths < 0.95)).all(2).all(1)]
        assert len(inside) > 20
        error = (inside.diff(dim=1) - truth).norm(dim=2)
        assert error.mean() < 0.01 < truth.norm(dim=1).min() / 4, name
    assert fidelity(found["astronaut"], found["chelsea"]) > 0.95, "the same way over another photograph"
    assert fidelity(found["astronaut"], found["coffee"]) > 0.9
    other = tracks(panned(data.chelsea(), -ways), side=64)
    assert fidelity(found["astronaut"], other) < 0


def test_a_wide_clip_has_fewer_rows_of_points():
    video = torch.rand(2, 3, 24, 48, generator=torch.Generator().manual_seed(0))
    assert tracks(video, grid=8, side=48).shape == (32, 2, 2)
    with pytest.raises(ValueError, match="1 frame"):
        tracks(video[:1])


def test_fidelity_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 6, 2)).cumsum(1), rng.normal(size=(5, 6, 2)).cumsum(1)
    va, vb = (np.diff(p, axis=1) for p in (a, b))
    va, vb = (v / np.linalg.norm(v, axis=2, keepdims=True) for v in (va, vb))
    r = np.array([[np.mean([x @ y for x, y in zip(p, q)]) for q in vb] for p in va])
    wanted = (r.max(1).mean() + r.max(0).mean()) / 2
    assert fidelity(torch.tensor(a), torch.tensor(b)) == pytest.approx(wanted, abs=1e-12)


def test_what_stands_still_does_not_count():
    rng = np.random.default_rng(1)
    moving = torch.tensor(rng.normal(size=(3, 6, 2)).cumsum(1))
    still = torch.zeros(7, 6, 2) + 0.5
    assert fidelity(torch.cat([moving, still]), moving) == pytest.approx(1)
    assert fidelity(still, moving) == 0
    rests = moving.clone()
    rests[:, 3] = rests[:, 2]
    assert fidelity(rests, rests) == pytest.approx(1)
    assert fidelity(-moving, moving) < 0.5
    with pytest.raises(ValueError, match="5 and of 6 frames"):
        fidelity(moving[:, :5], moving)
