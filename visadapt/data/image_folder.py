"""People's own images: one folder per class, in train/val/test folders or split by a ratio."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset

from visadapt.data.base import BaseData, Stage
from visadapt.data.images import SUFFIXES, UnreadableImage, find_images, read_rgb, unreadable

Sample = tuple[str, int]
_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}


class ImageFolder(BaseData):
    """Classification from folders: ``root/train/cat/1.jpg`` … or ``root/cat/1.jpg`` … with a split.

    If ``root`` holds a ``train`` folder, the splits are its folders (``train``, ``val``, ``test``; the last
    is optional). Otherwise every folder in ``root`` is a class, and ``split`` divides each class in the same
    ratio, by ``seed``.

    Args:
        root: Folder of the data.
        split: Shares of train, val and test where ``root`` has no ``train`` folder.
        shots: Training images per class, chosen by ``seed``; None takes all.
        images: Folder or files to predict on.
        verify: Open every image's header before training and name all broken files at once.
        batch_size: Samples per batch on each device.
        num_workers: Processes that load data ahead.
        seed: Source of the split, of the few shots and of the order.
        drop_last: Leave out the last, short training batch of an epoch.
    """

    def __init__(
        self,
        root: str,
        split: list[float] | None = None,
        shots: int | None = None,
        images: str | list[str] | None = None,
        verify: bool = True,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, drop_last=drop_last)
        self.root = Path(root).expanduser()
        self.shots, self.images, self.verify = shots, images, verify
        self.split = checked_split(split)
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.root: folder '{root}' does not exist")
        self._folders = split_folders(self.root)
        first = self._folders.get("train", self.root)
        self.class_names = _class_folders(first)
        for folder in self._folders.values():
            _same_classes(first, self.class_names, folder)
        self._samples: dict[str, list[Sample]] | None = None

    def setup(self, stage: str) -> None:
        """List the images of every split and check them."""
        if stage != "predict":
            self.samples()

    def dataset(self, stage: Stage) -> Dataset:
        """The labelled images of a split, or the images to predict on."""
        if stage == "predict":
            return PictureSet(self._to_predict(), self.preprocess(train=False))
        samples = self.samples().get(stage)
        if not samples:
            raise NotImplementedError(
                f"data: '{self.root}' has no {stage} images; make a '{stage}' folder with the same classes, "
                f"or put the class folders directly into the root and give 'split'"
            )
        return PictureSet(samples, self.preprocess(train=stage == "train"))

    def samples(self) -> dict[str, list[Sample]]:
        """Paths and labels of each split.

        Raises:
            ValueError: A class without images, too few images to split, or broken files (all are named).
        """
        if self._samples is None:
            if self._folders:
                found = {name: _list(folder, self.class_names) for name, folder in self._folders.items()}
            else:
                samples = _list(self.root, self.class_names)
                found = _stratified(samples, self.class_names, self.split, self.seed)
            if self.verify:
                _raise_if_broken([path for samples in found.values() for path, _ in samples])
            if self.shots is not None:
                found["train"] = _few(found["train"], self.class_names, self.shots, self.seed)
            self._samples = found
        return self._samples

    def _to_predict(self) -> list[Sample]:
        """The readable files of ``images``, else the test split; broken ones are reported and left out."""
        if self.images is None:
            return self.samples().get("test") or self.samples()["val"]
        paths = find_images(self.images)
        bad = unreadable(paths, decode=True)
        for message in bad.values():
            rank_zero_warn(f"left out: {message}")
        if len(bad) == len(paths):
            first = next(iter(bad.values()))
            raise ValueError(f"data.images: none of {len(paths)} files could be read; the first: {first}")
        return [(str(path), -1) for path in paths if path not in bad]


class PictureSet(Dataset):
    """Image files with labels; -1 stands for an unknown label.

    Args:
        samples: Paths and labels.
        transform: From a PIL image to the network's input; None gives the image itself.
    """

    def __init__(self, samples: Sequence[Sample], transform: Callable[[Any], Any] | None) -> None:
        self.samples, self.transform = list(samples), transform

    @property
    def labels(self) -> list[int]:
        """The label of each sample."""
        return [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        image = read_rgb(path)
        return (image if self.transform is None else self.transform(image)), label


def checked_split(split: list[float] | None) -> list[float]:
    """Three shares that sum to 1; by default 80 %, 10 % and 10 %."""
    ratio = [0.8, 0.1, 0.1] if split is None else list(split)
    if len(ratio) != 3 or min(ratio) < 0 or ratio[0] <= 0 or abs(sum(ratio) - 1) > 1e-6:
        raise ValueError(f"data.split: {ratio} must be three shares (train, val, test) that sum to 1")
    return ratio


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits by stage; empty if ``root`` has no training folder."""
    present = {entry.name.lower(): entry for entry in root.iterdir() if entry.is_dir()}
    named = {
        split: next(present[name] for name in names if name in present)
        for split, names in _FOLDERS.items()
        if present.keys() & set(names)
    }
    return named if "train" in named else {}


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] not in "._")
    if not names:
        raise ValueError(f"data: '{folder}' has no class folders; expected one folder of images per class")
    return names


def _same_classes(first: Path, expected: Sequence[str], folder: Path) -> None:
    names = set(_class_folders(folder))
    if missing := sorted(set(expected) - names):
        raise ValueError(f"data: classes {missing} of '{first}' are missing in '{folder}'")
    if extra := sorted(names - set(expected)):
        raise ValueError(f"data: classes {extra} of '{folder}' are missing in '{first}'")


def _list(folder: Path, class_names: Sequence[str]) -> list[Sample]:
    samples: list[Sample] = []
    for label, name in enumerate(class_names):
        paths = sorted(
            os.path.join(where, file)
            for where, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        )
        if not paths:
            raise ValueError(
                f"data: class folder '{folder / name}' has no images; known suffixes: {', '.join(SUFFIXES)}"
            )
        samples += [(path, label) for path in paths]
    return samples


def _by_class(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    groups: list[list[Sample]] = [[] for _ in range(count)]
    for sample in samples:
        groups[sample[1]].append(sample)
    return groups


def _stratified(
    samples: Sequence[Sample], class_names: Sequence[str], ratio: Sequence[float], seed: int
) -> dict[str, list[Sample]]:
    """Divide every class in the ratio; a share above 0 gets at least one image of each class."""
    generator = np.random.default_rng(seed)
    found: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    for name, group in zip(class_names, _by_class(samples, len(class_names)), strict=True):
        rest = [max(1, round(share * len(group))) if share else 0 for share in ratio[1:]]
        if sum(rest) >= len(group):
            raise ValueError(
                f"data: class '{name}' has {len(group)} image(s), too few for split {list(ratio)}; add images"
            )
        order = [group[i] for i in generator.permutation(len(group))]
        found["val"] += sorted(order[: rest[0]])
        found["test"] += sorted(order[rest[0] : sum(rest)])
        found["train"] += sorted(order[sum(rest) :])
    return found


def _few(samples: Sequence[Sample], class_names: Sequence[str], shots: int, seed: int) -> list[Sample]:
    generator = np.random.default_rng((seed, 1))
    chosen: list[Sample] = []
    for name, group in zip(class_names, _by_class(samples, len(class_names)), strict=True):
        if not 0 < shots <= len(group):
            raise ValueError(
                f"data.shots: {shots}, but class '{name}' has {len(group)} training images; lower data.shots, or set "
                "it to null to take all"
            )
        chosen += [group[i] for i in sorted(generator.choice(len(group), shots, replace=False))]
    return chosen


def _raise_if_broken(paths: Sequence[str]) -> None:
    broken = list(unreadable(paths, decode=False).values())
    if broken:
        more = f"\n  … and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UnreadableImage("\n  ".join(broken[:5]) + more)
