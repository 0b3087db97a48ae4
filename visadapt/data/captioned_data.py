"""The base of data modules for text-to-image: buckets, captions, and encodings that are kept on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from visadapt.data.base import BaseData, Stage
from visadapt.data.buckets import Buckets
from visadapt.data.captioned import Captioned, CaptionedSet, Find
from visadapt.data.captions import Captions, warn_of_long

PLAIN = Captions()


class Known(Protocol):
    """Latents on disk, as worker processes look them up."""

    def latents(self, key: str) -> Tensor | None:
        """The latents (C, h, w) under a key; None if they are not known."""


class Encodings(Protocol):
    """What a task gives out by ``encoding_cache(folder, max_bytes)``: see `visadapt.backbones.encoding_cache`."""

    images: Any  # a `Known`

    def latents(self, key: str, image: Tensor) -> Tensor:
        """Encode an image (3, H, W) in [-1, 1] and keep the latents (C, h, w) under a key."""

    def text(self, captions: Sequence[str], device: torch.device | str) -> Mapping[str, Tensor] | None:
        """What the text encoders make of captions, (B, …) each; None if they are not kept."""


class CaptionedData(BaseData):
    """Base of the data modules with captions. A subclass states ``pictures(stage)``.

    A batch is a dict: ``images`` float (B, 3, H, W) in [-1, 1]; ``captions``, a list; ``sizes`` long (B, 6), which
    are original height and width, crop top and left, target height and width; where the data has them ``masks``
    float (B, 1, H, W) in [0, 1] and ``prior`` bool (B,). All pictures of a batch have one size.

    With ``cache``, a batch has ``latents`` (B, C, h, w) instead of ``images``, and ``text``, a dict of the text
    encoders' outputs, unless captions are shuffled or the task trains a text encoder. What is not on disk yet is
    computed when it is needed and kept; a damaged file counts as missing. Order, flips and captions are those of a
    run without a cache.

    Args:
        buckets: The sizes that pictures are brought to.
        flip: Mirror half of the training pictures.
        random_crop: Cut training pictures anywhere instead of in the middle.
        captions: What is done to captions.
        cache: Folder for latents and text encodings; None computes them in every step.
        cache_gib: Size of that folder.
        batch_size: Samples per batch on each device.
        num_workers: Processes that load data ahead.
        seed: Source of the order and of flips, crops and shuffled tags.
        drop_last: Leave out the last, short training batch of each size in an epoch.
    """

    def __init__(
        self,
        buckets: Buckets,
        flip: bool = False,
        random_crop: bool = False,
        captions: Captions = PLAIN,
        cache: str | None = None,
        cache_gib: float = 16.0,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, drop_last=drop_last)
        if cache is not None and random_crop:
            raise ValueError(
                "data.cache: random crops are never seen twice, so there is nothing to keep; "
                "set data.random_crop: false or data.cache: null"
            )
        self.buckets, self.flip, self.random_crop, self.captions = buckets, flip, random_crop, captions
        self.cache = None if cache is None else Path(cache).expanduser()
        self.cache_gib = cache_gib
        self._encodings: tuple[object, Encodings] | None = None

    def pictures(self, stage: Stage) -> Sequence[Captioned]:
        """What an epoch of a stage shows.

        Raises:
            NotImplementedError: There is nothing for this stage.
        """
        raise NotImplementedError(f"{type(self).__name__} has no data for the stage '{stage}'")

    def dataset(self, stage: Stage) -> Dataset:
        """The samples of a stage; flips, random crops and shuffled tags in training only.

        Raises:
            NotImplementedError: The stage is "predict": a prompt is no picture.
        """
        if stage == "predict":
            raise NotImplementedError("predict renders prompts: visadapt predict --adapter FILE --prompts TEXT …")
        pictures = self.pictures(stage)
        self.warn([(picture.name, picture.caption) for picture in pictures])
        training = stage == "train"
        return CaptionedSet(
            pictures, self.buckets, self.captions, self.flip, self.random_crop, training, self.known_latents()
        )

    def warn(self, captions: Sequence[tuple[str, str]]) -> None:
        """Say which captions the task's tokenizers cut; pairs of the picture's name and its caption."""
        named = sorted({(name, self.captions(caption, False)) for name, caption in captions})
        warn_of_long(named, None if self.trainer is None else getattr(self.trainer.lightning_module, "model", None))

    def known_latents(self) -> Find | None:
        """What finds latents on disk by their key; None without a cache."""
        encodings = self.encodings()
        return None if encodings is None else encodings.images.latents

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Join samples to a batch; see the class. Where latents are missing, ``encoded`` has to complete it."""
        batch: dict[str, Any] = {
            "captions": [sample["caption"] for sample in samples],
            "sizes": torch.stack([sample["sizes"] for sample in samples]),
        }
        if "prior" in samples[0]:
            batch["prior"] = torch.tensor([sample["prior"] for sample in samples])
        if any("mask" in sample for sample in samples):
            height, width = batch["sizes"][0, 4:].tolist()
            batch["masks"] = torch.stack([sample.get("mask", torch.ones(1, height, width)) for sample in samples])
        if all("latents" in sample for sample in samples):
            batch["latents"] = torch.stack([sample["latents"] for sample in samples])
        elif any("latents" in sample or "key" in sample for sample in samples):
            batch["partly"] = [(s.get("key"), s["latents"] if "latents" in s else s["image"]) for s in samples]
        else:
            batch["images"] = torch.stack([sample["image"] for sample in samples])
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Where Lightning has moved a batch to the device, complete it."""
        return self.encoded(batch) if isinstance(batch, dict) and "captions" in batch else batch

    def encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Put latents and text of the cache into a batch; without a cache the batch as it is."""
        encodings = self.encodings()
        if encodings is None:
            return batch
        batch = dict(batch)
        if (parts := batch.pop("partly", None)) is not None:
            rows = [value if key is None else encodings.latents(key, value) for key, value in parts]
            batch["latents"] = torch.stack(rows)
        if not self.captions.shuffle:
            text = encodings.text(batch["captions"], batch["sizes"].device)
            batch |= {} if text is None else {"text": dict(text)}
        return batch

    def encodings(self) -> Encodings | None:
        """The task's encoders with the cache; None without ``cache`` or outside a Trainer.

        Raises:
            ValueError: The task offers none.
        """
        if self.cache is None or self.trainer is None:
            return None
        task = self.trainer.lightning_module
        if self._encodings is None or self._encodings[0] is not task:
            offer = getattr(task, "encoding_cache", None)
            if offer is None:
                raise ValueError(f"data.cache: {type(task).__name__} has no encoders to cache for; remove data.cache")
            self._encodings = task, offer(self.cache, int(self.cache_gib * 2**30))
        return self._encodings[1]
