"""Losses of a small training under DDP or FSDP2, for comparison with one process.

python tests/distributed_run.py DIR --strategy fsdp2 --devices 2 [--resume FILE]
"""

import argparse
import json
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
import visadapt as va
from tests.training import KillAt, NoisyData, TinyTask, train

METHODS = {
    "lora": lambda: va.LoRA(rank=2),
    "dora": lambda: va.DoRA(rank=2),
    "hydra": lambda: va.Hydra(),
    "salt": lambda: va.SALT(),
    "dv lora": lambda: va.DVLoRA(rank=2, warmup=3),
}


def strategy(name):
    """By name; DDP also with gradients as views of its buckets."""
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    if name == "ddp views":
        return DDPStrategy(gradient_as_bucket_view=True)
    return name


class Quiet(NoisyData):
    """No augmentation: one process and two see the same samples."""

    def dataset(self, stage):
        dataset = super().dataset(stage)
        dataset.train = False
        return dataset


class Norm(L.Callback):
    """A weight of the end, whole."""

    def on_train_end(self, trainer, pl_module):
        self.norms = {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().norm().item()
            for name, p in pl_module.named_parameters()
            if p.requires_grad
        }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--ema", type=float)
    args = parser.parse_args()
    torch.set_num_threads(1)
    adaptation = va.Adaptation(METHODS[args.method](), ["attn.qkv", "mlp.fc1"])
    task = TinyTask(dropout=0.0, adapters=[adaptation], ema_decay=args.ema)
    norm = Norm()
    extra = [] if args.kill_at is None else [KillAt(args.kill_at)]
    train(
        args.folder, norm, *extra, task=task, data=Quiet(size=32, batch_size=8 // args.devices, seed=1),
        strategy=strategy(args.strategy), devices=args.devices, max_epochs=2, resume=args.resume,
        limit_train_batches=4,
    )  # fmt: skip
    losses = torch.tensor(task.losses)
    if args.devices > 1:
        torch.distributed.all_reduce(losses)
        losses /= args.devices
    if task.global_rank == 0:
        found = {
            "losses": losses.tolist(),
            "norms": norm.norms,
            "val": task.trainer.callback_metrics["val/loss"].item(),
        }
        (args.folder / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
