"""The base of data modules for text-to-video: batches of clips, whose encodings may be kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from visadapt.data.base import Stage
from visadapt.data.captioned_data import CaptionedData
from visadapt.data.clips import Clip, ClipSet


class ClipData(CaptionedData):
    """Base of the data modules with clips. A subclass states ``clips(stage)``.

    A batch is a dict: ``videos`` float (B, F, 3, H, W) in [-1, 1]; ``captions`` and ``frame_captions``, lists: what
    the clips show, and what single frames of them show; ``clip`` long (B,), the number of the source; ``sizes`` long
    (B, 6) as for pictures. All frames of a batch have one size.

    With ``cache``, a batch has ``latents`` (B, F, C, h, w) instead of ``videos``, and ``text`` and ``frame_text``
    besides; the rest is as in `CaptionedData`, whose arguments these are.
    """

    def clips(self, stage: Stage) -> Sequence[Clip]:
        """What an epoch of a stage shows.

        Raises:
            NotImplementedError: There is nothing for this stage.
        """
        raise NotImplementedError(f"{type(self).__name__} has no data for the stage '{stage}'")

    def dataset(self, stage: Stage) -> ClipSet:
        """The samples of a stage; flips and random starts in training only.

        Raises:
            NotImplementedError: The stage is "predict": a prompt is no clip.
        """
        if stage == "predict":
            raise NotImplementedError("predict renders prompts: visadapt predict --adapter FILE --prompts TEXT …")
        clips = self.clips(stage)
        self.warn([(clip.name, clip.caption) for clip in clips])
        return ClipSet(clips, self.buckets, self.captions, self.flip, stage == "train", self.known_latents())

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Join samples to a batch; see the class. Where latents are missing, ``encoded`` has to complete it."""
        batch = super().collate([{"image" if k == "video" else k: v for k, v in one.items()} for one in samples])
        if "images" in batch:
            batch["videos"] = batch.pop("images")
        batch["clip"] = torch.tensor([sample["clip"] for sample in samples])
        return batch | {"frame_captions": [sample["frame_caption"] for sample in samples]}

    def encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Put latents and text of the cache into a batch, also that of single frames."""
        batch, encodings = super().encoded(batch), self.encodings()
        if encodings is None or "text" not in batch:
            return batch
        return batch | {"frame_text": encodings.text(batch["frame_captions"], batch["sizes"].device)}
