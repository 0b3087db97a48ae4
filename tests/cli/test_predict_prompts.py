"""predict of a text-to-image model: a PNG for each prompt and seed, from a run, a checkpoint, or a base with files."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import visadapt as va
from tests.cli.conftest import write
from tests.tiny import moved
from tests.tiny_diffusion import tiny_pipeline
from visadapt.backbones import StableDiffusion
from visadapt.cli.main import main
from visadapt.cli.predict import set_names

FEW = ["--steps", "1", "--run_dir", "out", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_pipeline(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def sd_run(base, tmp_path_factory):
    """Folder of a run of two steps on drawn pictures."""
    folder = tmp_path_factory.mktemp("run")
    data = {"kind": "subject", "train_size": 2, "val_size": 2, "test_size": 2, "batch_size": 2}
    adapter = {"method": {"class_path": "LoRA", "init_args": {"rank": 2}}, "targets": ["unet.cross"]}
    config = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
        "model": {
            "class_path": "TextToImage",
            "init_args": {
                "backbone": {"class_path": "StableDiffusion", "init_args": {"name": base}},
                "adapters": [adapter],
                "preview": {"prompts": ["a"], "seeds": [4], "steps": 1},
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}},
            },
        },
        "data": {"class_path": "Scenes", "init_args": data},
    }
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    try:
        assert main(["fit", "--config", write(folder / "c.yaml", yaml.safe_dump(config)), "--run_dir", "made"]) == 0
    finally:
        os.chdir(before)
        sys.argv = argv
    return folder / "made"


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def table(folder="out"):
    return list(csv.DictReader((Path(folder) / "pictures.csv").open()))


def test_prompts_and_files_with_seeds_from_the_folder_of_a_run(sd_run, here, capsys):
    (here / "more.txt").write_text("a blue star\n\n  a sks shape: on bricks \n")
    prompts = ["--prompts", "a [red] circle", "more.txt", "--seeds", "3", "1"]
    assert main(["predict", "--adapter", str(sd_run), *prompts, *FEW, "--negative", "grey"]) == 0
    assert "6 pictures: out/pictures.csv, contact_sheet.png" in capsys.readouterr().out
    rows = table()
    assert [(row["prompt"], row["seed"]) for row in rows[:3]] == [
        ("a [red] circle", "1"), ("a [red] circle", "3"), ("a blue star", "1")]  # fmt: skip
    assert rows[5]["file"] == "0002_a-sks-shape-on-bricks_seed3.png"
    with Image.open(here / "out" / rows[0]["file"]) as picture:
        assert picture.size == (32, 32)
        assert picture.text["parameters"].startswith("a [red] circle\nNegative prompt: grey\nSteps: 1, Sampler: DDIM")
        how = json.loads(picture.text["visadapt"])
    assert how["seed"] == 1
    assert how["adapters"] == [str(sd_run / "adapter.safetensors")]
    assert how["strengths"] == {"default": 1.0}
    assert (here / "out" / "contact_sheet.png").is_file()
    # Each picture depends on its prompt and seed alone, whatever it is rendered with.
    one = ["--prompts", "a blue star", "--seeds", "1", "--batch_size", "1", "--negative", "grey"]
    ckpt = str(sd_run / "checkpoints" / "last.ckpt")
    assert main(["predict", "--ckpt_path", ckpt, *one, *FEW, "--run_dir", "one"]) == 0
    again = pixels(here / "one" / table("one")[0]["file"])
    assert abs(again - pixels(here / "out" / rows[2]["file"])).max() <= 1
    assert abs(again - pixels(here / "out" / rows[3]["file"])).max() > 1


def test_captions_of_the_data_and_settings_of_the_preview(sd_run, here):
    assert main(["predict", "--adapter", str(sd_run / "adapter.safetensors"), *FEW[2:], "--size", "32", "40"]) == 0
    rows = table()
    assert len(rows) in (1, 2)
    assert all(row["prompt"].startswith("a sks shape on") and row["seed"] == "4" for row in rows)
    with Image.open(here / "out" / rows[0]["file"]) as picture:
        assert picture.size == (40, 32)
        assert "Steps: 1," in picture.text["parameters"]


def test_a_base_with_files_of_any_tool_and_strengths(base, here):
    files = []
    for seed, name in enumerate(("content", "style")):
        torch.manual_seed(seed)
        model = StableDiffusion(base).build()
        va.adapt(model, va.LoRA(rank=2), ["unet.cross", "unet.self"][seed])
        moved(model, 0.2)
        files.append(here / f"{name}.safetensors")
        if seed:
            va.export(model, files[1], format="kohya")
        else:
            va.save(model, files[0])
    start = ["predict", "--backbone", base, "--prompts", "a", *FEW[:2], *FEW[4:]]
    runs = {
        "both": ["--adapter", *map(str, files)],
        "one": ["--adapter", *map(str, files), "--strength", "{content: 1, style: 0}"],
        "content": ["--adapter", str(files[0])],
        "none": ["--adapter", *map(str, files), "--strength", "0"],
        "base": [],
    }
    found = {}
    for name, more in runs.items():
        assert main([*start, *more, "--output", name]) == 0, name
        found[name] = pixels(here / name / "0000_a_seed0.png")
    assert np.array_equal(found["none"], found["base"])
    assert abs(found["one"] - found["content"]).max() <= 1
    assert len({found[name].tobytes() for name in ("both", "content", "base")}) == 3


MISTAKES = {
    "images": (["--images", "x.png"], "--images", "give --prompts"),
    "file": (["--prompts", "prompt.txt"], "--prompts", "prompts.txt?"),
    "empty": (["--prompts", "prompts.txt"], "data.prompts", "there is none in prompts.txt"),
    "seed": (["--prompts", "a", "--seeds", "-1"], "data.seeds", "from 0"),
    "size": (["--prompts", "a", "--size", "30"], "model.preview.size", "multiples of 8"),
    "steps": (["--prompts", "a", "--steps", "0"], "model.preview", "one step"),
    "set": (["--prompts", "a", "--strength", "{x: 1}"], "--strength.x", "no set of that name"),
    "adapter": (["--prompts", "a", "--adapter", "nowhere"], "--adapter", "there is no file"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_message(sd_run, here, capsys, case):
    (here / "prompts.txt").write_text("\n")
    args, where, told = MISTAKES[case]
    adapter = [] if case == "adapter" else ["--adapter", str(sd_run)]
    if case == "adapter":
        args = [*args, "--config", str(sd_run / "config.yaml")]
    assert main(["predict", *args, *adapter, *FEW[2:]]) == 2
    error = capsys.readouterr().err
    assert f"error at '{where}" in error if where else True
    assert told in error
    assert "Traceback" not in error
    assert not (here / "out").exists()


def test_prompts_are_for_text_to_image_alone(run, here, capsys):
    assert main(["predict", "--adapter", str(run / "adapter.safetensors"), "--prompts", "a"]) == 2
    assert "only a text-to-image or text-to-video model renders prompts" in capsys.readouterr().err


def test_names_of_sets(tmp_path):
    (tmp_path / "subject" / "20250101-120000").mkdir(parents=True)
    run = tmp_path / "subject" / "20250101-120000" / "adapter.safetensors"
    for file in (run, tmp_path / "my style.safetensors"):
        file.touch()
    found = set_names([str(run), str(tmp_path / "my style.safetensors"), str(run)])
    assert found == ["subject", "my-style", "subject-3"]
    assert set_names([str(run)]) == [None]
