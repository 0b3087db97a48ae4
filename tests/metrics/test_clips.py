"""Figures of clips: neighbours' cosines, CLIP scores, and what the judge sees in each frame."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from tests.metrics.test_renders import write_clip
from visadapt.data.scenes import COLOURS
from visadapt.metrics.clip import clip_score
from visadapt.metrics.clips import consistency, frame_adherence, frame_clip_score, frame_features, leaked_traits


class FirstPixel(nn.Module):
    """Stands for the judge in these sums: reads its labels off the first pixel's three channels."""

    classes = (8, 8, 11)

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        numbers = ((images[:, :, 0, 0] + 1) * 127.5).round().long()
        logits = dict(zip(("shape", "colour", "background"), nn.functional.one_hot(numbers, 12).float().unbind(1)))
        return logits | {"subject": numbers[:, 0] - 100, "style": numbers[:, 0] - 100}


def videos_of(*clips):
    """Clips whose frames carry the given (shape, colour, background)."""
    numbers = torch.tensor(clips, dtype=torch.float32) / 255
    return numbers[..., None, None].expand(*numbers.shape, 4, 4)


def test_consistency():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 5, 8))
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for clip in features for x, y in pairwise(clip)]
    assert consistency(torch.tensor(features)) == pytest.approx(np.mean(cosines), abs=1e-14)
    assert consistency(torch.ones(2, 4, 3)) == pytest.approx(1)
    alternating = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(2, 1)[None]
    assert consistency(alternating) == 0
    with pytest.raises(ValueError, match="at least 2 frames"):
        consistency(torch.ones(2, 1, 3))


def test_clip_score_is_the_mean_over_frames(tmp_path):
    folder = write_clip(tmp_path / "clip")
    videos = torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "a cat"]
    each = [clip_score(clip, [said] * 5, folder) for clip, said in zip(videos, prompts)]
    for chunk in (3, 64):
        found = frame_clip_score(videos, prompts, folder, chunk)
        assert found == pytest.approx(torch.cat(each).mean().item(), abs=1e-4)
    assert frame_clip_score(videos, prompts[::-1], folder) != pytest.approx(found, abs=1e-4)


def test_traits_of_the_reference():
    videos = videos_of([(1, 2, 3), (4, 2, 3)], [(1, 5, 6), (1, 5, 3)])
    asked = {"shape": [4, 4], "colour": [2, 5], "background": [-1, 6]}
    found = leaked_traits(videos, asked, {"shape": 1, "colour": 2, "background": 3}, FirstPixel())
    assert found == {"shape": 0.75, "colour": 0.0, "background": 0.5}
    assert leaked_traits(videos, asked, {"shape": 4, "colour": -1, "background": 6}, FirstPixel()) == {}


def test_adherence_counts_frames():
    videos = videos_of([(1, 2, 3), (4, 2, 3)], [(1, 5, 6), (1, 5, 3)])
    found = frame_adherence(
        videos, {"shape": [1, 1], "colour": [2, 5], "background": [3, 6], "motion": [0, 1]}, FirstPixel()
    )
    assert found["shape"] == 0.75
    assert found["colour"] == 1
    assert found["background"] == 0.75
    assert found["all"] == 0.5


def test_features_keep_their_frames():
    videos = torch.rand(3, 4, 3, 8, 8)
    found = frame_features(lambda images: images.mean((2, 3)), videos, chunk=5)
    assert torch.allclose(found, videos.mean((3, 4)))
    assert len(COLOURS) == FirstPixel.classes[1]
