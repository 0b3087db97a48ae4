"""Embedded captioned pictures: the tiny base's own world, a subject, a style and handwritten digits to adapt it to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image

from visadapt.data import scenes
from visadapt.data.base import Stage
from visadapt.data.buckets import Buckets
from visadapt.data.captioned import Captioned
from visadapt.data.captioned_data import PLAIN, CaptionedData
from visadapt.data.captions import Captions

Kind = Literal["scenes", "subject", "style", "digits", "both"]
_DRAW: dict[str, Callable[[int, int, int, str], scenes.Picture]] = {
    "scenes": scenes.scene,
    "subject": scenes.subject,
    "style": scenes.style,
    "digits": scenes.digit,
}
_FIXED_SEED = 1871  # validation and test pictures are the same for every seed of a run


class Scenes(CaptionedData):
    """Drawn pictures with captions (see `visadapt.data.scenes`), no download.

    Training pictures follow ``seed``; validation and test pictures never change, and no two stages share one. All
    are the same in every epoch.

    Args:
        kind: "scenes" (the world that ``tiny_sd`` knows), or what it never saw: "subject" ("a sks shape on …"),
            "style" ("… in sks style"), "digits" (real handwriting in colour); "both" is the subject, then the style.
        size: Side of the pictures in pixels.
        train_size: Training pictures, of "both" so many each.
        val_size: Validation pictures, likewise.
        test_size: Test pictures, likewise.
        prior_size: Pictures of the kind "scenes" added to the training as pictures of the class (prior preservation).
        captions: Prefix and shuffled tags.
        flip: Mirror half of the training pictures.
        cache: Folder for latents and text encodings, see `CaptionedData`.
        cache_gib: Size of that folder.
        batch_size: Samples per batch on each device.
        num_workers: Processes that load data ahead.
        seed: Source of the training pictures, of the order and of the flips.
        drop_last: Leave out the last, short training batch of an epoch.
    """

    def __init__(
        self,
        kind: Kind = "subject",
        size: int = 32,
        train_size: int = 20,
        val_size: int = 32,
        test_size: int = 32,
        prior_size: int = 0,
        captions: Captions = PLAIN,
        flip: bool = False,
        cache: str | None = None,
        cache_gib: float = 1.0,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            Buckets(size, size, False),
            flip,
            False,
            captions,
            cache,
            cache_gib,
            batch_size,
            num_workers,
            seed,
            drop_last,
        )
        if kind not in get_args(Kind):
            raise ValueError(f"data.kind: '{kind}' is not one of {', '.join(get_args(Kind))}")
        numbers = {"size": size, "train_size": train_size, "val_size": val_size, "test_size": test_size}
        for key, value in numbers.items():
            if value < 1:
                raise ValueError(f"data.{key}: {value} must be at least 1")
        self.kind, self.size, self.prior_size = kind, size, prior_size
        self.counts = {"train": train_size, "val": val_size, "test": test_size}

    def pictures(self, stage: Stage) -> Sequence[Captioned]:
        """The pictures of a stage."""
        own = self._own(stage)
        if stage == "train" and self.prior_size:
            own += self._drawn("scenes", stage, self.prior_size, prior=True)
        return own

    def labels(self, stage: Stage) -> list[dict[str, int]]:
        """What each picture of a stage shows, as class numbers; see `visadapt.data.scenes.scene`."""
        return [drawing.draw()[2] for drawing in self._own(stage)]

    def _own(self, stage: Stage) -> list[Drawing]:
        kinds = ("subject", "style") if self.kind == "both" else (self.kind,)
        return [drawing for kind in kinds for drawing in self._drawn(kind, stage, self.counts[stage])]

    def _drawn(self, kind: str, stage: str, count: int, prior: bool = False) -> list[Drawing]:
        seed = self.seed if stage == "train" else _FIXED_SEED
        return [Drawing.of(kind, seed, index, self.size, stage, prior) for index in range(count)]


@dataclass(frozen=True)
class Drawing(Captioned):
    """A picture that is drawn whenever it is read."""

    kind: str = "scenes"
    seed: int = 0
    index: int = 0
    split: str = "train"

    @staticmethod
    def of(kind: str, seed: int, index: int, size: int, split: str, prior: bool = False) -> Drawing:
        """A picture by its coordinates, with the caption that is drawn with it."""
        caption = _DRAW[kind](seed, index, size, split)[1]
        return Drawing(f"{kind} {split} {index}", caption, (size, size), prior, kind, seed, index, split)

    def draw(self) -> scenes.Picture:
        """Pixels (H, W, 3) of bytes, caption, labels."""
        return _DRAW[self.kind](self.seed, self.index, self.size[0], self.split)

    def read(self) -> Image.Image:
        """The picture as RGB."""
        return Image.fromarray(self.draw()[0])
