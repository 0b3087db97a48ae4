"""Fixed renders of video models: every family is shown a number of frames that it takes."""

import pytest
import torch

from tests.tiny_video import video_base
from visadapt.backbones import VideoDiffusion
from visadapt.report.fixed_renders import FRAMES, rendered, settings_of

BASES = {
    "latte, more than usual": ("latte", {"video_length": 12}, {}, 12),
    "latte, told another number": ("latte", {"video_length": 12}, {"frames": 4}, 12),
    "wan": ("wan", {}, {}, FRAMES),
    "wan, told a number that its VAE does not take": ("wan", {}, {"frames": 8}, 5),
    "animatediff, told more than it has positions for": ("animatediff", {}, {"frames": 32}, 8),
    "unet3d": ("unet3d", {}, {}, FRAMES),
}


@pytest.mark.parametrize("case", BASES)
def test_frames_are_as_many_as_the_base_takes(case):
    family, made, options, frames = BASES[case]
    model = VideoDiffusion(video_base(family, **made), **options).build()
    settings = settings_of(model, ["a"], 1) | {"size": 32}
    assert settings["frames"] == frames
    latents, pixels = rendered(model, settings)
    assert pixels.shape == (1, frames, 3, 32, 32)
    assert torch.isfinite(latents).all()
