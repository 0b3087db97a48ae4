"""Several sets of several methods on one model: what each format holds of them, and what it refuses."""

from __future__ import annotations

import pytest

import visadapt as va
from tests.interop.conftest import largest, outputs
from tests.tiny import moved
from visadapt.interop.kohya_names import written_names

ATTENTION = ["unet.*.attn1.to_q", "unet.*.attn1.to_v", "text_encoder.*.v_proj"]
CONVS = ["unet.*.conv1", "unet.*.conv2"]


def mixed(model, *more):
    """LoRA on attention, FLoRA on convolutions, LoKr on text, and a second LoRA over the first at another strength."""
    va.adapt(model, va.LoRA(rank=3, alpha=5), ATTENTION, "subject")
    va.adapt(model, va.FLoRA(rank=4, scale=0.5), CONVS, "texture")
    va.adapt(model, va.LoKr(rank=2, alpha=3), ["text_encoder.*.fc1", "unet.*.to_k"], "words")
    va.adapt(model, va.LoRA(rank=2), ["unet.*.attn1.to_q", "unet.*.conv1"], "style")
    for method, targets, name in more:
        va.adapt(model, method, targets, name)
    moved(model, 0.1)
    va.strength(model, style=0.6)
    return model.eval()


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_stock_diffusers_renders_their_sum(format, base, pipeline, tmp_path):
    model = mixed(base())
    path = tmp_path / "mixed.safetensors"
    assert va.export(model, path, format=format) == 0.0
    stock = pipeline()
    stock.load_lora_weights(path)
    assert largest(outputs(stock), outputs(model)) < 1e-5
    assert largest(outputs(va.load(base(), path)), outputs(model)) < 1e-5


@pytest.mark.parametrize("format", ["lycoris", "comfyui", "peft"])
def test_every_other_format_gives_it_back(format, base, tmp_path):
    model = mixed(base())
    path = tmp_path / ("folder" if format == "peft" else "mixed.safetensors")
    assert va.export(model, path, format=format) == 0.0
    back = va.load(base(), path)
    assert largest(outputs(back), outputs(model)) < 1e-5
    kinds = {type(a).__name__ for a in va.adapters(back).values()}
    assert kinds == ({"LoRA"} if format == "peft" else {"LoRA", "LoKr", "FLoRA"})


def test_what_is_alone_on_its_layer_keeps_its_form(base, tmp_path):
    """Where two sets meet, on `conv1`, their sum is plain LoRA; the core of `conv2`, which one adapts, stays a core."""
    from safetensors.torch import load_file

    model = mixed(base())
    va.export(model, tmp_path / "m.safetensors", format="lycoris")
    keys, names = set(load_file(tmp_path / "m.safetensors")), written_names(model)
    both, alone = (names[f"unet.mid_block.resnets.0.conv{i}"] for i in (1, 2))
    assert f"{both}.lora_mid.weight" not in keys
    assert f"{both}.lora_up.weight" in keys
    assert f"{alone}.lora_mid.weight" in keys
    key = names["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert f"{key}.lokr_w1" in keys


@pytest.mark.parametrize("format", ["diffusers", "kohya", "lycoris", "comfyui", "peft"])
def test_a_magnitude_over_other_sets_is_refused_with_the_remedy(format, base, tmp_path):
    """DoRA scales what lies under it, so the sum is no low-rank update; an SVD says its error, a merge is exact."""
    model = mixed(base(), (va.DoRA(rank=2), ["unet.*.attn1.to_v"], "last"))
    path = tmp_path / ("folder" if format == "peft" else "m.safetensors")
    with pytest.raises(ValueError, match="is changed by .*DoRA.*; give `rank` .*, or merge"):
        va.export(model, path, format=format)
    assert not path.exists()
    assert 0 < va.export(model, path, format=format, rank=4) < 1
    wanted = outputs(model)
    assert largest(outputs(va.merge(model)), wanted) < 1e-5


def test_sets_that_are_switched_off_are_left_out(base, tmp_path):
    model = mixed(base())
    va.strength(model, style=0.0, words=0.0)
    assert va.export(model, tmp_path / "m.safetensors", format="lycoris") == 0.0
    back = va.load(base(), tmp_path / "m.safetensors")
    assert largest(outputs(back), outputs(model)) < 1e-5
    assert not any("fc1" in path for path in va.adapters(back))  # `words` alone acts there
    assert va.export(model, tmp_path / "folder") == 0.0
    assert largest(outputs(va.load(base(), tmp_path / "folder")), outputs(model)) < 1e-5
    va.strength(model, subject=0.0, texture=0.0)
    with pytest.raises(ValueError, match="or all are at strength 0"):
        va.export(model, tmp_path / "n.safetensors", format="kohya")


def test_the_certificate_of_a_mixed_set(tmp_path):
    from tests.diffusion_training import base as folder
    from visadapt.backbones import StableDiffusion
    from visadapt.report.certificate import certify

    model = mixed(StableDiffusion(folder()).build())
    va.export(model, tmp_path / "m.safetensors", format="kohya")
    found = certify(model, StableDiffusion(folder()).build, tmp_path / "m.safetensors", "kohya", steps=1)
    assert found.problems == []
    assert found.matched == found.tensors
    assert found.effect > 1e-3
