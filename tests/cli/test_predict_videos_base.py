"""predict of a text-to-video base without a run: files of any tool, a picture or a clip to start from."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import visadapt as va
from tests.tiny import moved
from tests.tiny_diffusion import tiny_pipeline
from tests.tiny_video import FRAMES, motion_adapter, video_base
from visadapt.backbones import StableDiffusion
from visadapt.backbones.video_diffusion import VideoDiffusion
from visadapt.cli.main import main

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--steps", "1"]


def predict(*args, base=None):
    start = ["predict", "--backbone", base or video_base(), *QUIET, "--frames", str(FRAMES)]
    return main([*start, *map(str, args)])


def clip(path):
    """Frames (F, H, W, 3) of an animation."""
    with Image.open(path) as file:
        found = []
        for number in range(file.n_frames):
            file.seek(number)
            found.append(np.asarray(file.convert("RGB")).astype(int))
    return np.stack(found)


def test_files_of_any_tool_at_their_strengths(here, capsys):
    model = moved(va.adapt(VideoDiffusion(video_base()).build(), va.LoRA(rank=2), "temporal.attention"), 0.2)
    va.export(model, here / "motion.safetensors", format="diffusers")
    pictures = moved(va.adapt(StableDiffusion(video_base()).build(), va.LoRA(rank=2), "unet.cross"), 0.2)
    va.export(pictures, here / "look.safetensors", format="kohya")
    files = ["--adapter", here / "motion.safetensors", here / "look.safetensors", "--prompts", "a", "--output"]
    assert predict(*files, "both", "--seeds", "3", "0") == 0
    rows = list(csv.DictReader(Path("both/videos.csv").open()))
    assert [row["seed"] for row in rows] == ["0", "3"]
    with Image.open(Path("both", rows[0]["file"])) as file:
        told = json.loads(file.getexif()[0x010E])
    assert told["strengths"] == {"motion": 1.0, "look": 1.0}
    assert (told["frames"], told["steps"], told["prompt"]) == (FRAMES, 1, "a")
    assert predict(*files, "half", "--strength.motion", 0.5) == 0
    both, half = (clip(f"{name}/0000_a_seed0.webp") for name in ("both", "half"))
    assert both.shape == (FRAMES, 32, 32, 3)
    assert not np.array_equal(both, half)
    assert predict(*files, "none", "--strength.motoin", 0.5) == 2
    told = capsys.readouterr().err
    assert "error at '--strength.motoin'\n  the model has no set of that name; it has look, motion" in told
    assert "did you mean: motion?" in told


def test_a_picture_and_a_clip_to_start_from(here):
    Image.new("RGB", (40, 32), "red").save("red.png")
    say = ["--prompts", "a", "--output"]
    assert predict(*say, "free") == 0
    assert predict(*say, "picture", "--image", "red.png") == 0
    assert predict(*say, "whole", "--image", "red.png", "--share", "1") == 0
    assert predict(*say, "again", "--clip", "free/0000_a_seed0.webp", "--share", "0") == 0
    free, picture, whole, again = (clip(f"{name}/0000_a_seed0.webp") for name in ("free", "picture", "whole", "again"))
    assert np.array_equal(picture, whole)  # unless told otherwise, a picture gives all the noise
    assert np.array_equal(free, again)  # a share of 0 is fresh noise
    assert not np.array_equal(free, picture)


def test_a_motion_adapter_makes_a_video_model_of_an_image_model(here):
    base = str(tiny_pipeline(here / "base"))
    assert predict("--prompts", "a", base=base) == 2  # pictures have no frames
    motion_adapter().save_pretrained(here / "motion")
    more = [f"--model.backbone.motion_adapter={here / 'motion'}", "--prompts", "a", "--output", "out"]
    assert predict(*more, base=base) == 0
    assert len(clip("out/0000_a_seed0.webp")) == FRAMES


MISTAKES = {
    "image": (["--image", "no.png"], "--image", "there is no file"),
    "both": (["--image", ".", "--clip", "."], "model.preview", "set one of them to null"),
    "share": (["--share", "0.5"], "--share", "give --image or --clip, too"),
    "images": (["--images", "."], "--images", "and --image PICTURE"),
    "frames": (["--frames", "99"], "model.preview.frames", "positions for 8"),
    "strength": (["--strength.motion", "1"], "--strength.motion", "it has none"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_message(case, here, capsys):
    args, where, told = MISTAKES[case]
    assert predict("--prompts", "a", *args) == 2
    error = capsys.readouterr().err
    assert f"error at '{where}'" in error
    assert told in error
