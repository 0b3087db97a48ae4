"""One tiny training through the command line, shared by the tests that use what a run leaves."""

import os
import sys
from pathlib import Path

import lightning  # noqa: F401 - its log handler keeps the stderr of this moment; that of one test is closed after it
import pytest
import torch
import yaml

torch.set_num_threads(1)  # tiny models on a busy machine: threads that wait for each other take five times as long

TINY = {
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
    "model": {
        "class_path": "Classification",
        "init_args": {
            "backbone": {
                "class_path": "TimmViT",
                "init_args": {
                    "name": "vit_tiny_patch16_224",
                    "pretrained": False,
                    "img_size": 32,
                    "options": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
                },
            },
            "adapters": [
                {"method": {"class_path": "LoRA", "init_args": {"rank": 4}}, "targets": ["attn.qkv:q", "attn.proj"]}
            ],
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.003}},
        },
    },
    "data": {"class_path": "Digits", "init_args": {"domain": "inverted", "shots": 2, "batch_size": 10}},
}


def tiny() -> dict:
    """A configuration of seconds; a deep copy, to be changed."""
    return yaml.safe_load(yaml.safe_dump(TINY))


def write(path: Path, config: dict | str) -> str:
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return str(path)


@pytest.fixture(autouse=True)
def own_command_line(monkeypatch):
    """`main([...])` rewrites these as a process of its own would."""
    monkeypatch.setattr(sys, "argv", ["visadapt"])
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Folder of a finished run of the tiny configuration."""
    from visadapt.cli.main import main

    folder = tmp_path_factory.mktemp("run")
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    try:
        assert main(["fit", "--config", write(folder / "tiny.yaml", tiny())]) == 0
    finally:
        os.chdir(before)
        sys.argv = argv
    (made,) = (folder / "runs" / "tiny").iterdir()
    return made


@pytest.fixture
def pictures(here) -> Path:
    """A folder with digits in a subfolder too, a file that is no image, and one that is cut off."""
    from PIL import Image

    from visadapt.data.digits import Digits

    data = Digits(domain="inverted").dataset("test")
    folder = here / "pictures"
    (folder / "more").mkdir(parents=True)
    for i in range(5):
        image = Image.fromarray(data.images[i].permute(1, 2, 0).numpy())
        image.save(folder / ("more" if i > 2 else ".") / f"digit_{i}.png")
    whole = (folder / "digit_0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not an image")
    return folder
