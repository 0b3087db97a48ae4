"""A text-to-video training on two processes, or on one that computes what both would.

python tests/video_processes.py DIR BASE --devices 2 --case "dual"
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import visadapt as va
from tests.diffusion_training import train
from tests.video_training import SPATIAL, TEMPORAL, ClipsData, task
from visadapt.data.loader import mixed_seed
from visadapt.tasks.diffusion_options import Paths
from visadapt.tasks.text_to_video import TextToVideo

# options of the task, and the method
CASES = {
    "dual": ({}, lambda: va.LoRA(rank=2)),
    "dual, penalty": ({}, lambda: va.NonCollisionLoRA(rank=2, tasks=1, sparsity=1e-2)),
    "a set per clip, checkpointing": (
        {"clips": 4, "backbone": {"grad_checkpointing": True}}, lambda: va.LoRA(rank=2),
    ),
}  # fmt: skip


class OfBoth(TextToVideo):
    """A step of one process: every second sample with the chance of one process, the others with that of the other."""

    def generator(self, batch_idx):
        self.number = batch_idx
        return super().generator(batch_idx)

    def _losses(self, batch, latents, generator, skipped):
        for rank in range(2):
            seed = mixed_seed(self.seed, self.current_epoch, self.number, rank)
            share = {key: value[rank::2] for key, value in batch.items()}
            for one in super()._losses(share, latents[rank::2], torch.Generator().manual_seed(seed), skipped):
                yield replace(one, loss=one.loss / 2)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("base")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--case", default="dual")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options, method = CASES[args.case]
    adapters = [va.Adaptation(method(), SPATIAL, "spatial"), va.Adaptation(method(), TEMPORAL, "temporal")]
    made = task(name=args.base, adapters=adapters, paths=Paths("dual", skip=0.5), **options)
    if args.devices == 1:
        made.__class__ = OfBoth
    strategy = "ddp" if args.devices > 1 else "auto"
    data = ClipsData(size=4, batch_size=2 // args.devices)
    train(args.folder, task=made, data=data, max_epochs=4, devices=args.devices, strategy=strategy)
    torch.save(
        {name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad},
        args.folder / f"weights_{made.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
