"""Embedded captioned clips: the world of the tiny video base, three motions and moving handwriting to adapt it to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from PIL import Image

from visadapt.data import moving
from visadapt.data.base import Stage
from visadapt.data.buckets import Buckets
from visadapt.data.captioned_data import PLAIN
from visadapt.data.captions import Captions
from visadapt.data.clip_data import ClipData
from visadapt.data.clips import Clip

Kind = Literal["moving", "orbit", "zigzag", "bounce", "digits"]
_FIXED_SEED = 1871  # validation and test clips are the same for every seed of a run


class MovingScenes(ClipData):
    """Drawn clips with captions (see `visadapt.data.moving`), no download.

    Training clips follow ``seed``; validation and test clips never change, and no two stages share one. All are the
    same in every epoch.

    Args:
        kind: "moving" (shapes in four directions, the world that ``tiny_video`` knows), or what it never saw:
            "orbit", "zigzag", "bounce", "digits" (real handwriting in four directions).
        clips: Training clips, each a source of its own.
        val_clips: Validation clips.
        test_clips: Test clips.
        frames: Frames of a clip.
        size: Side of the frames in pixels.
        repeats: How often an epoch shows each training clip.
        captions: Prefix and shuffled tags.
        cache: Folder for latents and text encodings, see `CaptionedData`.
        cache_gib: Size of that folder.
        batch_size: Clips per batch on each device.
        num_workers: Processes that load data ahead.
        seed: Source of the training clips and of the order.
        drop_last: Leave out the last, short training batch of an epoch.
    """

    def __init__(
        self,
        kind: Kind = "orbit",
        clips: int = 1,
        val_clips: int = 16,
        test_clips: int = 16,
        frames: int = 8,
        size: int = 32,
        repeats: int = 1,
        captions: Captions = PLAIN,
        cache: str | None = None,
        cache_gib: float = 1.0,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        numbers = {"clips": clips, "val_clips": val_clips, "test_clips": test_clips, "repeats": repeats, "size": size}
        for key, value in numbers.items():
            if value < 1:
                raise ValueError(f"data.{key}: {value} must be at least 1")
        if kind not in get_args(Kind):
            raise ValueError(f"data.kind: '{kind}' is not one of {', '.join(get_args(Kind))}")
        if frames < 2:
            raise ValueError(f"data.frames: {frames} shows no motion; at least 2 are needed")
        super().__init__(
            Buckets(size, size, False),
            captions=captions,
            cache=cache,
            cache_gib=cache_gib,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            drop_last=drop_last,
        )
        self.kind, self.frames, self.size, self.repeats = kind, frames, size, repeats
        self.counts = {"train": clips, "val": val_clips, "test": test_clips}

    def clips(self, stage: Stage) -> Sequence[Clip]:
        """The clips of a stage."""
        return self._drawn(stage) * (self.repeats if stage == "train" else 1)

    def labels(self, stage: Stage) -> list[dict[str, Any]]:
        """What each clip of a stage shows and where it goes; see `visadapt.data.moving.clip`."""
        return [drawing.draw()[2] for drawing in self._drawn(stage)]

    def _drawn(self, stage: str) -> list[DrawnClip]:
        seed = self.seed if stage == "train" else _FIXED_SEED
        return [
            DrawnClip.of(self.kind, seed, index, self.frames, self.size, stage) for index in range(self.counts[stage])
        ]


@dataclass(frozen=True)
class DrawnClip(Clip):
    """A clip that is drawn whenever it is read."""

    kind: str = "moving"
    seed: int = 0
    index: int = 0
    frames: int = 8
    split: str = "train"

    @staticmethod
    def of(kind: str, seed: int, index: int, frames: int, size: int, split: str) -> DrawnClip:
        """A clip by its coordinates, with the caption that is drawn with it."""
        said = moving.clip(seed, index, 2, 8, split, kind)[1]
        still = moving.without_motion(said)
        name = f"{kind} {split} {index}"
        return DrawnClip(name, said, (size, size), index, 1, still, kind, seed, index, frames, split)

    def draw(self) -> moving.Clip:
        """Frames (F, H, W, 3) of bytes, caption, labels."""
        return moving.clip(self.seed, self.index, self.frames, self.size[0], self.split, self.kind)

    def read(self, start: int = 0) -> list[Image.Image]:
        """The frames as RGB."""
        return [Image.fromarray(frame) for frame in self.draw()[0]]

    def content(self) -> str:
        """A hash of the pixels."""
        return hashlib.blake2b(self.draw()[0].tobytes(), digest_size=20).hexdigest()
