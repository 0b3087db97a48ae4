"""Real handwritten digits in a named domain: few-shot sets, class splits, the original domain to compare."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from visadapt.data.base import BaseData, Stage
from visadapt.data.digit_domains import DOMAINS, draw, handwriting
from visadapt.data.loader import ExactLoader

TRAIN, TEST = 1297, 500  # by order, which seems to go by writer, so the tail is a fair test
_FIXED_SEED = 2024  # validation and test drawings are the same for every seed of a run


class Digits(BaseData):
    """Digits of scikit-learn drawn as 32 × 32 RGB in a domain: upright, tilted, rotated, inverted, scan, texture.

    The first 1,297 digits by order are for training, the last 500 for testing; ``val_size`` digits at the end
    of the training part are kept for validation. Validation and test drawings never change. Training digits
    are drawn anew in every epoch, but a few-shot set is drawn once: so many images exist and no more. Such
    fixed images are only moved a little while training (12 degrees, 12 % in size, 2 pixels).

    Args:
        domain: How the digits are drawn.
        source_domain: The domain that the base model knows; its test set serves the comparison "accuracy on
            the original domain with the adapter off". None leaves that out.
        shots: Training images per class, chosen by ``seed`` and drawn once; None takes all.
        classes: Digits to tell apart, in the order of the labels; None takes all ten.
        val_size: Digits kept for validation.
        batch_size: Samples per batch on each device.
        num_workers: Processes that load data ahead.
        seed: Source of the few shots, of the order and of the training drawings.
        drop_last: Leave out the last, short training batch of an epoch.
    """

    def __init__(
        self,
        domain: str = "scan",
        source_domain: str | None = "upright",
        shots: int | None = None,
        classes: list[int] | None = None,
        val_size: int = 200,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, drop_last=drop_last)
        for key, value in {"domain": domain, "source_domain": source_domain}.items():
            if value is not None and value not in DOMAINS:
                raise ValueError(f"data.{key}: '{value}' is not one of {', '.join(DOMAINS)}")
        self.classes = list(range(10)) if classes is None else list(classes)
        if not self.classes or len(set(self.classes)) < len(self.classes) or set(self.classes) - set(range(10)):
            raise ValueError(f"data.classes: {self.classes} must be different digits from 0 to 9, at least one")
        if not 0 < val_size < TRAIN:
            raise ValueError(f"data.val_size: {val_size} must lie between 1 and {TRAIN - 1}")
        self.domain = domain
        self.source_domain = source_domain
        self.shots = shots
        self.val_size = val_size
        self.class_names = [str(digit) for digit in self.classes]

    def dataset(self, stage: Stage) -> "DigitSet":
        """The drawings of a stage; "predict" is the test set."""
        training = stage == "train"
        return DigitSet(
            self._indices(stage),
            self.classes,
            self.domain,
            seed=self.seed if training else _FIXED_SEED,
            training=training,
            redraw=training and self.shots is None,
            move=training and self.shots is not None,
            transform=self.preprocess(train=False),  # flips and crops would make other digits
        )

    def source_dataloader(self) -> ExactLoader | None:
        """The test digits in the original domain, or None if no ``source_domain`` was named."""
        if self.source_domain is None:
            return None
        transform = self.preprocess(train=False)
        indices = self._indices("test")
        return self.loader(DigitSet(indices, self.classes, self.source_domain, _FIXED_SEED, transform=transform))

    def _indices(self, stage: Stage) -> list[int]:
        """Positions in ``handwriting()`` of a stage, without the digits that are not among ``classes``."""
        total = TRAIN + TEST
        start, stop = {
            "train": (0, TRAIN - self.val_size),
            "val": (TRAIN - self.val_size, TRAIN),
        }.get(stage, (TRAIN, total))
        labels = handwriting()[1][start:stop]
        if stage == "train" and self.shots is not None:
            return [start + i for i in _few(labels, self.classes, self.shots, self.seed)]
        return [start + i for i, label in enumerate(labels.tolist()) if label in self.classes]


class DigitSet(Dataset):
    """Drawn digits with labels that count from 0 in the order of ``classes``.

    Args:
        indices: Positions in ``handwriting()``.
        classes: Digits in the order of the labels.
        domain: Key of ``DOMAINS``.
        seed: Seed of the drawings.
        training: Draw on the training photographs.
        redraw: Draw anew in every epoch.
        move: Move each image a little each time it is read, by torch's random state (the loader seeds it).
        transform: From a PIL image to the network's input; None gives RGB in [0, 1].
    """

    def __init__(
        self,
        indices: Sequence[int],
        classes: Sequence[int],
        domain: str,
        seed: int,
        training: bool = False,
        redraw: bool = False,
        move: bool = False,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.indices, self.domain, self.seed = list(indices), domain, seed
        self.training, self.redraw, self.move, self.transform = training, redraw, move, transform
        self.labels = [classes.index(int(handwriting()[1][index])) for index in self.indices]
        self._epoch = 0
        self.images = self._draw(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the digits of an epoch, all at once: that is ten times as fast as one by one."""
        if self.redraw and epoch != self._epoch:
            self.images, self._epoch = self._draw(epoch), epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        image = _moved(self.images[position]) if self.move else self.images[position]
        if self.transform is None:
            return image.float() / 255, self.labels[position]
        return self.transform(Image.fromarray(image.permute(1, 2, 0).numpy())), self.labels[position]

    def _draw(self, epoch: int) -> Tensor:
        return draw(self.domain, self.indices, self.seed, epoch, self.training)


def _moved(image: Tensor) -> Tensor:
    """Turn, scale and shift an image (3, H, W) of bytes a little; the border is continued outwards."""
    turn, size, right, down = (torch.rand(4) * 2 - 1).tolist()
    angle, scale, shift = math.radians(12 * turn), 1 + 0.12 * size, 4 / image.shape[-1]
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    pose = torch.tensor([[[cos, -sin, right * shift], [sin, cos, down * shift]]])
    grid = F.affine_grid(pose, [1, *image.shape], align_corners=False)
    moved = F.grid_sample(image[None].float(), grid, padding_mode="border", align_corners=False)
    return moved[0].round().to(torch.uint8)


def _few(labels: Tensor, classes: Sequence[int], shots: int, seed: int) -> list[int]:
    """Positions of ``shots`` digits of each class, chosen by ``seed``."""
    generator = np.random.default_rng((seed, 0))
    chosen: list[int] = []
    for digit in classes:
        positions = torch.nonzero(labels == digit).flatten().numpy()
        if not 0 < shots <= len(positions):
            raise ValueError(f"data.shots: {shots}, but of digit {digit} there are {len(positions)}")
        chosen += sorted(generator.choice(positions, shots, replace=False).tolist())
    return chosen
