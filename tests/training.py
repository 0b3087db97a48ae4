"""A small real training that draws on every random source; also a script, to be killed and resumed.

python tests/training.py DIR --workers 2 --kill-at 5 --save weights.pt
"""

import argparse
import os
import random
import signal
from pathlib import Path

import lightning as L
import numpy as np
import timm
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

import visadapt as va
from visadapt.callbacks.last_checkpoint import LastCheckpoint
from visadapt.data.base import BaseData
from visadapt.tasks.base import BaseTask

CLASSES = 5


class Noisy(Dataset):
    """Fixed images; augmented from the torch, numpy and Python generators."""

    def __init__(self, size, train):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(size, 3, 16, 16, generator=generator)
        self.labels = torch.randint(0, CLASSES, (size,), generator=generator)
        self.train = train

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        if self.train:
            image = image * (0.9 + 0.2 * random.random()) + 0.1 * torch.randn(3, 16, 16) + 0.1 * np.random.randn()
        return image, self.labels[index]


class NoisyData(BaseData):
    class_names = tuple("abcde")

    def __init__(self, size=36, **kwargs):
        super().__init__(**kwargs)
        self.size = size

    def dataset(self, stage):
        return Noisy(self.size if stage == "train" else 13, stage == "train")


class TinyTask(BaseTask):
    """LoRA on a tiny ViT, with dropout in the model and in the adapter, and mixup."""

    def __init__(self, dropout: float = 0.1, adapters: list[va.Adaptation] | None = None, **kwargs):
        if adapters is None:
            adapters = [va.Adaptation(va.LoRA(rank=2, dropout=dropout), ["attn.qkv:q", "attn.qkv:v", "mlp.fc1"])]
        kwargs.setdefault("optimizer", optimizer)
        super().__init__(adapters=adapters, **kwargs)
        self.dropout = dropout
        self.mix = v2.MixUp(num_classes=CLASSES) if dropout else None
        self.losses = []

    def build(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return timm.create_model(
                "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2,
                num_classes=CLASSES, proj_drop_rate=self.dropout,
            )  # fmt: skip

    def thaw(self, model):
        model.head.requires_grad_(True)

    def criterion(self, output, target):
        return torch.nn.functional.cross_entropy(output, target)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(self.mix(*batch) if self.mix else batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        torch.rand(3)  # a validation that draws must not disturb the training
        super().validation_step(batch, batch_idx)


def optimizer(params):
    return torch.optim.AdamW(params, lr=3e-3)


class KillAt(L.Callback):
    """Ends the process without warning (SIGKILL, which nothing can catch), or as another signal."""

    def __init__(self, batches, number=signal.SIGKILL, rank=None):
        self.batches, self.number, self.rank = batches, number, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        seen = trainer.fit_loop.total_batch_idx
        if seen == self.batches and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.number)


class Crash(BaseException):
    """Not an Exception: nothing on the way may swallow it."""


class CrashAt(L.Callback):
    """The same within one process, for many cases in little time."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batches:
            raise Crash


def train(folder, *extra, workers=0, resume=None, task=None, data=None, every=2, **trainer):
    """Train two epochs of nine batches; returns the task."""
    L.seed_everything(5, verbose=False)
    options = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False,
               "enable_model_summary": False, "gradient_clip_val": 0.5, "num_sanity_val_steps": 1}  # fmt: skip
    task = task if task is not None else TinyTask()
    callbacks = [LastCheckpoint(every_n_steps=every, dirpath=str(folder)), *extra]
    runner = L.Trainer(default_root_dir=folder, callbacks=callbacks, **{**options, **trainer})
    runner.fit(task, data or NoisyData(batch_size=4, num_workers=workers), ckpt_path=resume)
    return task


def weights(task):
    """Copies of all tensors of the model."""
    return {name: tensor.detach().clone() for name, tensor in task.model.state_dict().items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--signal", type=int, default=signal.SIGKILL)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--ema", type=float)
    args = parser.parse_args()
    torch.set_num_threads(1)
    extra = [] if args.kill_at is None else [KillAt(args.kill_at, args.signal, args.rank)]
    strategy = "ddp" if args.devices > 1 else "auto"
    task = train(args.folder, *extra, workers=args.workers, resume=args.resume, devices=args.devices,
                 strategy=strategy, task=TinyTask(ema_decay=args.ema))  # fmt: skip
    if args.save is not None and task.global_rank == 0:
        torch.save(weights(task), args.save)


if __name__ == "__main__":
    main()
