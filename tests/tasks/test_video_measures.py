"""Figures of rendered clips: a model that renders the learned clips has the best of them, a still one has not."""

import numpy as np
import pytest
import torch

from tests.metrics.test_renders import write_clip
from tests.tiny_judge import random_judge  # noqa: F401 - a fixture
from tests.tiny_video import FRAMES
from tests.video_training import task
from visadapt.data.moving_scenes import MovingScenes
from visadapt.metrics.clip import clip_score
from visadapt.tasks.diffusion_options import ClipPreview
from visadapt.tasks.video_measures import ClipMeasures, ClipMeasuring

pytestmark = pytest.mark.usefixtures("random_judge")


def measured(shown, data, **options):
    """Figures of a task that renders what ``shown`` says."""
    found = task(measures=ClipMeasures(**options), preview=ClipPreview(frames=FRAMES, steps=1))
    found.render = lambda prompts, seeds: torch.stack([shown(i) for i, _ in enumerate(prompts)])
    return ClipMeasuring(found, data)()[0]


def drawn(data, stage="train"):
    clips = data.clips(stage)
    pictures = [np.stack([np.asarray(frame) for frame in clip.read(0)]) for clip in clips]
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 2) / 255


def test_motion_of_the_learned_clip_is_told_from_none():
    data = MovingScenes("orbit", clips=1, test_clips=4, frames=FRAMES, seed=3)
    clip, still = drawn(data)[0], drawn(data)[0, :1].expand(FRAMES, -1, -1, -1)
    moving = measured(lambda i: clip, data, judge=True)
    assert moving["motion correlation"] > 0.9
    assert moving["motion deviation"] < 0.05
    standing = measured(lambda i: still, data, judge=True)
    assert standing["motion correlation"] == pytest.approx(0, abs=0.05)
    assert standing["temporal consistency (judge)"] == pytest.approx(1)
    assert moving["similarity to the learned clips (judge)"] > 0.5
    told = {name.rpartition(" ")[0] for name in moving if name.startswith("share of frames")}
    assert told == {"share of frames with the right", "share of frames with the learned clip's"}


def test_directions_are_those_of_the_prompts():
    data = MovingScenes("moving", clips=2, test_clips=8, frames=FRAMES)
    clips = drawn(data, "test")
    found = measured(lambda i: clips[i], data)
    assert found["share that moves as asked"] > 0.8
    wrong = measured(lambda i: clips[i].flip(0), data)
    assert wrong["share that moves as asked"] == 0


def test_the_clip_score_is_that_of_frames(tmp_path):
    data = MovingScenes("moving", clips=2, test_clips=2, frames=FRAMES)
    clips, folder = drawn(data, "test"), write_clip(tmp_path / "clip")
    found = measured(lambda i: clips[i], data, clip=folder, prompts=["a star", "a cat"])
    each = [clip_score(clip, [said] * FRAMES, folder) for clip, said in zip(clips, ["a star", "a cat"])]
    assert found["CLIP score"] == pytest.approx(torch.cat(each).mean().item(), abs=1e-3)
    assert "CLIP score" not in measured(lambda i: clips[i], data)
    with pytest.raises(FileNotFoundError, match=r"model\.measures\.clip: there is no folder"):
        measured(lambda i: clips[i], data, clip=str(tmp_path / "none"))


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="seeds"):
        ClipMeasures(seeds=0)
    with pytest.raises(ValueError, match="no clips"):
        ClipMeasuring(task(measures=ClipMeasures()), object())
