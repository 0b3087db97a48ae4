"""The tiny video base: what its recipe learns from, and that the shipped one moves things as its captions say."""

import json
from pathlib import Path

import torch
from torch.testing import assert_close

import visadapt.backbones
from tests.backbones.recipes import recipe
from visadapt.backbones.sd_layout import SHIPPED as IMAGES

SHIPPED = Path(visadapt.backbones.__file__).parent / "tiny" / "tiny_video"
tiny_video = recipe("tiny_video")


def reloaded():
    from diffusers import MotionAdapter

    return tiny_video.pipeline(IMAGES, MotionAdapter.from_pretrained(SHIPPED), SHIPPED / "text_encoder")


def test_clips_serve_backwards_under_the_opposite_direction():
    latents = torch.arange(12.0).reshape(4, 3, 1, 1, 1)
    labels = torch.tensor([[7, 0], [8, 1], [9, 2], [5, 0]])  # right, left, up, right
    found = tiny_video.by_motion(latents, labels)
    assert found["right"][1].tolist() == [7, 5, 8]
    assert torch.equal(found["right"][0][2], latents[1].flip(0))
    assert torch.equal(found["down"][0][0], latents[2].flip(0))
    assert [len(found[name][0]) for name in tiny_video.NAMES] == [3, 3, 1, 1]


def test_lessons_go_from_one_direction_to_all():
    assert [len(tiny_video.lesson(step)) for step in (0, 119, 120, 359, 360, 5000)] == [1, 1, 2, 2, 4, 4]


def test_new_motion_modules_change_nothing():
    torch.manual_seed(0)
    pipe = tiny_video.pipeline(IMAGES, tiny_video.motion_adapter())
    noisy, times = torch.randn(1, 3, 4, 8, 8), torch.tensor([500])
    said = "a red star moving right on bricks"
    with torch.no_grad():
        text = pipe.text_encoder(ids_of(pipe, said))[0]
        frames = noisy[0]
        wanted = image_unet()(frames, times.repeat(3), text.repeat(3, 1, 1)).sample
        assert_close(tiny_video.predicted(pipe, noisy, times, [said])[0], wanted, atol=1e-5, rtol=1e-4)


def ids_of(pipe, said):
    return pipe.tokenizer([said], padding="max_length", truncation=True, return_tensors="pt").input_ids


def image_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(IMAGES, subfolder="unet", local_files_only=True).float().eval()


def test_the_shipped_one_moves_things_as_stated():
    stated = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*") if f.is_file()) == stated["bytes"] < 6_000_000
    for split in ("combinations_of_training", "combinations_held_out"):
        assert stated[split]["direction"] >= 0.9
    found, videos = tiny_video.follows(reloaded(), True, 8)
    assert videos.shape == (8, tiny_video.FRAMES, 3, 32, 32)
    assert found["direction"] >= 0.75


def test_without_words_of_motion_the_text_encoder_is_that_of_the_images():
    pipe = reloaded()
    images = tiny_video.pipeline(IMAGES, tiny_video.motion_adapter())
    for word in ("a red star on bricks", "", "a white heart on a blue background in sks style"):
        ids = ids_of(pipe, word)
        with torch.no_grad():
            assert torch.equal(pipe.text_encoder(ids)[0], images.text_encoder(ids)[0])
    moving = ids_of(pipe, "a red star moving right on bricks")
    with torch.no_grad():
        assert not torch.equal(pipe.text_encoder(moving)[0], images.text_encoder(moving)[0])
