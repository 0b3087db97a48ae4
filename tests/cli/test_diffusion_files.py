"""export, merge, import and inspect on a tiny Stable Diffusion; what is written is loaded by stock diffusers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import visadapt as va
from tests.tiny import moved
from tests.tiny_diffusion import tiny_pipeline
from visadapt.cli.inspect import describe
from visadapt.cli.main import main

TARGETS = ["unet.*.attn2.to_q", "unet.*.attn2.to_v", "unet.*.conv1", "text_encoder.*.v_proj", "text_encoder.*.fc1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a saved pipeline."""
    return str(tiny_pipeline(tmp_path_factory.mktemp("base")))


@pytest.fixture
def saved(base, here):
    """Saves an adapter of a method, away from its start; gives back the adapted model."""
    from visadapt.backbones.stable_diffusion import StableDiffusion

    def save(method, scale=0.1, tokens=()):
        from visadapt.backbones import sd_tokens

        model = StableDiffusion(base).build()
        if tokens:
            sd_tokens.add_tokens(model, tokens)
        va.adapt(model, method, TARGETS)
        for table in sd_tokens.extended(model):
            table.new_tokens.requires_grad_(True)
        model = moved(model, scale) if scale else model
        va.save(model, "adapter.safetensors", base_name=base, extra=sd_tokens.metadata(model))
        return model.eval()

    return save


def run(*args):
    return main([str(a) for a in args])


def exported(base, format, output, *more):
    return run("export", "adapter.safetensors", "--backbone", base, "--format", format, "--output", output, *more)


@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya", "lycoris"])
def test_export_certifies_what_it_wrote(format, saved, base, here, capsys):
    saved(va.LoRA(rank=3, alpha=5))
    out = here / "out" / ("x.safetensors" if format in ("kohya", "lycoris") else "folder")
    assert exported(base, format, out) == 0
    told = capsys.readouterr().out
    assert "exact" in told
    path = out / "certificate.json" if out.is_dir() else out.with_suffix(".certificate.json")
    found = json.loads(path.read_text())
    assert found["passed"]
    assert found["matched"] == found["tensors"] >= 2 * found["layers"] >= 2 * found["updates"] > 20
    assert max(found["latents"], found["pixels"]) < 1e-4 < found["effect"]
    assert set(found["versions"]) >= {"torch", "diffusers", "peft"}
    assert ("stock" in found["loader"].split()) == (format != "lycoris")
    told = dict(describe(out).facts)
    if format == "peft":
        assert told["unet method"] == "LORA"
    else:
        assert told["method"] == "LoRA"
        assert told["rank"] == ("1, 3" if format == "kohya" else "3")  # 1: an out_proj by which diffusers knows it
    if out.is_dir():
        card = (out / "README.md").read_text()
        assert "## Parity certificate" in card
        assert found["sha256"] in card


def test_the_card_of_the_run_says_it_once(saved, base, here):
    saved(va.LoRA(rank=2))
    (here / "run.json").write_text("{}")
    (here / "README.md").write_text("# A run\n\n## Use it\n")
    for name in ("one.safetensors", "two.safetensors"):
        assert exported(base, "kohya", name) == 0
    card = (here / "README.md").read_text()
    assert card.startswith("# A run\n\n## Use it\n")
    assert card.count("## Parity certificate") == 1
    assert "two.safetensors" in card


def test_a_file_that_does_nothing_is_rejected(saved, base, here, capsys):
    saved(va.LoRA(rank=2), scale=0)
    assert exported(base, "kohya", "z.safetensors") == 2
    assert "the update is zero" in capsys.readouterr().err
    assert not (here / "z.safetensors").exists()
    assert (here / "z.safetensors.rejected").is_file()
    assert not (here / "z.certificate.json").exists()


def test_an_approximation_passes_only_with_a_tolerance(saved, base, here, capsys):
    saved(va.DoRA(rank=2), 0.02)
    assert exported(base, "kohya", "d.safetensors") == 2
    assert "give `rank`" in capsys.readouterr().err
    assert exported(base, "kohya", "d.safetensors", "--rank", 2) == 2
    assert "--tolerance says how much" in capsys.readouterr().err
    assert exported(base, "kohya", "d.safetensors", "--rank", 2, "--tolerance", 10) == 0
    assert "largest relative error of a layer" in capsys.readouterr().out


def test_what_the_loader_drops_is_noticed(saved, base, here, monkeypatch):
    """The magnitudes of a text encoder under the name that transformers 5 does not read."""
    from visadapt.interop import diffusers_file

    saved(va.DoRA(rank=2))
    monkeypatch.setattr(diffusers_file, "_TEXT_NAMES", diffusers_file._NAMES)
    assert exported(base, "diffusers", "out") == 2
    monkeypatch.undo()


def test_new_words_travel_as_embeddings(saved, base, here, capsys):
    from visadapt.backbones.sd_tokens import NewToken

    saved(va.LoRA(rank=2), tokens=[NewToken("<sks>", init="dog", vectors=2)])
    assert exported(base, "diffusers", "out") == 0
    assert "load_textual_inversion" in capsys.readouterr().out
    found = json.loads((here / "out" / "certificate.json").read_text())
    assert any("<sks>" in prompt for prompt in found["renders"]["prompts"])


def test_merge_writes_a_pipeline(saved, base, here, capsys):
    from diffusers import DiffusionPipeline

    from visadapt.backbones.stable_diffusion import StableDiffusion

    model = saved(va.LoHa(rank=3))
    assert run("merge", "adapter.safetensors", "--backbone", base, "--output", "merged") == 0
    assert "from_pretrained" in capsys.readouterr().out
    stock = DiffusionPipeline.from_pretrained("merged")
    va.merge(model)
    for part in ("unet", "text_encoder", "vae"):
        state = getattr(stock, part).state_dict()
        for key, tensor in getattr(model, part).state_dict().items():
            torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-6)
    assert all(key.startswith("text_model.") for key in load_file("merged/text_encoder/model.safetensors"))
    assert StableDiffusion("merged").build().layout == "sd"
    (here / "taken").mkdir()
    (here / "taken" / "thesis.txt").write_text("mine")
    assert run("merge", "adapter.safetensors", "--backbone", base, "--output", "taken") == 2
    assert (here / "taken" / "thesis.txt").read_text() == "mine"


def test_import_is_the_inverse_of_export(saved, base, here):
    from visadapt.backbones.stable_diffusion import StableDiffusion

    model = va.merge(saved(va.DoRA(rank=2, alpha=6)))
    assert exported(base, "comfyui", "c.safetensors") == 0
    assert run("import", "c.safetensors", "--backbone", base, "--output", "back.safetensors") == 0
    back = va.merge(va.load(StableDiffusion(base).build(), "back.safetensors"))
    for (key, ours), theirs in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6, msg=key)


def kohya(alphas=(4.0, 4.0), width=768, **more):
    found = {}
    for alpha, leaf in zip(alphas, ("attn2_to_k", "attn2_to_v")):
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{leaf}"
        found |= {f"{name}.lora_down.weight": torch.zeros(4, width), f"{name}.lora_up.weight": torch.zeros(320, 4)}
        found |= {f"{name}.alpha": torch.tensor(alpha, dtype=torch.bfloat16)}
        found |= {f"{name}.{key}": tensor.clone() for key, tensor in more.items()}
    return found


FILES = {
    "plain": (kohya(), {"method": "LoRA", "rank": "4", "alpha": "4", "diffusers": "loads", "ComfyUI": "loads"}),
    "alphas": (kohya((4.0, 2.0)), {"alpha": "2, 4", "diffusers": "loses alphas"}),
    "dora": (
        kohya(dora_scale=torch.ones(320, 1)),
        {"method": "DoRA", "diffusers": "drops dora_scale", "ComfyUI": "comfyui"},
    ),
    "xl": (kohya(width=2048), {"base": "SDXL"}),
    "lokr": (
        {"lora_unet_conv_in.lokr_w1": torch.zeros(2, 2), "lora_unet_conv_in.lokr_w2": torch.zeros(8, 2, 3, 3)},
        {"method": "LoKr", "rank": "whole right factors", "diffusers": "refuses it", "visadapt": "loads"},
    ),
    "lycoris": (
        {"lycoris_conv_in.hada_w1_b": torch.zeros(3, 36)},
        {"method": "LoHa", "rank": "3", "diffusers": "does not"},
    ),
    "diffusers": (
        {
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 8),
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.zeros(8),
        },
        {"method": "DoRA", "targets": "text_encoder: self_attn_q_proj ×1", "diffusers": "dropped silently"},
    ),
    "inversion": ({"<sks>": torch.zeros(2, 768)}, {"vectors": "2 of 768"}),
    "full": ({"model.diffusion_model.out.2.weight": torch.zeros(1)}, {"loads in": "from_single_file"}),
}
KINDS = {"inversion": "textual inversion", "full": "full checkpoint", "diffusers": "diffusers", "lycoris": "kohya / Ly"}


@pytest.mark.parametrize("name", FILES)
def test_inspect_says_what_loads_where(name, here):
    tensors, wanted = FILES[name]
    save_file(tensors, "file.safetensors")
    found = describe(here / "file.safetensors")
    assert found.kind.startswith(KINDS.get(name, "kohya")), found.kind
    facts = dict(found.facts)
    for key, part in wanted.items():
        assert part in facts[key], (key, facts[key])


def test_the_hub_is_asked_for_hub_ids_alone(here, monkeypatch):
    """The shipped base has a name without an owner; asking for it cost a request and, offline, half a minute."""
    from diffusers import DiffusionPipeline

    from visadapt.cli.diffusion_files import is_video_base

    asked = []
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda name: asked.append(name) or {"_class_name": "x"})
    assert not any(map(is_video_base, ("tiny_sd", "/nowhere", "./nowhere", "vit_base_patch16_224", "owner/name")))
    assert is_video_base("tiny_video")
    assert asked == ["owner/name"]
