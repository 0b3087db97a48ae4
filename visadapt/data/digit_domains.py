"""Handwritten digits drawn in several visual domains, from data inside two ordinary wheels.

The handwriting is scikit-learn's ``load_digits`` (1,797 images of 8 × 8, 17 grey levels: the test part of
UCI's "Optical Recognition of Handwritten Digits", Alpaydin & Kaynak 1998, CC BY 4.0); the photographs of the
``texture`` domain ship inside scikit-image. Nothing is downloaded.

A drawing is a pure function of (domain, seed, epoch, index): every sample has a random generator of its own,
so neither the number of loader workers nor a resumed run changes a pixel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32  # side of a drawing in pixels
_DIGIT = 24  # side of a digit with its one-pixel margin, before the random scale
_UNIFORMS = 12

# Photographs are split between training and evaluation as MNIST-M splits BSDS: backgrounds are never shared.
_PHOTOS = {
    True: ("astronaut", "coffee", "brick", "gravel", "immunohistochemistry"),
    False: ("chelsea", "rocket", "grass", "retina", "moon"),
}


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch: ``uniform`` (B, 12) in [0, 1), ``noise`` (B, 32, 32) standard normal."""

    uniform: Tensor
    noise: Tensor
    train: bool


@dataclass(frozen=True)
class Domain:
    """A way of drawing a digit.

    Attributes:
        about: One line for people.
        rotation: Least and greatest angle in degrees.
        paint: (ink (B, 32, 32) in [0, 1], draws) → RGB (B, 3, 32, 32) in [0, 1].
        both_ways: Whether the sign of the angle is random.
    """

    about: str
    rotation: tuple[float, float]
    paint: Callable[[Tensor, Draws], Tensor]
    both_ways: bool = False


def _light_on_dark(ink: Tensor, draws: Draws) -> Tensor:
    return ink[:, None].expand(-1, 3, -1, -1)


def _dark_on_light(ink: Tensor, draws: Draws) -> Tensor:
    return 1 - _light_on_dark(ink, draws)


def _scanned(ink: Tensor, draws: Draws) -> Tensor:
    """Sepia ink on yellowed paper with grain and dark specks."""
    paper = torch.tensor([0.92, 0.85, 0.70]) + 0.12 * (draws.uniform[:, 5:8] - 0.5)
    sepia = torch.tensor([0.36, 0.22, 0.12]) + 0.12 * (draws.uniform[:, 8:11] - 0.5)
    strength = (0.65 + 0.35 * draws.uniform[:, 11])[:, None, None] * ink
    cover = strength[:, None]
    page = paper[:, :, None, None] * (1 - cover) + sepia[:, :, None, None] * cover
    specks = (draws.noise > 2.0).float()[:, None]
    return (page * (1 + 0.10 * draws.noise[:, None]) * (1 - 0.6 * specks)).clamp(0, 1)


def _on_photograph(ink: Tensor, draws: Draws) -> Tensor:
    """|photograph − digit|, the recipe of MNIST-M (Ganin & Lempitsky 2015, arXiv:1409.7495)."""
    photos = photographs(draws.train)
    crops = []
    for which, top, left in draws.uniform[:, 5:8].tolist():
        photo = photos[int(which * len(photos))]
        height, width = photo.shape[1:]
        y, x = int(top * (height - SIZE + 1)), int(left * (width - SIZE + 1))
        crops.append(photo[:, y : y + SIZE, x : x + SIZE])
    return (torch.stack(crops) - ink[:, None]).abs()


DOMAINS: dict[str, Domain] = {
    "upright": Domain("light ink on black, as written", (-12, 12), _light_on_dark),
    "tilted": Domain("light ink on black, turned by 20 to 40 degrees", (20, 40), _light_on_dark, True),
    "rotated": Domain("light ink on black, turned by 30 to 60 degrees", (30, 60), _light_on_dark, True),
    "inverted": Domain("black ink on white", (-12, 12), _dark_on_light),
    "scan": Domain("sepia ink on specked paper, turned by 20 to 45 degrees", (20, 45), _scanned, True),
    "texture": Domain("|photograph - digit|, the recipe of MNIST-M", (-12, 12), _on_photograph),
}


@lru_cache(maxsize=1)
def handwriting() -> tuple[Tensor, Tensor]:
    """All 1,797 digits as ink (1797, 1, 32, 32) in [0, 1], centred on an empty page, and labels (1797,)."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    ink = torch.from_numpy(raw.images / 16.0).float()[:, None]
    ink = F.pad(ink, (1,) * 4)  # else strokes that touch the border end in a hard edge
    ink = F.interpolate(ink, size=(_DIGIT, _DIGIT), mode="bicubic", align_corners=False).clamp(0, 1)
    margin = (SIZE - _DIGIT) // 2
    return F.pad(ink, (margin,) * 4), torch.from_numpy(raw.target.astype(np.int64))


@lru_cache(maxsize=2)
def photographs(train: bool) -> list[Tensor]:
    """Photographs as (3, H, W) in [0, 1], half size so that a 32-pixel crop shows some structure."""
    import skimage.data

    photos = []
    for name in _PHOTOS[train]:
        pixels = torch.from_numpy(np.array(getattr(skimage.data, name)())).float() / 255
        pixels = pixels[..., None].expand(-1, -1, 3) if pixels.ndim == 2 else pixels[..., :3]
        photos.append(F.avg_pool2d(pixels.permute(2, 0, 1), 2).contiguous())
    return photos


def draw(domain: str, indices: Sequence[int], seed: int, epoch: int, train: bool) -> Tensor:
    """Draw digits in a domain.

    Args:
        domain: A key of ``DOMAINS``.
        indices: Positions in ``handwriting()``.
        seed: First coordinate of every sample's random generator.
        epoch: Second coordinate; another epoch gives another position, angle, background.
        train: Chooses the set of background photographs.

    Returns:
        RGB images (len(indices), 3, 32, 32), uint8.
    """
    style, ink = DOMAINS[domain], handwriting()[0][list(indices)]
    draws = _draws(indices, seed, epoch, train)
    grid = F.affine_grid(_poses(style, draws.uniform), list(ink.shape), align_corners=False)
    moved = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
    return (style.paint(moved.clamp(0, 1), draws) * 255).round().to(torch.uint8)


def _draws(indices: Sequence[int], seed: int, epoch: int, train: bool) -> Draws:
    uniform = np.empty((len(indices), _UNIFORMS), np.float32)
    noise = np.empty((len(indices), SIZE, SIZE), np.float32)
    for row, index in enumerate(indices):
        generator = np.random.default_rng((seed, epoch, int(index), int(train)))
        uniform[row] = generator.random(_UNIFORMS, dtype=np.float32)
        noise[row] = generator.standard_normal((SIZE, SIZE), dtype=np.float32)
    return Draws(torch.from_numpy(uniform), torch.from_numpy(noise), train)


def _poses(style: Domain, uniform: Tensor) -> Tensor:
    """Inverse affine maps (B, 2, 3): rotation of the domain, scale 0.9 to 1.15, shift up to 2 pixels."""
    low, high = style.rotation
    angle = torch.deg2rad(low + (high - low) * uniform[:, 0])
    if style.both_ways:
        angle = torch.where(uniform[:, 1] < 0.5, angle, -angle)
    scale = 1 / (0.9 + 0.25 * uniform[:, 2])
    shift = (uniform[:, 3:5] * 2 - 1) * 4 / SIZE  # affine_grid's unit is half the side
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    return torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
