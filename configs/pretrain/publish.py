"""Turn a finished pre-training run into a shipped checkpoint: fp16 safetensors and its recipe as JSON.

    python configs/pretrain/publish.py RUN_DIR visadapt/backbones/tiny/NAME.safetensors

The accuracy in the recipe is measured here, on the file as it was written, not copied from the run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from visadapt.backbones import TimmViT
from visadapt.data.digit_domains import DOMAINS
from visadapt.data.digits import Digits


def newest_checkpoint(run: Path) -> Path:
    """The last checkpoint of a run directory."""
    found = sorted(run.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"no checkpoint in '{run}'; was it a finished `visadapt fit`?")
    return found[-1]


def commit() -> str:
    """The commit of the code, with a mark if what makes the checkpoint differs from it."""
    sources = ["visadapt/backbones/*.py", "visadapt/data", "visadapt/tasks", "visadapt/optim", "configs/pretrain"]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *sources]).returncode
    return head.stdout.strip() + ("-dirty" if changed else "")


@torch.no_grad()
def accuracy(backbone: TimmViT, domain: str) -> float:
    """Share of the 500 test digits that the checkpoint reads in a domain."""
    data = Digits(domain, source_domain=None, batch_size=100)
    data.transform = backbone.preprocess(train=False)
    model = backbone.build().eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data.test_dataloader())
    return right / len(data.dataset("test"))


def main() -> None:
    """Write NAME.safetensors and NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()

    state = torch.load(newest_checkpoint(options.run), map_location="cpu", weights_only=True)
    init: dict[str, Any] = state["hyper_parameters"]["backbone"]["init_args"]
    tensors = {k.removeprefix("model."): v.half().contiguous() for k, v in state["state_dict"].items()}
    temporary = options.output.with_suffix(".tmp")
    temporary.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file's permissions are 0600
    os.replace(temporary, options.output)
    recipe: dict[str, Any] = {
        "architecture": init["name"],
        "options": {"img_size": init["img_size"], **(init["options"] or {})},
        "transforms": init["transforms"],
        "class_names": Digits().class_names,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "data": "scikit-learn digits 0 to 1,096 in the domain 'upright'; accuracy on digits 1,297 to 1,796",
        "config": "configs/pretrain/tiny_vit_digits.yaml",
        "commit": commit(),
        "torch": torch.__version__,
        "steps": state["global_step"],
    }
    described = options.output.with_suffix(".json")
    described.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    backbone = TimmViT(options.output.stem, checkpoint=str(options.output))
    recipe["test_accuracy"] = {domain: accuracy(backbone, domain) for domain in DOMAINS}
    described.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(recipe["test_accuracy"]), f"{options.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
