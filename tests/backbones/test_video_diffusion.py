"""Video networks from folders: order, presets, precision, checkpointing, stock pipelines, refusals."""

import json
import re
import shutil

import pytest
import torch
from torch import nn

import visadapt as va
from tests.diffusion_training import base
from tests.tiny_video import FRAMES, motion_adapter, video_base
from visadapt.backbones import StableDiffusion, VideoDiffusion
from visadapt.backbones.video_diffusion import pipeline
from visadapt.backbones.video_families import FAMILIES
from visadapt.backbones.video_latents import decode_videos, encode_videos
from visadapt.backbones.video_text import encode_prompts, null_text

UNETS = ["animatediff", "unet3d"]


def built(family, **options):
    return VideoDiffusion(video_base(family), **options).build()


def noisy(model, clips=2, frames=FRAMES, dtype=torch.float32):
    channels = model.network.config.in_channels
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(clips, frames, channels, 8, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.tensor([3, 700][:clips])


def adapted(model, targets=("spatial", "temporal")):
    va.adapt(model, va.LoRA(rank=2), list(targets))
    generator = torch.Generator().manual_seed(2)
    for adapter in va.adapters(model).values():
        nn.init.normal_(adapter.down, std=0.1, generator=generator)
        nn.init.normal_(adapter.up, std=0.1, generator=generator)
    return model


def layers(model, preset):
    va.adapt(model, va.LoRA(rank=1), preset, "x")
    found = [name.partition(".adapters.")[0] for name in va.adapters(model)]
    va.remove(model)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_are_the_second_dimension_and_clips_do_not_see_each_other(family):
    model = built(family)
    assert model.family == family
    x, times = noisy(model)
    text = encode_prompts(model, ["a", "b c"])
    found = model(x, times, text)
    assert found.shape == x.shape
    one, two = ({key: value[i : i + 1] for key, value in text.items()} for i in range(2))
    alone = torch.cat([model(x[:1], times[:1], one), model(x[1:], times[1:], two)])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    assert model(x[:, :1], times, text).shape == x[:, :1].shape  # pictures


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_changes_with_its_neighbours_by_temporal_layers_alone(family):
    model = built(family)
    if model.split == "sequential":
        pytest.skip("every layer sees space and time")
    for name, parameter in model.temporal_parameters():
        if re.search(r"proj_out|conv4\.3|to_out|net\.2", name):
            nn.init.zeros_(parameter)
    x, times = noisy(model, clips=1)
    if family == "latte":  # whose positions in time stand outside its blocks
        model.transformer.temp_pos_embed.zero_()
    text = encode_prompts(model, ["a"])
    single = torch.cat([model(x[:, f : f + 1], times, text) for f in range(FRAMES)], 1)
    torch.testing.assert_close(model(x, times, text), single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_are_disjoint_and_complete(family):
    model = built(family)
    linears = {n for n, m in model.network.named_modules() if isinstance(m, nn.Linear) and re.search(r"attn|ff", n)}
    linears = {f"{model.spec.network}.{name}" for name in linears}
    spatial, temporal = set(layers(model, "spatial")), set(layers(model, "temporal"))
    if model.split == "sequential":
        assert spatial == temporal
    else:
        assert not spatial & temporal
        assert all(model.spec.is_temporal(name) for name in temporal)
        assert not any(model.spec.is_temporal(name) for name in linears - temporal)
    cross = set(layers(model, "spatial.cross"))
    assert spatial | temporal | cross == linears
    assert not cross & (spatial | temporal)
    for kind, whole in (("spatial", spatial), ("temporal", temporal)):
        parts = layers(model, f"{kind}.attention") + layers(model, f"{kind}.ff")
        assert sorted(parts) == sorted(whole)


@pytest.mark.parametrize("family", UNETS)
def test_every_layer_over_time_is_in_a_preset(family):
    model = built(family)
    found = {
        name for preset in model.adapter_presets if preset.startswith("temporal.") for name in layers(model, preset)
    }
    kinds = (nn.Linear, nn.Conv3d)
    wanted = {n for n, m in model.named_modules() if isinstance(m, kinds) and model.spec.is_temporal(n)}
    assert found == wanted


def test_counts_on_the_full_networks():
    """On ModelScope's, MotionDirector's 9 M and 12 M (Zhao et al. 2023, arXiv 2310.08465)."""
    from diffusers import UNet3DConditionModel, UNetMotionModel

    def counts(family, network, preset):
        model = nn.Module()
        model.unet = network
        model.adapter_presets = FAMILIES[family].presets(model)
        found = va.adapters(va.adapt(model, va.LoRA(rank=32), preset, preset), preset)
        return len(found), sum(p.numel() for adapter in found.values() for p in adapter.parameters())

    with torch.device("meta"):
        scope = UNet3DConditionModel(cross_attention_dim=1024, attention_head_dim=64)
        motion = UNetMotionModel(cross_attention_dim=768)
    assert counts("unet3d", scope, "spatial") == (96, 8_785_920)
    assert counts("unet3d", scope, "temporal") == (170, 12_472_320)
    assert counts("animatediff", motion, "spatial") == (96, 8_785_920)  # as many: both are Stable Diffusion's
    assert counts("animatediff", motion, "temporal")[0] == 21 * 10


@pytest.mark.parametrize("family", FAMILIES)
def test_temporal_sets_cost_a_picture_nothing(family):
    """At strength 0 they neither act nor get a gradient: the spatial step of MotionDirector."""
    model = built(family)
    va.adapt(model, va.LoRA(rank=1), "temporal", "motion")
    va.adapt(model, va.LoRA(rank=1), "spatial", "looks", freeze=False)
    x, times = noisy(model, frames=1)
    with va.strength(model, motion=0.0):
        model(x, times, encode_prompts(model, ["a", "b"])).sum().backward()
    assert all(p.grad is None for a in va.adapters(model, "motion").values() for p in a.parameters())
    assert all(a.up.grad.abs().sum() > 0 for a in va.adapters(model, "looks").values())


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_and_leanness_change_no_gradient(family):
    found = []
    for options in ({"lean": False}, {"lean": True}, {"grad_checkpointing": True}):
        model = adapted(built(family, **options).double())
        x, times = noisy(model, dtype=torch.float64)
        y = model(x, times, encode_prompts(model, ["a", "b"]))
        y.square().mean().backward()
        found.append((y.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    for y, gradients in found[1:]:
        torch.testing.assert_close(y, found[0][0], rtol=1e-9, atol=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_keeps_less(family):
    from benchmarks import _counts

    kept = []
    for options in ({}, {"grad_checkpointing": True}):
        model = adapted(built(family, **options))
        x, times = noisy(model)
        with torch.no_grad():
            text = encode_prompts(model, ["a", "b"])
        kept.append(_counts.saved_bytes(lambda m=model, i=(x, times, text): m(*i), model).kept)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_base_with_fp32_adapters(family):
    model, exact = adapted(built(family, base_dtype="bfloat16")), adapted(built(family))
    assert {a.up.dtype for a in va.adapters(model).values()} == {torch.float32}
    x, times = noisy(model)
    found = model(x, times, encode_prompts(model, ["a", "b"]))
    assert found.dtype == torch.float32
    wanted = exact(x, times, encode_prompts(exact, ["a", "b"]))
    assert (found - wanted).abs().max() < 0.06 * wanted.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_saved_and_load_again(family, tmp_path):
    model = adapted(built(family))
    x, times = noisy(model)
    text = encode_prompts(model, ["a", "b"])
    path = va.save(model, tmp_path / "motion.safetensors")
    again = va.load(built(family), path)
    assert torch.equal(again(x, times, text), model(x, times, text))


def test_an_appearance_adapter_of_text_to_image_loads_by_name(tmp_path):
    picture = StableDiffusion(base()).build()
    adapted(picture, ["unet.attention", "unet.convs", "text"])
    path = va.save(picture, tmp_path / "looks.safetensors")
    folder = shutil.copytree(base(), tmp_path / "base")
    motion_adapter().save_pretrained(folder / "motion_adapter")
    model = VideoDiffusion(str(folder)).build()
    for name, parameter in model.temporal_parameters():
        if "proj_out" in name:
            nn.init.zeros_(parameter)
    with pytest.warns(UserWarning, match="another base"):  # motion modules are new to it
        va.load(model, path)
    assert len(va.adapters(model)) == len(va.adapters(picture))
    x, times = noisy(model)
    text = encode_prompts(model, ["a", "b"])
    frames = torch.stack([picture(x[:, f], times, text) for f in range(FRAMES)], 1)  # motion modules add nothing
    torch.testing.assert_close(model(x, times, text), frames, rtol=1e-4, atol=1e-5)


def test_videos_become_latents_frame_by_frame():
    model = built("animatediff")
    videos = torch.rand(2, 3, 3, 32, 64) * 2 - 1
    wanted = model.vae.encode(videos[1]).latent_dist.mean * model.vae.config.scaling_factor
    found = encode_videos(model, videos, chunk=2)
    assert found.shape == (2, 3, 4, 8, 16)
    torch.testing.assert_close(found[1], wanted, rtol=1e-4, atol=1e-5)
    back = decode_videos(model, found, chunk=4)
    assert back.shape == videos.shape
    assert 0 <= back.min() <= back.max() <= 1
    with pytest.raises(ValueError, match="clips, frames"):
        encode_videos(model, videos[0])


def test_lattes_padding_is_not_attended_to():
    model = built("latte")
    x, times = noisy(model)
    text = encode_prompts(model, ["a b", "A longer one "])
    found = model(x, times, text)
    for row in range(2):
        length = int(text["mask"][row].sum())
        assert length < 20
        cut = text["embeddings"][row : row + 1, :length]
        own = model.transformer(x[row : row + 1].transpose(1, 2), times[row : row + 1], cut, return_dict=False)[0]
        torch.testing.assert_close(found[row], own[0, :4].transpose(0, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=rf"2 frames.*{FRAMES}"):
        model(x[:, :2], times, text)


def test_wans_latents_are_normalised_and_its_frames_come_in_fours():
    model = built("wan")
    video = torch.rand(1, 5, 3, 32, 32) * 2 - 1
    found = encode_videos(model, video)
    assert found.shape == (1, 2, 4, 4, 4)
    raw = model.vae.encode(video.transpose(1, 2)).latent_dist.mean[:, 2, :]  # the third channel: mean 0.3, std 1.5
    torch.testing.assert_close(found[:, :, 2], (raw - 0.3) / 1.5, rtol=1e-4, atol=1e-5)
    assert decode_videos(model, found).shape == video.shape
    assert encode_videos(model, video[:, :1]).shape == (1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="4 frames.*1, 5, 9"):
        encode_videos(model, video[:, :4])
    kept = built("wan", base_dtype="bfloat16")
    assert kept.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert kept.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert kept.vae.post_quant_conv.weight.dtype == torch.float32


def test_clips_may_not_be_longer_than_the_positions():
    model = built("animatediff")
    assert (model.frames, model.fps) == (8, 8.0)
    x, times = noisy(model, frames=9)
    with pytest.raises(ValueError, match="9 frames.*positions for 8"):
        model(x, times, null_text(model))
    longer = VideoDiffusion(video_base("animatediff"), frames=4, fps=12).build()
    assert (longer.frames, longer.fps) == (4, 12)


def test_a_pipeline_folder_with_motion_modules_inside(tmp_path):
    model = built("animatediff")
    pipeline(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "AnimateDiffPipeline"
    again = VideoDiffusion(str(tmp_path)).build()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), again.parameters(), strict=True))
    x, times = noisy(model, clips=1)
    wanted = model(x, times, null_text(model))
    # Weights that were read from a file lie otherwise aligned in memory, so that sums may be rounded otherwise.
    torch.testing.assert_close(again(x, times, null_text(again)), wanted, rtol=1e-4, atol=1e-5)
    for _, parameter in model.temporal_parameters():
        nn.init.constant_(parameter, 0.1)
    pipeline(model).save_pretrained(tmp_path)
    other = VideoDiffusion(str(tmp_path), motion_adapter=f"{video_base()}/motion_adapter").build()
    torch.testing.assert_close(other(x, times, null_text(other)), wanted, rtol=1e-4, atol=1e-5)


def test_a_motion_adapter_in_the_repository_is_of_the_same_revision_and_variant(tmp_path, monkeypatch):
    from diffusers import MotionAdapter, StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(video_base()).save_pretrained(tmp_path, variant="fp16")
    motion_adapter().save_pretrained(tmp_path / "motion_adapter", variant="fp16")
    asked, load = [], MotionAdapter.from_pretrained

    def record(*args, **options):
        asked.append(options)
        return load(*args, **options)

    monkeypatch.setattr(MotionAdapter, "from_pretrained", record)
    model = VideoDiffusion(str(tmp_path), variant="fp16", revision="main").build()
    assert asked == [{"subfolder": "motion_adapter", "revision": "main", "variant": "fp16"}]
    assert any("motion_modules" in name for name, _ in model.named_parameters())
    VideoDiffusion(str(tmp_path), motion_adapter=f"{video_base()}/motion_adapter", variant="fp16").build()
    assert asked[1] == {}, "another repository has its own"


def test_what_is_no_video_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without motion modules.*motion_adapter"):
        VideoDiffusion(base()).build()
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline"):
        VideoDiffusion(base("sdxl")).build()
    with pytest.raises(ValueError, match=r"family: 'x' is unknown.*animatediff"):
        VideoDiffusion(video_base(), family="x").build()
    with pytest.raises(ValueError, match="motion_adapter"):
        VideoDiffusion(video_base("unet3d"), motion_adapter=video_base() + "/motion_adapter").build()
    with pytest.raises(ValueError, match="attention_slicing.*wan"):
        built("wan", attention_slicing=True)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="folders and hub ids"):
        VideoDiffusion(str(tmp_path / "x.safetensors")).build()
