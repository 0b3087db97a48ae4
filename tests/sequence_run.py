"""A sequence of tasks on so many processes, for comparison with one.

python tests/sequence_run.py DIR --devices 2
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tasks.test_class_incremental import BlobData, Blobs, made, run, weights
from visadapt.data.task_sequence import TaskSequence


class Still(Blobs):
    """No noise but that of the sample's number: one process and two see the same."""

    def __getitem__(self, index):
        noise = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return 3 * torch.eye(8)[self.labels[index]] + 0.5 * noise, self.labels[index]


class StillData(BlobData):
    def dataset(self, stage):
        return Still(stage == "train")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = TaskSequence(StillData(), tasks=3, order_seed=None, batch_size=8 // args.devices)
    strategy = "ddp" if args.devices > 1 else "auto"
    task = run(args.folder, made(data=data), data, devices=args.devices, strategy=strategy)
    if task.global_rank == 0:
        torch.save({"weights": weights(task), "matrix": task.matrix, "sizes": task.sizes}, args.folder / "result.pt")


if __name__ == "__main__":
    main()
