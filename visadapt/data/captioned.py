"""Captioned pictures brought to their bucket's size: the samples of every text-to-image data module."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from visadapt.data.buckets import Buckets, Placement, Size
from visadapt.data.captions import Captions
from visadapt.data.images import UnreadableImage, read_rgb

Find = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class Captioned(ABC):
    """One picture with its caption, read or drawn when asked for; it has to be picklable.

    Attributes:
        name: What a message calls it.
        caption: What it shows.
        size: Width and height of what ``read`` gives.
        prior: It shows the class, not the subject (prior preservation).
    """

    name: str
    caption: str
    size: Size
    prior: bool = False

    @abstractmethod
    def read(self) -> Image.Image:
        """The picture as RGB."""

    def content(self) -> str:
        """A hash that changes with the picture's pixels."""
        return hashlib.blake2b(self.read().tobytes(), digest_size=20).hexdigest()

    def mask(self) -> Image.Image | None:
        """How much each pixel counts in the loss, as grey of the picture's size; None is everywhere the same."""
        return None


@dataclass(frozen=True)
class PictureFile(Captioned):
    """A picture in a file, perhaps with a mask in another."""

    path: Path = Path()
    mask_path: Path | None = None

    def read(self) -> Image.Image:
        """The picture as RGB.

        Raises:
            UnreadableImage: The file is broken.
        """
        return read_rgb(self.path)

    def content(self) -> str:
        """Hash of the file, taken again once its size or date changes; the picture is not decoded."""
        status = os.stat(self.path)
        return _file_hash(self.path, status.st_size, status.st_mtime_ns)

    def mask(self) -> Image.Image | None:
        """The mask file as grey.

        Raises:
            UnreadableImage: The file is broken, or has another size than the picture.
        """
        if self.mask_path is None:
            return None
        mask = read_rgb(self.mask_path).convert("L")
        if mask.size != self.size:
            raise UnreadableImage(
                f"mask '{self.mask_path}' has {mask.width} × {mask.height} pixels, "
                f"its picture '{self.path}' {self.size[0]} × {self.size[1]}"
            )
        return mask


@lru_cache(maxsize=2**17)
def _file_hash(path: Path, size: int, date: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


class CaptionedSet(Dataset):
    """Samples ``{"caption", "sizes", "image" or "latents"}``, where there are such also ``"prior"`` and ``"mask"``.

    The image is float (3, H, W) in [-1, 1], ``sizes`` long (6,): see ``Placement.conditioning``. With ``find``, a
    sample whose latents are known has ``latents`` instead of an image, and any other has the ``key`` to keep them
    under besides. Random numbers are the same in either case.

    Args:
        pictures: What an epoch shows; one may come several times.
        buckets: The sizes that pictures are brought to.
        captions: What is done to captions.
        flip: Mirror half of the pictures, in training.
        random_crop: Cut anywhere instead of in the middle, in training.
        training: Whether chance plays a part.
        find: Latents by key, or None if they are not known yet.
    """

    def __init__(
        self,
        pictures: Sequence[Captioned],
        buckets: Buckets,
        captions: Captions,
        flip: bool = False,
        random_crop: bool = False,
        training: bool = False,
        find: Find | None = None,
    ) -> None:
        self.pictures, self.buckets, self.captions, self.find = list(pictures), buckets, captions, find
        self.training = training
        self.with_prior = any(picture.prior for picture in self.pictures)
        self.flip, self.random_crop = flip and training, random_crop and training
        targets = [target_of("picture", picture.name, picture.size, buckets) for picture in self.pictures]
        numbers = {target: number for number, target in enumerate(sorted(set(targets)))}
        self.groups = [numbers[target] for target in targets]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self.pictures[index]
        flipped = self.flip and bool(torch.rand(()) < 0.5)
        x, y = torch.rand(2).tolist() if self.random_crop else (0.5, 0.5)
        placement = self.buckets.place(picture.size, (x, y))
        sample: dict[str, Any] = {
            "caption": self.captions(picture.caption, self.training),
            "sizes": torch.tensor(placement.conditioning),
        }
        if self.with_prior:
            sample["prior"] = picture.prior
        mask = picture.mask()
        if mask is not None:
            sample["mask"] = to_tensor(mask, placement, flipped)
        if self.find is not None:
            key = f"{picture.content()} {placement.scaled} {placement.corner} {placement.target} {flipped}"
            latents = self.find(key)
            if latents is not None:
                return sample | {"latents": latents}
            sample["key"] = key
        return sample | {"image": to_tensor(picture.read(), placement, flipped) * 2 - 1}


def target_of(what: str, name: str, size: Size, buckets: Buckets) -> Size:
    """The bucket of a size.

    Raises:
        ValueError: There is none; says of ``what`` ("picture") and which ``name``.
    """
    try:
        return buckets.target(size)
    except ValueError as error:
        raise ValueError(f"{what} '{name}': {error}") from error


def to_tensor(image: Image.Image, placement: Placement, flipped: bool) -> Tensor:
    """Float (C, H, W) in [0, 1]; the cut is that of the mirrored picture, so SDXL's crop says what is seen."""
    if flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(placement.apply(image)))
    pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return pixels.contiguous().float() / 255
