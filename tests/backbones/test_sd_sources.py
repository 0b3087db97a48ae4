"""Where a Stable Diffusion comes from: one file, a hub id, SD 2.x; what none of them is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import visadapt as va
from tests.diffusion_training import base
from visadapt.backbones import StableDiffusion
from visadapt.backbones.sd_render import render
from visadapt.interop.kohya_names import _original


def original_unet(name, unet):
    """The LDM name of a parameter of diffusers' UNet: norms beside the layers that our own table knows."""
    module, _, end = name.rpartition(".")
    if module == "conv_norm_out":
        return f"out.0.{end}"
    for norm, conv, ours, theirs in (
        ("norm1", "conv1", "in_layers.2", "in_layers.0"), ("norm2", "conv2", "out_layers.3", "out_layers.0"),
    ):  # fmt: skip
        if re.search(rf"resnets\.\d+\.{norm}$", module):
            return f"{_original(module.removesuffix(norm) + conv, unet)}".replace(ours, theirs) + f".{end}"
    return f"{_original(module, unet)}.{end}"


def original_vae(name, levels):
    """The LDM name of a parameter of diffusers' VAE."""
    up = re.search(r"up_blocks\.(\d+)", name)
    name = name if up is None else name.replace(up[0], f"up.{levels - 1 - int(up[1])}")
    for ours, theirs in (
        ("down_blocks.", "down."), (".resnets.", ".block."), (".downsamplers.0.", ".downsample."),
        (".upsamplers.0.", ".upsample."), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
        ("mid_block.block.0", "mid.block_1"), ("mid_block.block.1", "mid.block_2"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A pipeline's weights in one file of SD 1.x' own layout, and its folder without weights."""
    folder = tmp_path_factory.mktemp("single")
    shutil.copytree(base(), folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    model = StableDiffusion(base()).build()
    held = {f"model.diffusion_model.{original_unet(k, model.unet)}": v for k, v in model.unet.state_dict().items()}
    levels = len(model.vae.config.up_block_types)
    held |= {f"first_stage_model.{original_vae(k, levels)}": v for k, v in model.vae.state_dict().items()}
    prefix = "cond_stage_model.transformer.text_model."
    held |= {prefix + k: v for k, v in model.text_encoder.state_dict().items() if "position_ids" not in k}
    assert not any("None" in key for key in held)
    save_file({k: v.contiguous().clone() for k, v in held.items()}, folder / "sd.safetensors")
    return folder


def test_one_file_with_all_weights(single):
    model = StableDiffusion(str(single / "sd.safetensors"), config=str(single / "config")).build()
    wanted = StableDiffusion(base()).build()
    for (name, ours), theirs in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(render(model, ["a"], [0], steps=1), render(wanted, ["a"], [0], steps=1))
    va.adapt(model, va.LoRA(rank=1), "unet.attention")


def test_one_file_without_network_asks_for_its_configuration(single, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"sd\.safetensors' cannot be loaded.*without network give `config`"):
        StableDiffusion(str(single / "sd.safetensors")).build()


def test_one_file_of_another_kind_is_refused(tmp_path):
    refiner = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
    save_file({refiner: torch.zeros(2)}, tmp_path / "refiner.safetensors")
    with pytest.raises(ValueError, match="it holds a xl_refiner; StableDiffusion takes the base models"):
        StableDiffusion(str(tmp_path / "refiner.safetensors"), config=base()).build()


def test_the_refiner_of_sdxl_is_refused(tmp_path):
    shutil.copytree(base("sdxl"), tmp_path / "refiner")
    path = tmp_path / "refiner" / "model_index.json"
    index = json.loads(path.read_text()) | {"text_encoder": [None, None], "tokenizer": [None, None]}
    path.write_text(json.dumps(index | {"_class_name": "StableDiffusionXLImg2ImgPipeline"}))
    with pytest.raises(ValueError, match="SDXL's refiner; give the base model"):
        StableDiffusion(str(tmp_path / "refiner")).build()


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_sd2_predicts_velocity_and_its_files_load(format, tmp_path):
    from visadapt.backbones.stable_diffusion import pipeline
    from visadapt.interop.diffusers_file import FILE

    source = base("sd2", prediction_type="v_prediction")
    model = StableDiffusion(source).build()
    assert (model.prediction, model.sampler.config.prediction_type) == ("v_prediction", "v_prediction")
    va.adapt(model, va.LoRA(rank=2), ["unet.attention", "unet.proj", "text.attention"])
    for adapter in va.adapters(model).values():
        torch.nn.init.normal_(adapter.up, std=0.1)
    file = tmp_path / (FILE if format == "diffusers" else "x.safetensors")
    assert va.export(model, file, format=format) == 0.0
    assert any(key.endswith(("proj_in.lora_A.weight", "proj_in.lora_down.weight")) for key in load_file(file))
    fresh = StableDiffusion(source).build()
    stock = pipeline(fresh)
    stock.load_lora_weights(tmp_path, weight_name=file.name)
    wanted = render(model, ["a"], [0], steps=2)
    assert torch.allclose(render(fresh, ["a"], [0], steps=2), wanted, atol=1e-4)
    assert not torch.allclose(render(StableDiffusion(source).build(), ["a"], [0], steps=2), wanted, atol=1e-2)


SCRIPT = """
import sys, torch
from visadapt.backbones import StableDiffusion
ours, theirs = StableDiffusion("someone/tiny").build(), StableDiffusion(sys.argv[1]).build()
assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
try:
    StableDiffusion("someone/absent").build()
except ValueError as error:
    print(error)
"""


@pytest.mark.slow  # a process of its own: the hub's library reads its settings when it is imported
def test_a_hub_id_comes_from_the_cache(tmp_path):
    cached = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(base(), cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, base()], capture_output=True, text=True, env=env, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert "'someone/absent' cannot be loaded" in done.stdout
