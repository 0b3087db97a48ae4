"""Handlers of the text-to-video app, without a server."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visadapt as va
from apps import _prompting, _runs, _studio, text_to_video
from tests.apps.conftest import noisy, write_run
from tests.tiny_video import FRAMES, video_base
from visadapt.backbones.stable_diffusion import StableDiffusion
from visadapt.backbones.video_diffusion import VideoDiffusion
from visadapt.report.animation import save_gif


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """An adapter of the text-to-image task."""
    model = va.adapt(StableDiffusion(video_base()).build(), va.LoRA(rank=1), ["unet.cross"])
    return va.save(noisy(model), tmp_path_factory.mktemp("style") / "style.safetensors", base_name="random")


@pytest.fixture(scope="module")
def studio(motion_run, style):
    return _studio.Studio(_runs.video([motion_run], None), [motion_run, style], apart=True)


def read(path):
    """Frames of a file."""
    with Image.open(path) as file:
        found = []
        for number in range(file.n_frames):
            file.seek(number)
            found.append(np.asarray(file.convert("RGB")).astype(int))
        return np.stack(found), file.info.get("duration"), dict(file.getexif())


def wish(strengths, number=FRAMES):
    return _prompting.wish("a cat", "", 1, 1, 2.0, number, strengths=strengths)


def test_a_motion_acts_and_its_appearance_rests_at_first(studio):
    assert [(one.label, one.strength) for one in studio.sets] == [
        ("orbit: spatial", 0.0), ("orbit: temporal", 1.0), ("style", 1.0),
    ]  # fmt: skip
    assert "another base" in studio.sets[2].note, "that of the style has no motion modules"


def test_a_clip_beside_the_base_as_webp_gif_and_mp4(studio, motion_run, tmp_path):
    shown, files, note = text_to_video.filmed(studio, wish({"orbit-temporal": 1.0, "style": 0.5}), tmp_path)
    names = [Path(file).name for file in files]
    assert [name for name in names if not name.endswith("mp4")] == [
        "base_seed1.gif", "base_seed1.webp", "adapted_seed1.gif", "adapted_seed1.webp",
    ]  # fmt: skip
    pytest.importorskip("av")
    assert {"base_seed1.mp4", "adapted_seed1.mp4"} <= set(names)
    sheet, *_ = read(shown)
    assert sheet.shape == (FRAMES, text_to_video.SIDE + 40, 2 * text_to_video.SIDE + 36, 3)
    base, _, exif = read(tmp_path / "base_seed1.webp")
    adapted, _, exif = read(tmp_path / "adapted_seed1.webp")
    assert np.abs(base - adapted).max() > 2
    assert base.shape == (FRAMES, 32, 32, 3)
    how = json.loads(exif[0x010E])
    assert (how["strengths"], how["frames"]) == ({"orbit: temporal": 1.0, "style": 0.5}, FRAMES)
    moving, duration, _ = read(tmp_path / "adapted_seed1.gif")
    assert len(moving) == FRAMES
    assert duration == round(100 / studio.model.fps) * 10
    assert np.abs(moving - adapted).mean() < 25, "the same clip; both formats lose some of this noise"
    assert note == ""


def test_a_gif_keeps_colours_and_time(tmp_path):
    across, down = np.mgrid[0:32, 0:32].astype(np.uint8) * 8
    wanted = np.stack([np.stack([across, down, np.full_like(down, 60 * i)], -1) for i in range(3)])
    save_gif([Image.fromarray(frame) for frame in wanted], tmp_path / "a.gif", 12.5)
    found, duration, _ = read(tmp_path / "a.gif")
    assert np.abs(found - wanted).mean() < 4
    assert duration == 80
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_without_strength_the_base_stands_alone(studio, tmp_path):
    shown, files, note = text_to_video.filmed(studio, wish({}), tmp_path)
    assert {Path(file).stem for file in files} == {"base_seed1"}
    assert "base alone" in note
    assert read(shown)[0].shape[2] == text_to_video.SIDE + 24


def test_the_base_is_given_or_that_of_a_motion_or_the_shipped_one(motion_run, style):
    assert isinstance(_runs.video([style, motion_run], None), VideoDiffusion)
    assert text_to_video.chosen([motion_run], "other")[0].name == "other"
    assert _runs.video([style], None).name == "tiny_video"


def test_the_newest_motion_is_taken_and_on_the_shipped_base_an_appearance(motion_run, tmp_path, monkeypatch):
    monkeypatch.chdir(motion_run.parents[3])
    recipe, files, resting = text_to_video.chosen([], None)
    assert (recipe.name, files, resting) == (video_base(), [motion_run.relative_to(Path.cwd())], [])
    monkeypatch.chdir(tmp_path)
    for name, kind, base in (("orbit", "text_to_video.TextToVideo", "tiny_video"),
                             ("style", "text_to_image.TextToImage", "tiny_sd"),
                             ("other", "text_to_image.TextToImage", "owner/name")):  # fmt: skip
        kind_of_base = "StableDiffusion" if base != "tiny_video" else "VideoDiffusion"
        backbone = {"class_path": kind_of_base, "init_args": {"name": base}}
        write_run(Path("runs") / name / "1", f"visadapt.tasks.{kind}", {"backbone": backbone}, []).touch()
    _, files, resting = text_to_video.chosen([], None)
    assert [path.parts[1] for path in files] == ["orbit", "style"]
    assert resting == files[1:]


def test_runs_that_trained_the_base_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed = va.adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), va.LoRA(rank=1), "0")
    changed[0].bias.requires_grad_(True)
    for name, kind, base in (("orbit", "text_to_video.TextToVideo", "tiny_video"),
                             ("style", "text_to_image.TextToImage", "tiny_sd")):  # fmt: skip
        path = write_run(Path("runs") / name / "1", f"visadapt.tasks.{kind}", {"backbone": {"name": base}}, [])
        va.save(changed, path, base_name=base)
        assert _runs.newest([kind.partition(".")[2]]) == [path]
    recipe, files, resting = text_to_video.chosen([], None)
    assert (recipe.name, files, resting) == ("tiny_video", [], [])


def test_more_frames_than_there_are_positions_is_told(studio, tmp_path):
    with pytest.raises(ValueError, match="has positions for 8"):
        text_to_video.filmed(studio, wish({}, 9), tmp_path)
