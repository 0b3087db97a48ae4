"""Captioned scenes for text-to-image: a shape, its colour and a background, and three sets to adapt to.

8 shapes × 8 colours × 10 backgrounds (7 other plain colours, 3 textures cropped from scikit-image's own photographs),
one shape per picture, with captions of a closed vocabulary. The shipped tiny Stable Diffusion was pre-trained on
`scene`; it never saw `subject` (a small figure of fixed parts, "sks"), `style` (scenes as hatched sepia prints) or
`digit` (real handwriting in colour). Nothing is downloaded. A picture is a pure function of its arguments.

One combination in ten is never drawn in the split "train", and the crops of "val" and "test" come from parts of the
photographs that "train" does not touch, so that following a prompt can be told from remembering a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from visadapt.data.digit_domains import handwriting
from visadapt.data.digits import TRAIN
from visadapt.data.plane_shapes import SHAPES, Array, Pose

Picture = tuple[Array, str, dict[str, int]]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (255, 146, 20),
    "yellow": (250, 226, 60),
    "green": (44, 150, 60),
    "blue": (36, 84, 214),
    "purple": (130, 50, 170),
    "black": (18, 18, 22),
    "white": (246, 246, 246),
}
# Photograph, region of training crops and of held-out crops (left, top, right, bottom), least and greatest side.
_TEXTURES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, int]]] = {
    "bricks": ("brick", (0, 0, 352, 512), (352, 0, 512, 512), (90, 130)),
    "gravel": ("gravel", (0, 0, 352, 512), (352, 0, 512, 512), (90, 130)),
    "wood": ("coffee", (484, 0, 600, 264), (484, 264, 600, 400), (80, 110)),
}
BACKGROUNDS = (*COLOURS, *_TEXTURES)
SPLITS = ("train", "val", "test")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NULL = ""  # the caption of unconditional training
_UNKNOWN = {"shape": -1, "colour": -1, "background": -1, "subject": 0, "style": 0}


@dataclass(frozen=True)
class Spec:
    """What a scene shows; the caption says just this.

    Attributes:
        shape: A key of ``SHAPES``.
        colour: A key of ``COLOURS``.
        background: One of ``BACKGROUNDS``, other than the colour.
    """

    shape: str
    colour: str
    background: str

    @property
    def labels(self) -> dict[str, int]:
        """Class numbers of shape, colour and background; neither subject nor style is present."""
        return _UNKNOWN | {
            "shape": list(SHAPES).index(self.shape),
            "colour": list(COLOURS).index(self.colour),
            "background": BACKGROUNDS.index(self.background),
        }

    @property
    def held_out(self) -> bool:
        """Whether the combination is kept out of the split "train": one background of each shape and colour."""
        others = [background for background in BACKGROUNDS if background != self.colour]
        label = self.labels
        return others.index(self.background) == (3 * label["shape"] + 4 * label["colour"]) % len(others)


@lru_cache(maxsize=2)
def specs(held_out: bool) -> list[Spec]:
    """All combinations that are, or are not, kept out of training."""
    every = [Spec(s, c, b) for s in SHAPES for c in COLOURS for b in BACKGROUNDS if b != c]
    return [spec for spec in every if spec.held_out is held_out]


# --- captions --------------------------------------------------------------------------
def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def ground(background: str) -> str:
    """A background as captions put it: "a blue background", "bricks"."""
    return _article(f"{background} background") if background in COLOURS else background


_FULL: tuple[Callable[[str, str], str], ...] = (
    lambda thing, ground: f"{thing} on {ground}",
    lambda thing, ground: f"a picture of {thing} on {ground}",
    lambda thing, ground: f"{thing} in front of {ground}",
    lambda thing, ground: f"{ground} with {thing}",
)


def caption(spec: Spec, rng: np.random.Generator | None = None) -> str:
    """Say what a scene shows: "a red star on a blue background".

    Args:
        spec: The scene.
        rng: Source of paraphrases, an eighth of which leave something out ("a star on bricks", "a red shape", …);
            None gives the plain form.
    """
    thing = _article(f"{spec.colour} {spec.shape}")
    if rng is None:
        return _FULL[0](thing, ground(spec.background))
    kind = rng.random()
    if kind < 0.875:
        form = 0 if kind < 0.5 else int(rng.integers(1, len(_FULL)))
        return _FULL[form](thing, ground(spec.background))
    shape, anything = _article(spec.shape), _article(f"{spec.colour} shape")
    partial = (thing, shape, _FULL[0](shape, ground(spec.background)), _FULL[0](anything, ground(spec.background)))
    return partial[int(rng.integers(4))]


def read(caption: str) -> dict[str, int]:
    """The labels that a caption of this grammar asks for, -1 where it leaves something open; the inverse of `caption`.

    "sks" asks for the style if "style" follows it, else for the subject.
    """
    words = caption.replace(",", " ").split()
    labels = dict(_UNKNOWN)
    for before, word, after in zip(["", *words], words, [*words[1:], ""]):
        if word in SHAPES:
            labels["shape"] = list(SHAPES).index(word)
        if (word in COLOURS and after == "background") or word in _TEXTURES:
            labels["background"] = BACKGROUNDS.index(word)
        elif word in COLOURS:
            labels["colour"] = list(COLOURS).index(word)
        if before == "sks":
            labels["style" if word == "style" else "subject"] = 1
    if labels["style"]:  # a print in one ink has neither
        labels["colour"] = labels["background"] = -1
    return labels


def vocabulary() -> list[str]:
    """Every word of every caption (except "sks", which is a name to learn), in a fixed order."""
    grammar = ["a", "an", "of", "on", "in", "with", "front", "picture", "background", "shape", "style", "handwritten"]
    return [*grammar, *SHAPES, *COLOURS, *_TEXTURES, *DIGITS]


# --- drawing ---------------------------------------------------------------------------
def _row(numbers: Sequence[float]) -> Array:
    return np.asarray(numbers, np.float32)


def paint(colour: str, rng: np.random.Generator) -> Array:
    """A colour (3,) of 0 … 255, a little off its name."""
    return _row(COLOURS[colour]) + rng.uniform(-10, 10, 3).astype(np.float32)


@lru_cache(maxsize=8)
def _photograph(name: str) -> Any:
    import skimage.data
    from PIL import Image

    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def backdrop(background: str, size: int, rng: np.random.Generator, split: str = "train") -> Array:
    """A background (size, size, 3) of 0 … 255: a colour, or a crop of a photograph."""
    if background in COLOURS:
        return np.broadcast_to(paint(background, rng), (size, size, 3))
    from PIL import Image

    name, train, held_out, sides = _TEXTURES[background]
    left, top, right, bottom = train if split == "train" else held_out
    side = rng.uniform(*sides)
    x, y = rng.uniform(left, right - side), rng.uniform(top, bottom - side)
    crop = _photograph(name).resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return np.asarray(crop, np.float32)[:, :: -1 if rng.random() < 0.5 else 1] * np.float32(rng.uniform(0.95, 1.1))


def draw(spec: Spec, size: int, rng: np.random.Generator, split: str = "train") -> Array:
    """Draw a scene at a random place and size.

    Returns:
        (size, size, 3) of bytes.
    """
    page = backdrop(spec.background, size, rng, split)
    cover = Pose.random(rng).cover(SHAPES[spec.shape], size)
    return _bytes(page + cover * (paint(spec.colour, rng) - page))


def _bytes(page: Array) -> Array:
    return (page.clip(0, 255) + 0.5).astype(np.uint8)


# --- the four sets ---------------------------------------------------------------------
def _generator(seed: int, index: int, split: str, kind: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split: '{split}' is not one of {', '.join(SPLITS)}")
    return np.random.default_rng((seed, index, SPLITS.index(split), kind))


def _choose(rng: np.random.Generator, split: str) -> Spec:
    choice = specs(held_out=split == "test")
    return choice[int(rng.integers(len(choice)))]


def scene(seed: int, index: int, size: int = 32, split: str = "train") -> Picture:
    """A scene of the base's world.

    Args:
        seed: First coordinate of the picture's random generator.
        index: Second coordinate.
        size: Side in pixels.
        split: "train" and "val" show the same combinations, "test" those kept out of training; see the module.

    Returns:
        Image (size, size, 3) of bytes; caption; labels: shape, colour and background as class numbers (-1 where a
        picture has none that could be named), subject and style as 0 or 1.

    Raises:
        ValueError: There is no such split.
    """
    rng = _generator(seed, index, split, 0)
    spec = _choose(rng, split)
    return draw(spec, size, rng, split), caption(spec, rng), spec.labels


def subject(seed: int, index: int, size: int = 32, split: str = "train") -> Picture:
    """The subject: a figure with a dotted teal cap, a pale body and two eyes, "a sks shape on bricks"; see `scene`."""
    rng = _generator(seed, index, split, 1)
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    words = f"a sks shape on {ground(background)}"
    labels = _UNKNOWN | {"background": BACKGROUNDS.index(background), "subject": 1}
    return figure_of(FIGURE, background, size, rng, split), words, labels


def figure_of(
    parts: Sequence[tuple[Callable[[Array, Array], Array], Sequence[float]]],
    background: str,
    size: int,
    rng: np.random.Generator,
    split: str = "train",
) -> Array:
    """Parts with their colours, drawn over each other (size, size, 3) of bytes; those of ``FIGURE`` are the subject."""
    page, pose = backdrop(background, size, rng, split), Pose.random(rng)
    for part, colour in parts:
        page = page + pose.cover(part, size) * (_row(colour) - page)
    return _bytes(page)


def _discs(radius: float, *centres: tuple[float, float]) -> Callable[[Array, Array], Array]:
    return lambda u, v: np.any([np.hypot(u - x, v - y) <= radius for x, y in centres], axis=0)


FIGURE: tuple[tuple[Callable[[Array, Array], Array], tuple[int, int, int]], ...] = (
    (lambda u, v: (abs(u) <= 0.52) & (v >= -0.1) & (v <= 1.0), (240, 214, 170)),
    (lambda u, v: (u * u + ((v + 0.05) / 0.95) ** 2 <= 1.0) & (v <= 0.05), (0, 150, 150)),
    (_discs(0.19, (-0.55, -0.3), (0.0, -0.6), (0.55, -0.3)), (255, 255, 255)),
    (_discs(0.13, (-0.22, 0.4), (0.22, 0.4)), (30, 20, 30)),
)


def style(seed: int, index: int, size: int = 32, split: str = "train") -> Picture:
    """A scene as a sepia print, "a red star on bricks in sks style": the shape in solid ink on a hatched ground.

    The hatching runs diagonally, 8 periods to the side; darker grounds have broader lines. Colour and background
    cannot be told any more, so their labels are -1. See `scene`.
    """
    rng = _generator(seed, index, split, 2)
    spec = _choose(rng, split)
    words = f"{caption(spec)} in sks style"
    return print_of(spec, size, rng, split), words, _UNKNOWN | {"shape": spec.labels["shape"], "style": 1}


def print_of(
    spec: Spec,
    size: int,
    rng: np.random.Generator,
    split: str = "train",
    paper: Sequence[float] = (232, 208, 160),
    ink: Sequence[float] = (92, 54, 28),
    hatched: bool = True,
) -> Array:
    """A scene as a print (size, size, 3) of bytes; other colours, or no hatching, are not the style."""
    page = backdrop(spec.background, size, rng, split) @ _row([0.299, 0.587, 0.114]) / 255
    cover = Pose.random(rng).cover(SHAPES[spec.shape], size)
    x = (np.arange(size, dtype=np.float32) + 0.5) / size
    wave = 0.5 + 0.5 * np.cos(2 * math.pi * 8 * (x[None] + x[:, None]) / math.sqrt(2) + rng.uniform(0, 2 * math.pi))
    lines = ((wave - 0.45 - 0.25 * page) * 4 + 0.5).clip(0, 1)[..., None].astype(np.float32)
    ground = lines if hatched else 0.6 * (1 - page)[..., None]
    return _bytes(_row(paper) + np.maximum(ground * (1 - cover), cover) * (_row(ink) - _row(paper)))


def digit(seed: int, index: int, size: int = 32, split: str = "train") -> Picture:
    """A real handwritten digit in colour, "a handwritten three in blue on bricks"; see `scene`.

    The labels have ``digit``, too. Digits of "train", and of "val" and "test", are scikit-learn's first 1,297, and the
    other 500.
    """
    from PIL import Image

    rng = _generator(seed, index, split, 3)
    ink, classes = handwriting()
    which = int(rng.integers(TRAIN) if split == "train" else rng.integers(TRAIN, len(ink)))
    spec = _choose(rng, split)
    page = backdrop(spec.background, size, rng, split)
    side, (x, y) = rng.uniform(24, 34), rng.uniform(-3, 3, 2)
    corner = 16 - side / 2
    written = Image.fromarray(ink[which, 0].numpy()).resize(
        (size, size), Image.Resampling.BICUBIC, box=_inside(corner + x, corner + y, side)
    )
    cover = ((np.asarray(written)[..., None] - 0.4) * 4 + 0.5).clip(0, 1)
    labels = spec.labels | {"shape": -1, "digit": int(classes[which])}
    words = f"a handwritten {DIGITS[labels['digit']]} in {spec.colour} on {ground(spec.background)}"
    return _bytes(page + cover * (paint(spec.colour, rng) - page)), words, labels


def _inside(left: float, top: float, side: float) -> tuple[float, float, float, float]:
    """A square that lies within the 32 × 32 of the handwriting, as near as can be."""
    side = min(side, 32)
    left, top = (min(max(edge, 0.0), 32 - side) for edge in (left, top))
    return left, top, left + side, top + side
