"""export, merge, import and inspect of video adapters: what is written is loaded by stock diffusers and compared."""

from __future__ import annotations

import json

import pytest
import torch

import visadapt as va
from tests.tiny import moved
from tests.tiny_video import video_base
from visadapt.backbones.video_diffusion import VideoDiffusion
from visadapt.cli.inspect import describe
from visadapt.cli.main import main

SPATIAL = r"re:unet\.\w+_blocks?\.\d*\.?attentions.*attn1\.to_q"
TEMPORAL = r"re:unet\..*(?:motion_modules|temp_attentions).*attn[12]\.to_(?:q|out\.0)"
FEW = {"spatial": [SPATIAL], "temporal": [TEMPORAL]}
WAN = {"spatial": [r"re:.*blocks\.0\.attn1\.to_q"], "temporal": [r"re:.*blocks\.\d\.(?:attn1\.to_v|ffn\.net\.2)"]}
LATTE = {"temporal": ["temporal.ff"]}


@pytest.fixture
def saved(here):
    """Saves both sets, away from their start; gives back the adapted model."""

    def save(family="animatediff", method=None, targets=FEW):
        model = VideoDiffusion(video_base(family)).build()
        for name, patterns in targets.items():
            va.adapt(model, method or va.LoRA(rank=2, alpha=3), patterns, name)
        va.save(moved(model, 0.1), "adapter.safetensors", base_name=video_base(family))
        return model.eval()

    return save


def run(*args, family="animatediff"):
    verb, file, *more = args
    return main([str(a) for a in (verb, file, "--backbone", video_base(family), *more)])


def certificate(path):
    found = json.loads(path.read_text())
    assert found["passed"]
    assert found["matched"] == found["tensors"]
    assert found["renders"]["frames"] > 1
    assert max(found["latents"], found["pixels"]) < 1e-4 < found["effect"]
    return found


@pytest.mark.slow
def test_a_file_for_wan_is_loaded_by_its_stock_pipeline(saved, here):
    model = saved("wan", targets=WAN)
    where = ["--format", "diffusers", "--output", "wan.safetensors"]
    assert run("export", "adapter.safetensors", *where, "--sets", "spatial", "temporal", family="wan") == 0
    assert certificate(here / "wan.certificate.json")["layers"] == len(va.adapters(model))
    assert dict(describe(here / "wan.safetensors").facts)["targets"].startswith("transformer: ")
    back = va.load(VideoDiffusion(video_base("wan")).build(), "wan.safetensors")
    assert len(va.adapters(back)) == len(va.adapters(model))
    with pytest.raises(ValueError, match="no tool knows a name"):
        va.export(model, here / "x.safetensors", format="kohya")


def test_the_motion_alone_is_written_for_animatediff(saved, here, capsys):
    model = saved()
    assert run("export", "adapter.safetensors", "--format", "diffusers", "--output", "motion") == 0
    told = capsys.readouterr().out
    assert "sets: temporal; without spatial" in told
    assert "pipe.load_lora_weights" in told
    found = certificate(here / "motion" / "certificate.json")
    assert found["updates"] == found["layers"] == len(va.adapters(model, "temporal"))
    card = (here / "motion" / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card
    assert "videos of 3 steps" in card
    facts = dict(describe(here / "motion").facts)
    assert facts["targets"].startswith("unet, motion modules: ")
    assert "AnimateDiffPipeline" in facts["diffusers"]


def test_both_sets_are_written_if_asked_for_and_read_back(saved, here):
    model = saved()
    where = ["--format", "diffusers", "--output", "both.safetensors", "--sets", "spatial", "temporal"]
    assert run("export", "adapter.safetensors", *where) == 0
    assert certificate(here / "both.certificate.json")["layers"] == len(va.adapters(model))
    assert run("import", "both.safetensors", "--output", "back.safetensors") == 0
    back = va.merge(va.load(VideoDiffusion(video_base()).build(), "back.safetensors"))
    ours = va.merge(model).state_dict()
    for key, tensor in back.state_dict().items():
        torch.testing.assert_close(tensor, ours[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("family", ["animatediff", "unet3d", "latte"])
def test_a_peft_folder_is_loaded_by_stock_peft(family, saved, here, capsys):
    saved(family, va.DoRA(rank=2) if family == "animatediff" else None, LATTE if family == "latte" else FEW)
    assert run("export", "adapter.safetensors", "--output", "peft", family=family) == 0
    assert certificate(here / "peft" / "certificate.json")["format"] == "peft"
    network = "transformer" if family == "latte" else "unet"
    assert f"PeftModel.from_pretrained(pipe.{network}," in capsys.readouterr().out
    assert sorted(p.name for p in (here / "peft").iterdir()) == ["README.md", "certificate.json", network]


@pytest.mark.parametrize("family", ["animatediff", pytest.param("wan", marks=pytest.mark.slow)])
def test_a_merged_pipeline_is_loaded_again_and_compared(family, saved, here, capsys):
    saved(family, va.LoHa(rank=2), WAN if family == "wan" else FEW)
    assert run("merge", "adapter.safetensors", "--output", "merged", family=family) == 0
    found = certificate(here / "merged" / "certificate.json")
    assert found["format"] == "merged"
    assert found["updates"] == found["layers"]
    assert VideoDiffusion("merged").build().family == family


def test_layers_that_trained_without_adapters_are_merged(here):
    model = VideoDiffusion(video_base()).build().requires_grad_(False)
    trained = dict(model.temporal_parameters())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05).requires_grad_(True)
    va.save(model, "full.safetensors", base_name=video_base())
    assert run("merge", "full.safetensors", "--output", "merged") == 0
    found = certificate(here / "merged" / "certificate.json")
    assert found["updates"] == len({name.rpartition(".")[0] for name in trained})


def test_what_no_stock_code_would_load_is_refused(saved, here, capsys):
    saved("unet3d")
    for format in ("diffusers", "kohya"):
        assert (
            run("export", "adapter.safetensors", "--format", format, "--output", "x.safetensors", family="unet3d") == 2
        )
        assert "loads no LoRA files in diffusers; take format 'peft'" in capsys.readouterr().err
    saved(targets={"temporal": ["temporal.proj"]})
    for format in ("diffusers", "peft"):
        assert run("export", "adapter.safetensors", "--format", format) == 2
        assert "by a keyword that PEFT does not take" in capsys.readouterr().err
    saved()
    assert run("export", "adapter.safetensors", "--format", "kohya", "--output", "x.safetensors") == 2
    assert "no tool knows a name for this layer in a kohya file" in capsys.readouterr().err
    assert run("export", "adapter.safetensors", "--sets", "motion") == 2
    assert "there is no set 'motion'" in capsys.readouterr().err
    assert not (here / "x.safetensors").exists()


def test_an_appearance_alone_is_a_file_of_stable_diffusion(saved, here):
    """Its layers are those of the image network, so kohya's file of them is one, too."""
    saved(targets={"spatial": FEW["spatial"]})
    assert run("export", "adapter.safetensors", "--format", "kohya", "--output", "x.safetensors") == 0
    certificate(here / "x.certificate.json")
