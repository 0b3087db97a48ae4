"""People's own captioned clips: a motion to learn from one of them or from several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from visadapt.data.base import Stage
from visadapt.data.buckets import Buckets
from visadapt.data.captioned_data import PLAIN
from visadapt.data.captions import Captions, captions_of, walk
from visadapt.data.clip_data import ClipData
from visadapt.data.clips import Clip
from visadapt.data.masks import in_parallel, raise_all
from visadapt.data.text_images import folders_of, held_out
from visadapt.data.video_files import ANIMATIONS, VIDEOS, BadClip, Source, find_clips, look


class VideoFolder(ClipData):
    """Text-to-video from a folder of clips with captions.

    A clip is a video (mp4, mov, m4v, avi, mkv, webm; needs ``visadapt[video]``), an animated GIF or WebP, or a folder
    of frames. Captions are found as for pictures (`visadapt.data.captions.find_captions`): ``NAME.txt`` beside the
    clip or the folder ``NAME``, ``metadata.jsonl`` or ``metadata.csv``, folders named ``10_sks dance``, or one
    ``instance_prompt``. All clips are decoded once at the start, so that broken ones are named before training.

    ``root`` may hold ``train`` and ``val`` folders. Without them, ``val_root`` or ``val_size``, the training clips
    serve as validation, too: the loss then says how well they are learned, not how well it generalises.

    Training shows ``frames`` frames from a random start, validation those in the middle of the clip.

    Args:
        root: Folder of the clips.
        frames: Frames of a sample.
        stride: Every how manieth frame of a clip is taken.
        fps: Frames per second to take instead, by each clip's own rate; needs clips that state one, as fast at least.
        resolution: Side in pixels of a square with the area that frames have.
        instance_prompt: The caption of every clip, for folders without captions.
        caption_column: Column of the captions in metadata.jsonl or metadata.csv.
        captions: Prefix and shuffled tags.
        repeats: How often an epoch shows each clip, times what folder names such as ``10_sks dance`` say.
        buckets: Keep aspect ratios; false makes squares.
        bucket_step: Sides are multiples of it: 64 for Stable Diffusion, 8 for ``tiny_video``.
        upscale: Enlarge smaller clips.
        flip: Mirror half of the training clips; their captions should not speak of left and right then.
        val_root: Folder of validation clips, laid out as ``root``.
        val_size: Clips of ``root`` kept for validation, by ``seed``.
        cache: Folder for latents and text encodings, see `CaptionedData`; each start is kept by itself.
        cache_gib: Size of that folder.
        batch_size: Clips per batch on each device.
        num_workers: Processes that load data ahead.
        seed: Source of the split, of the order, the starts and the flips.
        drop_last: Leave out the last, short training batch of each size in an epoch.
    """

    def __init__(
        self,
        root: str,
        frames: int = 16,
        stride: int = 1,
        fps: float | None = None,
        resolution: int = 256,
        instance_prompt: str | None = None,
        caption_column: str = "text",
        captions: Captions = PLAIN,
        repeats: int = 1,
        buckets: bool = True,
        bucket_step: int = 64,
        upscale: bool = True,
        flip: bool = False,
        val_root: str | None = None,
        val_size: int = 0,
        cache: str | None = None,
        cache_gib: float = 16.0,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        sizes = Buckets(resolution, bucket_step, buckets, upscale)
        super().__init__(sizes, flip, False, captions, cache, cache_gib, batch_size, num_workers, seed, drop_last)
        for key, value, least in (("frames", frames, 1), ("stride", stride, 1), ("repeats", repeats, 1)):
            if value < least:
                raise ValueError(f"data.{key}: {value} must be at least {least}")
        if fps is not None and (fps <= 0 or stride != 1):
            raise ValueError(f"data.fps: {fps} must be positive, and takes the place of data.stride: {stride}")
        if val_size < 0:
            raise ValueError(f"data.val_size: {val_size} is too small")
        self.root, self.train_root, self.val_root = folders_of(root, val_root, val_size, "clips")
        self.instance_prompt, self.caption_column = instance_prompt, caption_column
        self.frames, self.stride, self.fps = frames, stride, fps
        self.repeats, self.val_size = repeats, val_size
        self._found: dict[Path, list[tuple[ClipFile, int]]] = {}

    def setup(self, stage: str) -> None:
        """Find the clips and their captions, and name all that is wrong with them."""
        for root in {self.train_root, self.val_root or self.train_root}:
            self._files(root)

    def clips(self, stage: Stage) -> Sequence[Clip]:
        """The clips of a stage; "test" is the validation."""
        if self.val_root is not None and stage != "train":
            return [clip for clip, _ in self._files(self.val_root)]
        files = self._files(self.train_root)
        held = (
            held_out({clip.source.path for clip, _ in files}, self.val_size, self.seed, self.train_root, "clips")
            if self.val_size
            else set()
        )
        train = [(clip, repeats) for clip, repeats in files if clip.source.path not in held]
        if stage != "train":
            return [clip for clip, _ in files if clip.source.path in held] or [clip for clip, _ in train]
        return [clip for clip, repeats in train for _ in range(repeats * self.repeats)]

    def _files(self, root: Path) -> list[tuple[ClipFile, int]]:
        """Clips of a folder with their repeats."""
        if root not in self._found:
            files = list(walk(root, ()))
            paths = find_clips(root, files)
            if not paths:
                known = ", ".join((*VIDEOS, *ANIMATIONS))
                raise FileNotFoundError(f"data.root: no clips in '{root}'; known are {known} and folders of frames")
            captioned = captions_of(root, paths, files, self.instance_prompt, self.caption_column, "clip")
            sources, problems = in_parallel(
                paths, partial(_usable, frames=self.frames, stride=self.stride, fps=self.fps)
            )
            raise_all(problems, root, BadClip)
            numbers = {path: number for number, path in enumerate(paths)}
            self._found[root] = [
                (replace(sources[file.path], caption=file.caption, number=numbers[file.path]), file.repeats)
                for file in captioned
            ]
        return self._found[root]


_NOTHING = Source(Path(), 0, (0, 0), None)


@dataclass(frozen=True)
class ClipFile(Clip):
    """A clip of a file or of a folder of frames.

    Attributes:
        source: The whole of it.
        steps: Position of each frame of a sample, counted from its start.
    """

    source: Source = _NOTHING
    steps: tuple[int, ...] = ()

    def read(self, start: int) -> list[Image.Image]:
        """The frames as RGB.

        Raises:
            BadClip: The file broke since it was looked at.
        """
        return self.source.read([start + step for step in self.steps])

    def content(self) -> str:
        """A hash of the names, sizes and dates of the files, and of the choice of frames."""
        return hashlib.blake2b(f"{self.source.stamp()} {self.steps}".encode(), digest_size=20).hexdigest()


def _usable(path: Path, frames: int, stride: int, fps: float | None) -> ClipFile:
    """A clip without its caption.

    Raises:
        BadClip: It is broken, too short, or its rate does not fit.
    """
    source = look(path)
    if fps is None:
        steps = [number * stride for number in range(frames)]
        how = f" at data.stride {stride}" if stride > 1 else ""
    elif source.rate is None:
        raise BadClip(f"clip '{path}' states no frame rate; set data.stride instead of data.fps")
    elif source.rate < fps:
        raise BadClip(f"clip '{path}' has {source.rate:g} frames per second, fewer than data.fps {fps:g}; lower that")
    else:
        steps = [round(number * source.rate / fps) for number in range(frames)]
        how = f" at data.fps {fps:g} of its {source.rate:g}"
    starts = source.count - steps[-1]
    if starts < 1:
        raise BadClip(
            f"clip '{path}' has {source.count} frame(s); data.frames {frames}{how} needs {steps[-1] + 1}: "
            "take fewer, or remove the clip"
        )
    return ClipFile(str(path), "", source.size, 0, starts, "", source, tuple(steps))
