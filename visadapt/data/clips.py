"""Captioned clips brought to their bucket's size: the samples of every text-to-video data module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from visadapt.data.buckets import Buckets, Size
from visadapt.data.captioned import Find, target_of, to_tensor
from visadapt.data.captions import Captions


@dataclass(frozen=True)
class Clip(ABC):
    """A clip with its caption, read or drawn when asked for; it has to be picklable.

    Attributes:
        name: What a message calls it.
        caption: What it shows, with its motion.
        size: Width and height of its frames.
        number: Which source it comes from, counted from 0 in its data set.
        starts: Number of frames at which it may begin.
        frame_caption: What a single frame shows; empty is the caption.
    """

    name: str
    caption: str
    size: Size
    number: int = 0
    starts: int = 1
    frame_caption: str = ""

    @abstractmethod
    def read(self, start: int) -> list[Image.Image]:
        """The frames from position ``start``, 0 … ``starts`` − 1, on, as RGB of the same size."""

    @abstractmethod
    def content(self) -> str:
        """A hash that changes with the pixels of the source or with the choice of its frames."""


class ClipSet(Dataset):
    """Samples ``{"caption", "frame_caption", "sizes", "clip", "video" or "latents"}``.

    The video is float (F, 3, H, W) in [-1, 1], ``sizes`` long (6,) as `visadapt.data.buckets.Placement.conditioning`,
    ``clip`` the number of the source. With ``find``, a sample whose latents are known has ``latents`` instead of a
    video, and any other has the ``key`` to keep them under besides. Random numbers are the same in either case.

    Args:
        clips: What an epoch shows; one may come several times.
        buckets: The sizes that frames are brought to.
        captions: What is done to captions.
        flip: Mirror half of the clips, in training.
        training: Whether chance plays a part; without it, clips begin in the middle of what they may.
        find: Latents by key, or None if they are not known yet.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        buckets: Buckets,
        captions: Captions,
        flip: bool = False,
        training: bool = False,
        find: Find | None = None,
    ) -> None:
        self.clips, self.buckets, self.captions, self.find = list(clips), buckets, captions, find
        self.flip, self.training = flip and training, training
        targets = [target_of("clip", clip.name, clip.size, buckets) for clip in self.clips]
        numbers = {target: number for number, target in enumerate(sorted(set(targets)))}
        self.groups = [numbers[target] for target in targets]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = self.clips[index]
        flipped = self.flip and bool(torch.rand(()) < 0.5)
        chance = self.training and clip.starts > 1
        start = int(torch.randint(clip.starts, ())) if chance else (clip.starts - 1) // 2
        place = self.buckets.place(clip.size)
        sample: dict[str, Any] = {
            "caption": self.captions(clip.caption, self.training),
            "frame_caption": self.captions(clip.frame_caption or clip.caption, self.training),
            "sizes": torch.tensor(place.conditioning),
            "clip": clip.number,
        }
        if self.find is not None:
            key = f"clip {clip.content()} {start} {place.scaled} {place.corner} {place.target} {flipped}"
            latents = self.find(key)
            if latents is not None:
                return sample | {"latents": latents}
            sample["key"] = key
        frames: list[Tensor] = [to_tensor(frame, place, flipped) for frame in clip.read(start)]
        return sample | {"video": torch.stack(frames) * 2 - 1}
