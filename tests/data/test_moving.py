"""Moving clips: what the caption says is what moves, where the labels say, at any size and number of frames."""

import numpy as np
import pytest

from visadapt.data import moving, scenes
from visadapt.data.moving import DIRECTIONS, KINDS, MOTIONS, clip, motion_of, path, without_motion, words
from visadapt.data.scenes import Spec


def centroid(frames, labels):
    """Middle (F, 2) of what differs from the first pixel, for plain backgrounds."""
    away = np.abs(frames.astype(float) - frames[0, 0, 0]).sum(-1) > 60
    places = (np.arange(frames.shape[1]) + 0.5) / frames.shape[1]
    return np.stack([(away.sum(1) * places).sum(1), (away.sum(2) * places).sum(1)], 1) / away.sum((1, 2))[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_is_a_function_of_its_arguments(kind):
    frames, said, labels = clip(3, 5, 4, 24, "train", kind)
    again = clip(3, 5, 4, 24, "train", kind)
    assert (frames.shape, frames.dtype, labels["centres"].shape) == ((4, 24, 24, 3), np.uint8, (4, 2))
    assert np.array_equal(frames, again[0])
    assert said == again[1]
    others = [clip(4, 5, 4, 24, kind=kind), clip(3, 6, 4, 24, kind=kind), clip(3, 5, 4, 24, "val", kind)]
    assert not any(np.array_equal(frames, other[0]) for other in others)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32, 64])
def test_the_shape_is_where_the_labels_say(kind, size):
    checked = 0
    for index in range(30):
        frames, _, labels = clip(1, index, 8, size, kind=kind)
        if labels["background"] >= len(scenes.COLOURS):
            continue
        found = centroid(frames, labels)
        off = found - labels["centres"]
        assert np.abs(off - off.mean(0)).max() < 0.025, "it moves as the labels do"
        assert np.abs(off.mean(0)).max() < 0.08, "triangles and hearts have their centroid off the middle"
        assert (labels["centres"] > 0.25).all()
        assert (labels["centres"] < 0.75).all()
        checked += 1
    assert checked > 10


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions(direction):
    for seed in range(20):
        line = path(direction, 8, np.random.default_rng(seed))
        moved = (line[-1] - line[0]) @ np.array(DIRECTIONS[direction])
        assert 0.75 <= moved <= 1
        assert np.ptp(line, 0).min() == 0, "and nowhere else"
        assert np.allclose(np.diff(line, 2, axis=0), 0), "at one speed"


def test_new_motions():
    rng = np.random.default_rng(0)
    orbit, zigzag, bounce = (path(kind, 61, rng) for kind in ("orbit", "zigzag", "bounce"))
    radius = np.hypot(*(orbit - 0.5).T)
    assert np.allclose(radius, radius[0])
    assert np.allclose(orbit[0], orbit[-1])
    assert orbit[15, 0] > 0.8, "clockwise: right after the top"
    assert (np.diff(zigzag[:, 0]) > 0).all()
    assert (np.diff(np.sign(np.diff(zigzag[:, 1]))) != 0).sum() == 2, "three strokes"
    heights = 1 - bounce[:, 1]
    assert np.isclose(heights[0], heights.max())
    assert np.allclose(heights[[20, 60]], 0)
    assert np.isclose(heights[40], 0.75 * heights[0])


def test_more_frames_show_the_same_path():
    few, many = clip(0, 3, 3)[2]["centres"], clip(0, 3, 9)[2]["centres"]
    assert np.allclose(few, many[[0, 4, 8]])


def test_the_background_stands_still():
    frames = clip(0, 0, 8)[0]
    assert clip(0, 0, 8)[2]["background"] >= len(scenes.COLOURS), "bricks"
    assert (frames[:, :2] == frames[:1, :2]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_captions(kind):
    exact = 0
    for index in range(40):
        _, said, labels = clip(2, index, 2, 8, kind=kind)
        assert motion_of(said) == list(MOTIONS)[labels["motion"]]
        still = without_motion(said)
        assert motion_of(still) is None
        assert set(still.split()) <= set(scenes.vocabulary())
        asked = scenes.read(said)
        assert asked == scenes.read(still)
        assert all(number in (-1, labels[name]) for name, number in asked.items())
        exact += all(labels[name] == number for name, number in asked.items())
    assert exact >= 30


def test_the_plain_caption():
    assert words(Spec("star", "red", "blue"), "left") == "a red star moving left on a blue background"
    assert words(Spec("ring", "orange", "wood"), "orbit") == "an orange ring orbiting on wood"
    assert motion_of("a red star on bricks") is None


def test_splits():
    for index in range(20):
        label = {split: clip(0, index, 2, 8, split)[2] for split in scenes.SPLITS}
        held = {
            split: next(s for s in scenes.specs(True) + scenes.specs(False) if s.labels == _three(found)).held_out
            for split, found in label.items()
        }
        assert held == {"train": False, "val": False, "test": True}
    digits = {split: [clip(0, i, 2, 8, split, "digits")[2]["digit"] for i in range(5)] for split in ("train", "test")}
    assert all(0 <= digit < 10 for both in digits.values() for digit in both)


def _three(labels):
    return {name: value for name, value in labels.items() if name not in ("motion", "centres")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "trian"}, "split: 'trian' is not one of train, val, test"),
        ({"kind": "spin"}, "kind: 'spin' is not one of moving, orbit, zigzag, bounce, digits"),
        ({"frames": 1}, "frames: 1 shows no motion"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        clip(0, 0, **options)
    with pytest.raises(ValueError, match="motion: 'jump' is not one of right"):
        moving.path("jump", 8, np.random.default_rng(0))
