"""Clips that start from a picture or from the noise of a reference clip."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import visadapt as va
from tests.tiny_video import FRAMES
from tests.video_training import sets, task
from visadapt.data.images import UnreadableImage
from visadapt.data.video_files import BadClip
from visadapt.tasks.diffusion_options import ClipPreview, Paths
from visadapt.tasks.video_start import beginning

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(path, seed=0, size=(48, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def how(**options):
    return ClipPreview(steps=2, frames=FRAMES, guidance=1.0, **options)


@pytest.fixture(scope="module")
def found():
    made = task(adapters=sets("temporal"), paths=Paths("temporal"))
    made.configure_model()
    for adapter in va.adapters(made.model).values():
        nn.init.normal_(adapter.up, generator=torch.Generator().manual_seed(0))
    return made


def test_a_picture_is_where_every_frame_starts(found, tmp_path):
    found.preview = how(image=picture(tmp_path / "a.png"), share=1.0)
    given = beginning(found.model, found.preview)["image"]
    assert given.shape == (1, 3, 32, 32)
    assert given.min() >= -1
    with va.strength(found.model, 0.0):  # without motion adapters the base alone tells frames apart
        clips = found.render(["a", "a"], [0, 1])
    assert torch.equal(clips[0], clips[1])  # no noise of the seed's own
    found.preview = how(image=picture(tmp_path / "b.png", 1), share=1.0)
    assert not torch.equal(found.render(["a"], [0])[0], clips[0])
    found.preview = how()
    assert beginning(found.model, found.preview) == {}


def test_the_share_is_all_of_a_picture_and_a_part_of_a_clip(found, tmp_path):
    assert [how(**start).share for start in ({}, {"image": "a"}, {"clip": "a"})] == [None, 1.0, 0.3]
    assert how(image="a", share=0.2).share == 0.2
    found.preview = how(image=picture(tmp_path / "a.png"))
    whole = found.render(["a"], [0])
    found.preview = how(image=found.preview.image, share=1.0)
    assert torch.equal(found.render(["a"], [0]), whole)
    found.preview = how()
    assert not torch.equal(found.render(["a"], [0]), whole)


def test_a_reference_clip_gives_its_inverted_noise(found, tmp_path):
    for number in range(FRAMES + 3):
        picture(tmp_path / f"{number}.png", number)
    options = how(clip=str(tmp_path), share=0.5)
    noise = beginning(found.model, options)["noise"]
    assert noise.shape == (1, FRAMES, 4, 8, 8)
    with va.strength(found.model, 0.0):
        assert torch.equal(beginning(found.model, options)["noise"], noise)  # that of the base
    assert {adapter.strength for adapter in va.adapters(found.model).values()} == {1.0}
    found.preview = options
    first = found.render(["a"], [0])
    assert torch.equal(first, found.render(["a"], [0]))
    assert not torch.equal(first, found.render(["a"], [1]))


def test_files_that_cannot_be_used_are_named(found, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.preview\.image: there is no file 'no\.png'"):
        beginning(found.model, how(image="no.png"))
    with pytest.raises(BadClip, match="holds no frames"):
        beginning(found.model, how(clip=str(tmp_path)))
    picture(tmp_path / "0.png")
    with pytest.raises(ValueError, match=rf"model\.preview\.clip: .* has 1 frames, {FRAMES} are wanted"):
        beginning(found.model, how(clip=str(tmp_path)))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableImage, match=r"broken\.png"):
        beginning(found.model, how(image=str(tmp_path / "broken.png")))
