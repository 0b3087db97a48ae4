"""A small text-to-image training on random weights, for tests of the task, of resume and of the report."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import lightning as L
import torch
from torch.utils.data import Dataset

import visadapt as va
from tests.tiny_diffusion import tiny_pipeline
from visadapt.backbones import StableDiffusion
from visadapt.callbacks.last_checkpoint import LastCheckpoint
from visadapt.data.base import BaseData
from visadapt.optim.schedule import Schedule
from visadapt.tasks.diffusion_options import Preview
from visadapt.tasks.text_to_image import TextToImage


@cache
def base(layout: str = "sd", **scheduler: Any) -> str:
    """Folder of a random pipeline, made once in a process."""
    return str(tiny_pipeline(Path(mkdtemp(prefix="tiny_diffusion_")), layout, **scheduler))


class Pictures(Dataset):
    """Fixed pictures, or their latents, with captions and sizes."""

    def __init__(self, count: int, latents: bool, extra: dict[str, Any] | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = (count, 4, 8, 8) if latents else (count, 3, 32, 32)
        self.key = "latents" if latents else "images"
        self.values = torch.rand(shape, generator=generator) * 2 - 1
        self.extra = extra or {}

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {self.key: self.values[index], "caption": f"no {index}", "sizes": torch.tensor([32, 32, 0, 0, 32, 32])}
        return sample | {key: make(index) for key, make in self.extra.items()}


class PictureData(BaseData):
    """Data module of them."""

    def __init__(
        self, size: int = 18, latents: bool = True, extra: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.size, self.latents, self.extra = size, latents, extra

    def dataset(self, stage: str) -> Pictures:
        return Pictures(self.size if stage == "train" else 3, self.latents, self.extra)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return batch_of(samples)


def batch_of(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch of the contract."""
    batch: dict[str, Any] = {"captions": [sample["caption"] for sample in samples]}
    for key in samples[0]:
        if key != "caption":
            batch[key] = torch.stack([torch.as_tensor(sample[key]) for sample in samples])
    return batch


def batch(count: int = 2, latents: bool = True, **extra: Any) -> dict[str, Any]:
    """A batch of the first pictures."""
    pictures = Pictures(count, latents)
    return batch_of([pictures[i] for i in range(count)]) | extra


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-3)


def task(layout: str = "sd", targets: Any = ("attn2.to_q", "attn2.to_v"), **kwargs: Any) -> TextToImage:
    """The task with a LoRA on few layers; ``backbone`` holds options of the backbone, ``name`` its folder."""
    name = kwargs.pop("name", None) or base(layout, **kwargs.pop("scheduler", {}))
    recipe = StableDiffusion(name, **kwargs.pop("backbone", {}))
    kwargs.setdefault("adapters", [va.Adaptation(va.LoRA(rank=2), list(targets))])
    kwargs.setdefault("optimizer", adamw)
    kwargs.setdefault("schedule", Schedule("constant", warmup=0.0))
    kwargs.setdefault("preview", Preview(seeds=[0], steps=2))
    L.seed_everything(5, verbose=False)  # random starts of adapters
    return TextToImage(recipe, **kwargs)


def train(
    folder: Path,
    *extra: Any,
    task: TextToImage,
    data: Any = None,
    resume: Any = None,
    every: int = 2,
    **trainer: Any,
) -> TextToImage:
    """Train two epochs of three batches; returns the task."""
    L.seed_everything(5, verbose=False)
    options = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False,
               "enable_model_summary": False, "num_sanity_val_steps": 0}  # fmt: skip
    callbacks = [LastCheckpoint(every_n_steps=every, dirpath=str(folder)), *extra]
    runner = L.Trainer(default_root_dir=folder, callbacks=callbacks, **{**options, **trainer})
    runner.fit(task, data or PictureData(6, batch_size=2), ckpt_path=resume)
    return task
