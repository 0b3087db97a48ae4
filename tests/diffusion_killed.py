"""Text-to-image runs on a folder of pictures, to be killed and resumed.

python tests/diffusion_killed.py DIR CASE … kills a run of each case by SIGKILL; their folders stay.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import visadapt as va
from tests.diffusion_training import task, train
from tests.training import KillAt
from visadapt.backbones.sd_tokens import NewToken
from visadapt.data.text_images import TextImages
from visadapt.tasks.diffusion_options import Noise

KILL_AT = 5  # batches; the last checkpoint is one batch older
CASES = ("plain", "plain, cached", "everything", "everything, cached")


def pictures(folder: Path) -> Path:
    """Six pictures of three shapes with captions, made once."""
    root = folder / "pictures"
    if not root.is_dir():
        root.mkdir(parents=True)
        for number, (height, width) in enumerate([(48, 32), (32, 48), (40, 40)] * 2):
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{number}.png")
            (root / f"{number}.txt").write_text(f"<x> no {number}")
    return root


def run(folder: Path, base: str, case: str, *callbacks, resume: Path | None = None) -> Path:
    """Train two epochs of a case in a folder; returns the adapter file."""
    kind, _, cached = case.partition(", ")
    options, data = {}, {"cache": str(folder / "cache")} if cached else {}
    if kind == "everything":  # averages, dropped captions, new words, class pictures, flips
        options = {"ema_decay": 0.9, "caption_dropout": 0.3, "tokens": [NewToken("<x>", "no")]}
        data |= {"flip": True, "class_prompt": "a no", "class_root": str(folder / "class"), "class_images": 3}
        (folder / "class").mkdir(parents=True, exist_ok=True)
    adapters = [va.Adaptation(va.LoRA(rank=2, dropout=0.1), ["unet.cross", "unet.convs"])]
    made = task(name=base, adapters=adapters, noise=Noise(offset=0.1), **options)
    images = TextImages(str(pictures(folder.parent)), 32, bucket_step=8, batch_size=2, seed=1, **data)
    train(folder, *callbacks, task=made, data=images, resume=resume)
    return va.save(made.model, folder / "adapter.safetensors", extra=made.adapter_metadata())


def kill_all(run: Callable[..., Path]) -> None:
    """``run`` the cases of the command line in a process each: importing diffusers takes longer than their training."""
    torch.set_num_threads(1)
    folder, base, *cases = sys.argv[1:]
    for case in cases:
        process = os.fork()
        if process == 0:
            try:
                run(Path(folder) / case, base, case, KillAt(KILL_AT))
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), f"{case}: left by itself"
        assert os.WTERMSIG(status) == signal.SIGKILL, case


if __name__ == "__main__":
    kill_all(run)
