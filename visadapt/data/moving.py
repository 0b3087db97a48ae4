"""Captioned clips for text-to-video: the shapes of `visadapt.data.scenes` in motion, and three motions to adapt to.

One shape, or a real handwritten digit, moves over a background that stands still. "a red star moving right on bricks":
right, left, up and down are the world of the shipped tiny video base. It never saw a shape orbit, zigzag or bounce.
Nothing is downloaded. A clip is a pure function of its arguments, of any size and number of frames; the combinations
and crops of each split are those of the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from visadapt.data.digit_domains import handwriting
from visadapt.data.digits import TRAIN
from visadapt.data.plane_shapes import SHAPES, Array, Pose
from visadapt.data.scenes import DIGITS, SPLITS, Spec, backdrop, caption, ground, paint, specs

Clip = tuple[Array, str, dict[str, Any]]

# The words of each motion; unit vectors (right, down) of the four directions.
MOTIONS: dict[str, str] = {
    "right": "moving right",
    "left": "moving left",
    "up": "moving up",
    "down": "moving down",
    "orbit": "orbiting",
    "zigzag": "zigzagging",
    "bounce": "bouncing",
}
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
KINDS = ("moving", "orbit", "zigzag", "bounce", "digits")
_MARGIN = 0.02  # of the side, between a shape and the border
_PAGE, _WRITTEN = 32, 10  # pixels of a digit's page, and from its middle to the farthest ink


# --- words -----------------------------------------------------------------------------
def words(spec: Spec, motion: str, rng: np.random.Generator | None = None) -> str:
    """Say what a clip shows: "a red star moving right on a blue background".

    Args:
        spec: Shape, colour and background.
        motion: A key of ``MOTIONS``.
        rng: Source of paraphrases, as `visadapt.data.scenes.caption` has them; None gives the plain form.
    """
    said = caption(spec, rng)
    named = spec.shape if spec.shape in said.split() else "shape"  # some paraphrases say no more than "a red shape"
    return said.replace(named, f"{named} {MOTIONS[motion]}", 1)


def without_motion(said: str) -> str:
    """A caption of a clip as a caption of one of its frames: "a red star on a blue background"."""
    for motion in MOTIONS.values():
        said = said.replace(f" {motion}", "", 1)
    return said


def motion_of(said: str) -> str | None:
    """The motion, a key of ``MOTIONS``, that a caption asks for; None if it asks for none."""
    return next((name for name, motion in MOTIONS.items() if f" {motion}" in said), None)


# --- paths -----------------------------------------------------------------------------
def path(motion: str, frames: int, rng: np.random.Generator) -> Array:
    """Where a shape is in each frame (F, 2): right and down, from 0 to 1 in the room that it has.

    Straight motions cross three quarters of the room or more. Orbits run once clockwise from about the top; zigzags
    cross the room to the right in three strokes; a bouncing shape falls, jumps to three quarters, and falls.

    Raises:
        ValueError: There is no such motion, or there are fewer than two frames.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion: '{motion}' is not one of {', '.join(MOTIONS)}")
    if frames < 2:
        raise ValueError(f"frames: {frames} shows no motion; at least 2 are needed")
    time = np.linspace(0, 1, frames)
    length, start, aside = rng.uniform(0.75, 1), rng.random(), rng.random()
    along = (1 - length) * start + length * time
    if motion in DIRECTIONS:
        dx, dy = DIRECTIONS[motion]
        line = along if dx + dy > 0 else 1 - along
        return np.stack([line, np.full(frames, aside)][:: 1 if dx else -1], axis=1)
    if motion == "orbit":
        angle = 2 * math.pi * time + 0.4 * (start - 0.5)
        return 0.5 + 0.5 * length * np.stack([np.sin(angle), -np.cos(angle)], axis=1)
    if motion == "zigzag":
        stroke = np.abs((3 * time + 1) % 2 - 1)  # 0, 1, 0, 1 at thirds of the clip
        return np.stack([along, 0.5 - 0.5 * length * (2 * stroke - 1)], axis=1)
    arc, phase = np.divmod(1.5 * time + 0.5, 1)
    return np.stack([np.full(frames, aside), 1 - length * 0.75**arc * 4 * phase * (1 - phase)], axis=1)


# --- clips -----------------------------------------------------------------------------
def clip(seed: int, index: int, frames: int = 8, size: int = 32, split: str = "train", kind: str = "moving") -> Clip:
    """Draw a clip.

    Args:
        seed: First coordinate of the clip's random generator.
        index: Second coordinate.
        frames: Number of frames F, at least 2; they show the same path however many there are.
        size: Side in pixels.
        split: "train" and "val" show the same combinations of shape, colour and background, "test" others.
        kind: "moving" (a shape, four directions), "orbit", "zigzag", "bounce" (a shape), or "digits" (a real
            handwritten digit, four directions).

    Returns:
        Frames (F, size, size, 3) of bytes; caption; labels: those of `visadapt.data.scenes.scene`, ``motion`` (the
        position in ``MOTIONS``) and ``centres`` (F, 2), x and y of the shape's middle as parts of the side.

    Raises:
        ValueError: There is no such split or kind, or there are fewer than two frames.
    """
    for key, value, known in (("split", split, SPLITS), ("kind", kind, KINDS)):
        if value not in known:
            raise ValueError(f"{key}: '{value}' is not one of {', '.join(known)}")
    rng = np.random.default_rng((seed, index, SPLITS.index(split), 16 + KINDS.index(kind)))
    choice = specs(held_out=split == "test")
    spec = choice[int(rng.integers(len(choice)))]
    motion = list(DIRECTIONS)[int(rng.integers(4))] if kind in ("moving", "digits") else kind
    reach, turn = rng.uniform(0.24, 0.3), rng.uniform(-0.15, 0.15)
    centres = reach + _MARGIN + (1 - 2 * (reach + _MARGIN)) * path(motion, frames, rng)
    poses = [Pose(x, y, reach, turn) for x, y in centres.tolist()]
    labels = spec.labels | {"motion": list(MOTIONS).index(motion), "centres": centres}
    page, colour = backdrop(spec.background, size, rng, split), paint(spec.colour, rng)
    if kind == "digits":
        which, digit = _chosen(rng, split)
        said = f"a handwritten {DIGITS[digit]} in {spec.colour} {MOTIONS[motion]} on {ground(spec.background)}"
        labels |= {"shape": -1, "digit": digit}
        cover = _digit(which, size)
    else:
        said = words(spec, motion, rng)
        cover = lambda pose: pose.cover(SHAPES[spec.shape], size)  # noqa: E731
    shown = np.stack([page + cover(pose) * (colour - page) for pose in poses])
    return (shown.clip(0, 255) + 0.5).astype(np.uint8), said, labels


def _chosen(rng: np.random.Generator, split: str) -> tuple[int, int]:
    """Position and class of a digit: scikit-learn's first 1,297 for training, the others else."""
    classes = handwriting()[1]
    which = int(rng.integers(TRAIN) if split == "train" else rng.integers(TRAIN, len(classes)))
    return which, int(classes[which])


def _digit(which: int, size: int) -> Callable[[Pose], Array]:
    """How much of each pixel (size, size, 1) the ink of a digit covers, by its pose."""
    from PIL import Image

    ink = Image.fromarray(handwriting()[0][which, 0].numpy())

    def cover(pose: Pose) -> Array:
        step = _WRITTEN / (pose.reach * size)  # pixels of the page for one of the picture
        left, top = (_PAGE / 2 - step * size * centre for centre in (pose.x, pose.y))
        how = (step, 0.0, left, 0.0, step, top)
        moved = ink.transform((size, size), Image.Transform.AFFINE, how, Image.Resampling.BICUBIC)
        return ((np.asarray(moved)[..., None] - 0.4) * 4 + 0.5).clip(0, 1)

    return cover
