"""A small text-to-video training on random weights, for tests of the task, of resume and of the report."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.utils.data import Dataset

import visadapt as va
from tests.diffusion_training import adamw
from tests.tiny_video import FRAMES, video_base
from visadapt.backbones.video_diffusion import VideoDiffusion
from visadapt.data.base import BaseData
from visadapt.optim.schedule import Schedule
from visadapt.tasks.diffusion_options import ClipPreview
from visadapt.tasks.text_to_video import TextToVideo

SPATIAL, TEMPORAL = [r"re:.*\.attentions\..*attn1\.to_[qv]"], [r"re:.*motion_modules.*attn1\.to_[qv]"]


class Clips(Dataset):
    """Fixed clips, or their latents, with captions."""

    def __init__(self, count: int, latents: bool, frames: int = FRAMES) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = (count, frames, 4, 8, 8) if latents else (count, frames, 3, 32, 32)
        self.key = "latents" if latents else "videos"
        self.values = torch.rand(shape, generator=generator) * 2 - 1

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, Any]:
        said = {"caption": f"no {index} goes", "frame_caption": f"no {index}"}
        return {self.key: self.values[index], "clip": torch.tensor(index), **said}


class ClipsData(BaseData):
    """Data module of them."""

    def __init__(self, size: int = 6, latents: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size, self.latents = size, latents

    def dataset(self, stage: str) -> Clips:
        return Clips(self.size if stage == "train" else 3, self.latents)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return batch_of(samples)


def batch_of(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch of the contract."""
    batch: dict[str, Any] = {f"{key}s": [one[key] for one in samples] for key in ("caption", "frame_caption")}
    tensors = [key for key in samples[0] if not key.endswith("caption")]
    return batch | {key: torch.stack([one[key] for one in samples]) for key in tensors}


def batch(count: int = 2, latents: bool = True, frames: int = FRAMES, **extra: Any) -> dict[str, Any]:
    """A batch of the first clips."""
    clips = Clips(count, latents, frames)
    return batch_of([clips[i] for i in range(count)]) | extra


def sets(*names: str) -> list[va.Adaptation]:
    """A LoRA of rank 2 for each name, spatial or temporal."""
    targets = {"spatial": SPATIAL, "temporal": TEMPORAL}
    return [va.Adaptation(va.LoRA(rank=2), targets[name], name) for name in names]


def task(**kwargs: Any) -> TextToVideo:
    """The task with both sets on few layers; ``backbone`` holds options of the backbone, ``name`` its folder."""
    recipe = VideoDiffusion(kwargs.pop("name", None) or video_base(), **kwargs.pop("backbone", {}))
    kwargs.setdefault("adapters", sets("spatial", "temporal"))
    kwargs.setdefault("optimizer", adamw)
    kwargs.setdefault("schedule", Schedule("constant", warmup=0.0))
    kwargs.setdefault("preview", ClipPreview(steps=1, frames=FRAMES))
    L.seed_everything(5, verbose=False)  # random starts of adapters
    return TextToVideo(recipe, **kwargs)
