"""Clips from prompts and seeds: the stock pipelines' own, and what they start from."""

import pytest
import torch
from torch import nn

import visadapt as va
from tests.tiny_video import FRAMES, video_base
from visadapt.backbones import VideoDiffusion
from visadapt.backbones.video_diffusion import pipeline
from visadapt.backbones.video_families import FAMILIES
from visadapt.backbones.video_inversion import invert
from visadapt.backbones.video_latents import decode_videos, encode_videos
from visadapt.backbones.video_render import render, render_latents
from visadapt.backbones.video_text import encode_prompts

STOCK = {
    "animatediff": "AnimateDiffPipeline",
    "unet3d": "TextToVideoSDPipeline",
    "latte": "LattePipeline",
    "wan": "WanPipeline",
}


def built(family="animatediff", **options):
    return VideoDiffusion(video_base(family), **options).build()


def clips(found, prompts, seeds, frames=FRAMES, kind="latent"):
    """Latents, or pixels, (B, F, C, h, w) as the stock pipeline makes them from prompts and generators."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    name = "video_length" if type(found).__name__ == "LattePipeline" else "num_frames"
    options = {name: frames, "num_inference_steps": 2, "guidance_scale": 5.0, "output_type": kind}
    made = found(prompts, generator=generators, height=32, width=32, **options).frames
    return made.transpose(1, 2) if kind == "latent" else made


@pytest.mark.parametrize("family", FAMILIES)
def test_with_adapters_off_it_is_the_stock_pipeline_bit_for_bit(family):
    import diffusers

    options = {}
    if family == "animatediff":
        options["motion_adapter"] = diffusers.MotionAdapter.from_pretrained(f"{video_base(family)}/motion_adapter")
    stock = getattr(diffusers, STOCK[family]).from_pretrained(video_base(family), **options)
    stock.set_progress_bar_config(disable=True)
    frames = 5 if family == "wan" else FRAMES
    wanted = clips(stock, ["a red circle"], [1], frames)
    pixels = clips(stock, ["a red circle"], [1], frames, "pt")
    model = built(family)
    va.adapt(model, va.LoRA(rank=2), ["spatial", "temporal"])
    for adapter in va.adapters(model).values():
        nn.init.normal_(adapter.up)
    state = torch.get_rng_state()
    adapted = render_latents(model, ["a red circle"], [1], frames, 2, 5.0, 32)
    with va.strength(model, 0.0):
        assert torch.equal(render_latents(model, ["a red circle"], [1], frames, 2, 5.0, 32), wanted)
    # On, they act in the stock pipeline.
    assert torch.equal(clips(pipeline(model), ["a red circle"], [1], frames), adapted)
    assert not torch.allclose(adapted, wanted, atol=1e-3)
    assert torch.allclose(decode_videos(model, wanted), pixels, atol=1e-5)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("family", FAMILIES)
def test_clips_do_not_depend_on_their_company(family):
    model = built(family)
    how = {"steps": 1, "size": 32, "frames": 5 if family == "wan" else FRAMES}
    both = render(model, ["a", "b c"], [0, 1], **how)
    assert both.shape == (2, how["frames"], 3, 32, 32)
    assert both.dtype == torch.float32
    assert 0 <= both.min() <= both.max() <= 1
    assert torch.allclose(render(model, ["b c"], [1], **how)[0], both[1], atol=1e-4)


def test_sizes_and_frames():
    model = built()
    assert render(model, ["a"], [0], steps=1).shape == (1, 8, 3, 32, 32)
    assert render(model, ["a"], [0], frames=1, steps=1, size=(32, 48), guidance=1.0).shape == (1, 1, 3, 32, 48)
    with pytest.raises(ValueError, match="seeds"):
        render(model, ["a", "b"], [0])


@pytest.mark.parametrize(
    ("family", "frames", "why"),
    [
        ("animatediff", 9, "has positions for 8; take fewer"),
        ("latte", FRAMES - 1, f"takes {FRAMES} frames, no more and no fewer"),
        ("latte", FRAMES + 1, f"takes {FRAMES} frames, no more and no fewer"),
        ("wan", 6, "this VAE takes 1, 5, 9, … frames"),
    ],
)
def test_frames_that_a_base_does_not_take_are_refused(family, frames, why):
    with pytest.raises(ValueError, match=rf"^model\.preview\.frames: {frames}, but .*{why}"):
        render(built(family), ["a"], [0], frames=frames, steps=1, size=32)


def test_latte_renders_single_pictures():
    assert render(built("latte"), ["a"], [0], frames=1, steps=1, size=32).shape == (1, 1, 3, 32, 32)


def test_sliced_attention_changes_no_clip():
    model, sliced = built(), built(attention_slicing=True)
    before = [layer.processor for layer in sliced.sliceable()]
    assert before
    assert torch.allclose(render(sliced, ["a"], [0], 4, 1), render(model, ["a"], [0], 4, 1), atol=1e-4)
    assert [layer.processor for layer in sliced.sliceable()] == before  # training keeps its own


def test_channels_last_changes_no_clip():
    last = built(channels_last=True)
    assert last.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(render(last, ["a"], [0], 4, 1), render(built(), ["a"], [0], 4, 1), atol=1e-4)


def test_noise_to_start_from_and_its_share():
    model = built()
    own = render_latents(model, ["a", "b"], [3, 4], 4, 2, 5.0)
    noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    start = {"steps": 2, "guidance": 5.0, "frames": 4}
    none = render_latents(model, ["a", "b"], [3, 4], **start, noise=noise, share=0.0)
    assert torch.allclose(none, own, atol=1e-5)
    whole = render_latents(model, ["a", "a"], [3, 4], **start, noise=noise, share=1.0)
    assert torch.allclose(whole[0], whole[1], atol=1e-5)  # seeds have no say
    drawn = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(3)).transpose(1, 2)
    mixed = render_latents(model, ["a"], [3], **start, noise=0.3**0.5 * noise + 0.7**0.5 * drawn)
    assert torch.allclose(render_latents(model, ["a"], [3], **start, noise=noise, share=0.3), mixed, atol=1e-5)
    with pytest.raises(ValueError, match="frames and size"):
        render(model, ["a"], [3], frames=3, noise=noise)


def test_an_image_gives_every_frame_its_noise():
    model = built()
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    inverted = invert(model, encode_videos(model, image[:, None]), encode_prompts(model, ["a"]), 2)
    assert inverted.shape == (1, 1, 4, 8, 8)
    start = {"frames": 4, "steps": 2, "guidance": 1.0}
    wanted = render_latents(model, ["a"], [3], **start, noise=inverted.expand(-1, 4, -1, -1, -1))
    found = render_latents(model, ["a"], [3], **start, image=image)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert render(model, ["a"], [3], **start, image=image, share=0.5).shape == decode_videos(model, found).shape
    with pytest.raises(ValueError, match="one of them"):
        render(model, ["a"], [3], **start, image=image, noise=inverted)
