"""Clips on disk: videos (through PyAV), animated GIF and WebP, folders of frames; and which of them are broken."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageSequence

from visadapt.data.buckets import Size
from visadapt.data.images import SUFFIXES, UnreadableImage, as_rgb, header_size, read_rgb

VIDEOS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm")
ANIMATIONS = (".gif", ".webp")
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class BadClip(UnreadableImage):
    """A clip that cannot be used; the message names the file."""


@dataclass(frozen=True)
class Source:
    """A whole clip on disk.

    Attributes:
        path: A video, an animation or a folder of frames.
        count: Number of frames.
        size: Width and height.
        rate: Frames per second; None where nothing says.
    """

    path: Path
    count: int
    size: Size
    rate: float | None

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """Frames as RGB, by ascending positions; a video is decoded from its beginning to the last of them.

        Raises:
            BadClip: The file broke since it was looked at.
        """
        if self.path.is_dir():
            files = frame_files(self.path)
            return [read_rgb(files[index]) for index in indices]
        wanted, last = set(indices), indices[-1]
        found: dict[int, Image.Image] = {}
        for number, frame in enumerate(_decoded(self.path)):
            if number in wanted:
                found[number] = _picture(frame)
            if number == last:
                break
        if len(found) < len(wanted):
            raise BadClip(f"clip '{self.path}' ends before frame {last}; replace or delete it")
        return [found[index] for index in indices]

    def stamp(self) -> str:
        """A text that changes with the files: their names, sizes and dates."""
        files = frame_files(self.path) if self.path.is_dir() else [self.path]
        known = [(file.name, os.stat(file)) for file in files]
        return repr([str(self.path), *((name, status.st_size, status.st_mtime_ns) for name, status in known)])


def look(path: Path) -> Source:
    """Count the frames of a clip by decoding all of them, which shows that it is whole.

    Raises:
        BadClip: It is broken, or its frames differ in size; the message names the file.
        ImportError: It is a video, and PyAV is not installed.
    """
    if path.is_dir():
        sizes = [header_size(file) for file in frame_files(path)]
        if not sizes:
            raise BadClip(f"clip '{path}' holds no frames; name a video, an animation or a folder of pictures")
        if len(set(sizes)) > 1:
            odd = next(index for index, size in enumerate(sizes) if size != sizes[0])
            raise BadClip(
                f"clip '{path}': frame '{frame_files(path)[odd].name}' has {sizes[odd][0]} × {sizes[odd][1]} pixels, "
                f"the first {sizes[0][0]} × {sizes[0][1]}; a clip has one size"
            )
        return Source(path, len(sizes), sizes[0], None)
    count, size = 0, (0, 0)
    for frame in _decoded(path):
        sideways = _turn(frame) % 180 == 90
        count, size = count + 1, (frame.height, frame.width) if sideways else (frame.width, frame.height)
    if not count:
        raise BadClip(f"clip '{path}' has no frames; replace or delete it")
    return Source(path, count, size, _rate(path))


def find_clips(root: Path, files: Sequence[Path]) -> list[Path]:
    """Which of the files in a folder and below are clips: videos, animations, and folders of still pictures, sorted.

    Pictures beside videos or animations are no frames but thumbnails, and so are those in the root beside folders of
    clips: they are left out, with a warning.

    Raises:
        BadClip: There is nothing but frames that lie directly in the root.
    """
    found, stills = set(), []
    for file in files:
        suffix = file.suffix.lower()
        if suffix in VIDEOS or (suffix in ANIMATIONS and _animated(file)):
            found.add(file)
        elif suffix in SUFFIXES:
            stills.append(file)
    no_folders = {root, *(file.parent for file in found)}
    found |= {file.parent for file in stills if file.parent not in no_folders}
    left_out = [file for file in stills if file.parent in no_folders]
    if left_out and not found:
        raise BadClip(f"data.root: frames lie directly in '{root}'; put them into a folder of their own")
    if left_out:
        rank_zero_warn(
            f"data.root: {len(left_out)} picture(s) beside clips are left out, such as '{left_out[0]}'; "
            "frames belong into a folder of their own"
        )
    return sorted(found)


def frame_files(folder: Path) -> list[Path]:
    """The frames of a folder; numbers in their names count as numbers, so 10 comes after 9."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    return sorted(files, key=lambda path: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", path.name)])


def _animated(file: Path) -> bool:
    """Whether a GIF or WebP moves; a broken one may have."""
    try:
        with Image.open(file) as image:
            return bool(getattr(image, "is_animated", False))
    except _BROKEN:
        return True


def _decoded(path: Path) -> Iterator[Any]:
    """The frames of a video or an animation, one after the other, with ``width`` and ``height``."""
    if path.suffix.lower() in ANIMATIONS:
        try:
            with Image.open(path) as file:
                yield from ImageSequence.Iterator(file)
        except _BROKEN as error:
            raise BadClip(f"cannot read clip '{path}': {error}; replace or delete the file") from error
        return
    av = _av(path)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield from container.decode(stream)
    except (av.error.FFmpegError, IndexError, *_BROKEN) as error:
        reason = "it has no picture" if isinstance(error, IndexError) else error
        raise BadClip(f"cannot read clip '{path}': {reason}; replace or delete the file") from error


def _picture(frame: Any) -> Image.Image:
    """A decoded frame as RGB, upright."""
    if isinstance(frame, Image.Image):
        return as_rgb(frame)
    picture, turn = Image.fromarray(frame.to_ndarray(format="rgb24")), _turn(frame)
    return picture.rotate(turn, expand=True) if turn else picture


def _turn(frame: Any) -> int:
    """Degrees, counterclockwise, by which players turn a frame: telephones store portrait videos lying down."""
    return int(round(getattr(frame, "rotation", 0) / 90) * 90)


def _rate(path: Path) -> float | None:
    if path.suffix.lower() in ANIMATIONS:
        with Image.open(path) as file:
            file.load()  # WebP tells it with the first frame
            duration = file.info.get("duration")
        return 1000 / duration if duration else None
    with _av(path).open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    return float(rate) if rate else None


def _av(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"video '{path}' needs PyAV: pip install 'visadapt[video]' ({error})") from error
    return av
