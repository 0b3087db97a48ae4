"""The report of a text-to-video run: clips of the base and of both strengths, a file for each set, a card."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import visadapt as va
from tests.diffusion_training import train
from tests.tiny_video import FRAMES
from tests.video_training import ClipsData, task
from visadapt.report.animation import save_mp4, save_webp
from visadapt.report.run import RunReport
from visadapt.tasks.diffusion_options import ClipPreview, Paths


def test_a_run_leaves_clips_losses_and_a_file_for_each_set(tmp_path):
    watcher = RunReport(str(tmp_path), "test")
    made = task(preview=ClipPreview(prompts=["a goes", "b goes"], steps=1, frames=FRAMES))
    found = train(tmp_path / "checkpoints", watcher, task=made, data=ClipsData(2, batch_size=2), max_epochs=3)
    figures = json.loads((tmp_path / "run.json").read_text())["figures"]
    assert figures["loss after, held-out data"] != figures["loss before, held-out data"]
    shown = watcher._kind
    clips = {"before": shown.before["pictures"], "after": shown.after, **shown.others}
    assert list(shown.others) == ["with appearance"]
    assert {tuple(clip.shape) for clip in clips.values()} == {(2, FRAMES, 3, 32, 32)}
    with Image.open(tmp_path / "videos.webp") as file:
        assert file.n_frames == FRAMES
        file.load()
        assert file.info["duration"] == round(1000 / found.model.fps)
    with Image.open(tmp_path / "videos.png") as strips:
        assert np.asarray(strips).std() > 0
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card
    assert "videos.webp" in card
    assert "--adapter temporal.safetensors" in card

    again = task(adapters=[], paths=Paths("single"), preview=found.preview)
    again.model = va.load(again.build(), tmp_path / "temporal.safetensors")  # the motion without the appearance
    pixels = (again.render(["a goes", "b goes"], [0, 0]) * 255).round().byte()
    assert torch.equal(pixels, shown.after)
    va.load(again.model, tmp_path / "spatial.safetensors")
    assert {adapter.name for adapter in va.adapters(again.model).values()} == {"spatial", "temporal"}
    pixels = (again.render(["a goes", "b goes"], [0, 0]) * 255).round().byte()
    assert torch.equal(pixels, shown.others["with appearance"])


def frames(count=3, side=(30, 20)):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)) for _ in range(count)]


def test_animations_hold_every_frame_or_do_not_appear(tmp_path):
    save_webp(frames(), tmp_path / "a.webp", 8)
    with Image.open(tmp_path / "a.webp") as file:
        assert (file.n_frames, file.size) == (3, (30, 20))
    with pytest.raises(ZeroDivisionError):
        save_webp(frames(), tmp_path / "b.webp", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.webp"]


def test_films_hold_every_frame(tmp_path):
    av = pytest.importorskip("av")
    assert save_mp4(frames(side=(31, 21)), tmp_path / "a.mp4", 8)
    with av.open(str(tmp_path / "a.mp4")) as file:
        decoded = list(file.decode(video=0))
    assert (len(decoded), decoded[0].width, decoded[0].height) == (3, 30, 20)
