"""Every file in configs/ trains: one real batch through the command line, with a small network."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from visadapt.cli.main import main

CONFIGS = Path(__file__).parents[1] / "configs"
QUICK = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
SMALL = [
    "--model.backbone.name=vit_tiny_patch16_224",
    "--model.backbone.pretrained=false",
    "--model.backbone.img_size=32",
    '--model.backbone.options={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}',
    "--data.num_workers=0",
    "--data.batch_size=8",
]
FOLDER = CONFIGS / "classification" / "vit_b16_lora_folder.yaml"
STACKED = {"vit_b16_probe_folder.yaml", "vit_b16_full_folder.yaml"}


@pytest.fixture
def images(tmp_path):
    for name, hue in {"cat": 60, "dog": 160}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (40, 36), (hue, i, hue)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_trains(config, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["visadapt"])
    files = [FOLDER, config] if config.name in STACKED else [config]
    extra = [*SMALL, f"--data.root={images}"] if config.parent.name == "classification" else []
    assert main(["fit", *(f"--config={file}" for file in files), *extra, *QUICK]) in (0, None)
