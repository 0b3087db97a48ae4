"""People's own captioned pictures: a subject, a style or a domain to adapt to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from visadapt.data.base import Stage
from visadapt.data.buckets import Buckets, Size
from visadapt.data.captioned import Captioned, PictureFile
from visadapt.data.captioned_data import PLAIN, CaptionedData
from visadapt.data.captions import BadCaption, CaptionedFile, Captions, find_captions
from visadapt.data.class_images import ClassImages
from visadapt.data.image_folder import split_folders
from visadapt.data.images import SUFFIXES, UnreadableImage, header_size
from visadapt.data.masks import in_parallel, raise_all


class TextImages(CaptionedData):
    """Text-to-image from a folder of pictures with captions; for layouts see `visadapt.data.captions.find_captions`.

    ``root`` may hold ``train`` and ``val`` folders. Without them, ``val_root`` or ``val_size``, the training pictures
    serve as validation, too: the loss then says how well they are learned, not how well it generalises.

    Prior preservation: with ``class_prompt``, an epoch has as many pictures of the class as of the subject (the fewer
    are repeated), marked ``prior``. The task generates those that ``class_root`` lacks.

    Args:
        root: Folder of the pictures.
        resolution: Side in pixels of a square with the area that training pictures have.
        instance_prompt: The caption of every picture, for folders without captions.
        caption_column: Column of the captions in metadata.jsonl or metadata.csv.
        captions: Prefix and shuffled tags.
        repeats: How often an epoch shows each picture, times what folder names such as ``10_sks dog`` say.
        buckets: Keep aspect ratios; false makes squares.
        bucket_step: Sides are multiples of it: 64 for Stable Diffusion, 8 for ``tiny_sd``.
        upscale: Enlarge smaller pictures; false is kohya's ``bucket_no_upscale``.
        flip: Mirror half of the training pictures.
        random_crop: Cut training pictures anywhere instead of in the middle.
        masks: Folder of grey pictures of the same names: white counts in the loss, black does not.
        class_root: Folder of pictures of the class.
        class_prompt: What they show; switches prior preservation on.
        class_images: Wanted number of them; 0 takes those that are there.
        val_root: Folder of validation pictures, laid out as ``root``.
        val_size: Pictures of ``root`` kept for validation, by ``seed``.
        cache: Folder for latents and text encodings, see `CaptionedData`.
        cache_gib: Size of that folder.
        batch_size: Samples per batch on each device.
        num_workers: Processes that load data ahead.
        seed: Source of the split, of the order and of the augmentation.
        drop_last: Leave out the last, short training batch of each size in an epoch.
    """

    def __init__(
        self,
        root: str,
        resolution: int = 512,
        instance_prompt: str | None = None,
        caption_column: str = "text",
        captions: Captions = PLAIN,
        repeats: int = 1,
        buckets: bool = True,
        bucket_step: int = 64,
        upscale: bool = True,
        flip: bool = False,
        random_crop: bool = False,
        masks: str | None = None,
        class_root: str | None = None,
        class_prompt: str | None = None,
        class_images: int = 0,
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
        super().__init__(sizes, flip, random_crop, captions, cache, cache_gib, batch_size, num_workers, seed, drop_last)
        if repeats < 1 or val_size < 0:
            key, value = ("repeats", repeats) if repeats < 1 else ("val_size", val_size)
            raise ValueError(f"data.{key}: {value} is too small")
        if (class_root is None) != (class_prompt is None):
            raise ValueError("data.class_root and data.class_prompt belong together: give both or neither")
        self.root, self.train_root, self.val_root = folders_of(root, val_root, val_size, "pictures")
        self.instance_prompt, self.caption_column = instance_prompt, caption_column
        self.repeats, self.val_size = repeats, val_size
        self.masks = None if masks is None else existing_folder(masks, "masks")
        self.class_images = ClassImages(class_root, class_prompt or "", class_images) if class_root else None
        self._found: dict[Path, list[tuple[PictureFile, int]]] = {}

    def setup(self, stage: str) -> None:
        """Find the pictures, their captions and masks, and name all that is wrong with them."""
        for root in {self.train_root, self.val_root or self.train_root}:
            self._files(root)

    def pictures(self, stage: Stage) -> Sequence[Captioned]:
        """The pictures of a stage; "test" is the validation."""
        if self.val_root is not None and stage != "train":
            return _once(self._files(self.val_root))
        train, val = self._split(self._files(self.train_root))
        if stage != "train":
            return _once(val or train)
        shown: list[Captioned] = [picture for picture, repeats in train for _ in range(repeats * self.repeats)]
        return shown if self.class_images is None else _balanced(shown, self._class_pictures(self.class_images))

    def _files(self, root: Path) -> list[tuple[PictureFile, int]]:
        """Pictures of a folder with their repeats."""
        if root not in self._found:
            others = [self.masks, self.class_images.root if self.class_images else None]
            files = find_captions(
                root, self.instance_prompt, self.caption_column, [path for path in others if path is not None]
            )
            sizes = _sizes([file.path for file in files], root)
            masks = {} if self.masks is None else _masks_of(files, root, self.masks)
            self._found[root] = [
                (PictureFile(str(f.path), f.caption, sizes[f.path], False, f.path, masks.get(f.path)), f.repeats)
                for f in files
            ]
        return self._found[root]

    def _split(
        self, files: list[tuple[PictureFile, int]]
    ) -> tuple[list[tuple[PictureFile, int]], list[tuple[PictureFile, int]]]:
        """Training and validation; all captions of a picture go to the same part."""
        held = held_out({picture.path for picture, _ in files}, self.val_size, self.seed, self.train_root)
        return [f for f in files if f[0].path not in held], [f for f in files if f[0].path in held]

    def _class_pictures(self, images: ClassImages) -> list[Captioned]:
        paths = images.paths()
        if not paths or images.missing():
            wanted = f" of the {images.count} that data.class_images wants" if images.count else ""
            raise ValueError(
                f"data.class_root: '{images.root}' has {len(paths)} picture(s){wanted}, and the task generated none; "
                "add some"
            )
        sizes = _sizes(paths, images.root)
        return [PictureFile(str(path), images.prompt, sizes[path], True, path) for path in paths]


def existing_folder(path: str, key: str) -> Path:
    """The folder of an option.

    Raises:
        FileNotFoundError: There is none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data.{key}: folder '{path}' does not exist")
    return folder


def folders_of(root: str, val_root: str | None, val_size: int, what: str) -> tuple[Path, Path, Path | None]:
    """A folder, the part of it that trains, and where validation has its own, that folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Validation is told twice where to come from.
    """
    whole = existing_folder(root, "root")
    parts = split_folders(whole)
    held = parts.get("val") if val_root is None else existing_folder(val_root, "val_root")
    if held is not None and val_size:
        raise ValueError(f"data.val_size: validation {what} come from '{held}' already; set it to 0")
    return whole, parts.get("train", whole), held


def held_out(paths: Collection[Path], count: int, seed: int, root: Path, what: str = "pictures") -> set[Path]:
    """So many paths, kept for validation by a seed.

    Raises:
        ValueError: Nothing would be left to train on.
    """
    if count >= len(paths):
        raise ValueError(f"data.val_size: {count}, but '{root}' has {len(paths)} {what}")
    order = np.random.default_rng((seed, 3)).permutation(len(paths))
    ordered = sorted(paths)
    return {ordered[i] for i in order[:count]}


def _sizes(paths: Sequence[Path], root: Path) -> dict[Path, Size]:
    """Width and height of every picture, by the headers."""
    sizes, problems = in_parallel(sorted(set(paths)), header_size)
    raise_all(problems, root, UnreadableImage)
    return sizes


def _once(files: Sequence[tuple[PictureFile, int]]) -> list[Captioned]:
    return [picture for picture, _ in files]


def _balanced(subject: list[Captioned], prior: list[Captioned]) -> list[Captioned]:
    """Equally many of both, as many as the longer list has."""
    count = max(len(subject), len(prior))
    return [pictures[i % len(pictures)] for pictures in (subject, prior) for i in range(count)]


def _masks_of(files: Sequence[CaptionedFile], root: Path, masks: Path) -> dict[Path, Path]:
    """The mask of each picture, by its path in the folder without the suffix."""
    known = {
        path.relative_to(masks).with_suffix(""): path
        for path in sorted(masks.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    }
    wanted = {file.path: file.path.relative_to(root).with_suffix("") for file in files}
    raise_all(
        [f"picture '{path}' has no mask '{masks / stem}.*'" for path, stem in wanted.items() if stem not in known],
        masks,
        BadCaption,
    )
    return {path: known[stem] for path, stem in wanted.items()}
