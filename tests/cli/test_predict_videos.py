"""predict of a text-to-video model: an animation for each prompt and seed, of the motion alone or with appearances."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import visadapt as va
from tests.cli.conftest import write
from tests.tiny import moved
from tests.tiny_video import FRAMES, video_base
from tests.video_training import SPATIAL, TEMPORAL
from visadapt.backbones import StableDiffusion
from visadapt.cli.main import main

FEW = ["--steps", "1", "--run_dir", "out", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
LORA = {"class_path": "LoRA", "init_args": {"rank": 2}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of two steps on a drawn clip."""
    folder = tmp_path_factory.mktemp("run")
    sets = [{"method": LORA, "targets": t, "name": n} for n, t in (("spatial", SPATIAL), ("temporal", TEMPORAL))]
    config = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
        "model": {
            "class_path": "TextToVideo",
            "init_args": {
                "backbone": {"class_path": "VideoDiffusion", "init_args": {"name": video_base()}},
                "adapters": sets,
                "paths": {"skip": 0.0},
                "preview": {"prompts": ["a"], "seeds": [4], "steps": 1, "frames": FRAMES},
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}},
            },
        },
        "data": {
            "class_path": "MovingScenes",
            "init_args": {"kind": "orbit", "frames": FRAMES, "val_clips": 2, "test_clips": 2},
        },
    }
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    try:
        assert main(["fit", "--config", write(folder / "c.yaml", yaml.safe_dump(config)), "--run_dir", "made"]) == 0
    finally:
        os.chdir(before)
        sys.argv = argv
    return folder / "made"


def clips(folder="out"):
    """Frames of each file of the table, and how the first was made."""
    found, told = [], {}
    for row in csv.DictReader((Path(folder) / "videos.csv").open()):
        with Image.open(Path(folder) / row["file"]) as file:
            told = told or json.loads(file.getexif()[0x010E])
            frames = []
            for number in range(file.n_frames):
                file.seek(number)
                frames.append(np.asarray(file.convert("RGB")).astype(int))
            found.append(np.stack(frames))
    return np.stack(found), told


def test_prompts_are_rendered_with_the_motion_alone_or_with_strengths(run, here, capsys):
    assert main(["predict", "--adapter", str(run), "--prompts", "a", "--seeds", "0", "1", *FEW]) == 0
    assert "2 videos: out/videos.csv, contact_sheet.png" in capsys.readouterr().out
    alone, told = clips()
    assert alone.shape == (2, FRAMES, 32, 32, 3)
    assert (told["prompt"], told["frames"], told["strengths"]) == ("a", FRAMES, {"spatial": 0.0, "temporal": 1.0})
    assert Path("out/contact_sheet.png").is_file()
    one = ["predict", "--prompts", "a", "--seeds", "0", *FEW]
    assert main([*one, "--adapter", str(run), "--strength.spatial", "1"]) == 0
    both, told = clips()
    assert told["strengths"] == {"spatial": 1.0, "temporal": 1.0}
    assert (both != alone[:1]).any()
    assert main([*one, "--ckpt_path", str(run / "checkpoints/last.ckpt")]) == 0
    assert (clips()[0] == alone[:1]).all()


def test_a_style_of_text_to_image_joins_a_motion(run, here):
    style = va.adapt(StableDiffusion(video_base()).build(), va.LoRA(rank=1), ["unet.cross"])
    va.save(moved(style), "style.safetensors")
    files = [str(run / "temporal.safetensors"), "style.safetensors"]  # the first says what the model is
    with pytest.warns(UserWarning, match="another base"):  # that of the style has no motion modules
        assert main(["predict", "--adapter", *files, "--prompts", "a", "--seeds", "0", *FEW]) == 0
    joined, told = clips()
    assert told["strengths"] == {"temporal": 1.0, "style": 1.0}
    assert main(["predict", "--adapter", files[0], "--prompts", "a", "--seeds", "0", *FEW]) == 0
    assert (clips()[0] != joined).any()
