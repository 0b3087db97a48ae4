"""The README's first command, as a newcomer runs it, and what it promises."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visadapt as va
from visadapt.backbones import TimmViT
from visadapt.data.digits import DigitSet

ROOT = Path(__file__).parents[1]


def visadapt(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "visadapt", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    done = visadapt("fit", "--config", "configs/quickstart.yaml", "--run_dir", str(folder))
    assert done.returncode == 0, done.stderr
    assert "accuracy after, inverted" in done.stdout
    return folder


def test_it_adapts_and_leaves_the_base_alone(run):
    figures = json.loads((run / "run.json").read_text())["figures"]
    before, after = figures["accuracy before, inverted (500 images)"], figures["accuracy after, inverted (500 images)"]
    assert before < 0.2
    assert after > 0.78
    assert figures["accuracy with the adapter off, upright"] == figures["accuracy before, upright"] > 0.94


def test_the_run_directory_is_complete(run):
    for name in ("config.yaml", "metrics.csv", "README.md", "learning_curves.png", "confusion_matrix.png"):
        assert (run / name).stat().st_size > 100, name
    assert list(run.glob("events.out.tfevents.*"))
    with Image.open(run / "predictions.png") as picture:
        assert np.asarray(picture).std() > 10  # something is drawn
    assert (run / "adapter.safetensors").stat().st_size < 400_000


def test_predict_and_stock_peft_load_the_adapter(run, tmp_path):
    peft = pytest.importorskip("peft", reason="checks the file in stock PEFT: pip install 'visadapt[peft]'")
    model = va.load(TimmViT(name="tiny_digits").build(10), run / "adapter.safetensors", strict=True).eval()
    va.export(model, tmp_path / "peft")
    stock = peft.PeftModel.from_pretrained(TimmViT(name="tiny_digits").build(10), str(tmp_path / "peft")).eval()
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(stock(x), model(x), rtol=1e-4, atol=1e-4)

    test = DigitSet(list(range(1300, 1312)), list(range(10)), "inverted", 0)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        picture, label = test[i]
        array = (np.asarray(picture.permute(1, 2, 0)) * 255).round().astype("uint8")
        Image.fromarray(array).save(images / f"{i:02d}_is_{int(label)}.png")
    done = visadapt(
        "predict",
        "--adapter",
        str(run / "adapter.safetensors"),
        "--images",
        str(images),
        "--run_dir",
        str(tmp_path / "p"),
    )
    assert done.returncode == 0, done.stderr
    with next((tmp_path / "p").glob("*.csv")).open() as file:
        rows = list(csv.DictReader(file))
    right = sum(row["class"] == row["file"].split("_is_")[1][0] for row in rows)
    assert len(rows) == 12
    assert right >= 8
