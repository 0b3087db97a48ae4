"""Embedding files of SDXL's two encoders: stock diffusers loads both, and the certificate compares them."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import visadapt as va
from tests.diffusion_training import base
from visadapt.backbones import StableDiffusion
from visadapt.backbones.sd_render import render
from visadapt.backbones.sd_text import encode_prompts, spelt_out
from visadapt.backbones.sd_tokens import NewToken, add_tokens, export_tokens, extended
from visadapt.backbones.stable_diffusion import pipeline


@pytest.fixture
def trained():
    """An SDXL with a word of two vectors and one of one, away from their start."""
    model = StableDiffusion(base("sdxl")).build()
    add_tokens(model, [NewToken("<x>", init="dog", vectors=2), NewToken("<y>")])
    for table in extended(model):
        nn.init.normal_(table.new_tokens, std=0.5)
    return model


def loaded(files):
    """A fresh base into which stock diffusers has loaded the files, once for each encoder."""
    model = StableDiffusion(base("sdxl")).build()
    stock = pipeline(model)
    for file in files:
        with safe_open(file, "pt") as held:
            token = held.metadata()["token"]
        tensors = load_file(file)
        assert set(tensors) == {"clip_l", "clip_g"}
        for key, encoder, tokenizer in (
            ("clip_l", stock.text_encoder, stock.tokenizer), ("clip_g", stock.text_encoder_2, stock.tokenizer_2),
        ):  # fmt: skip
            stock.load_textual_inversion(tensors[key], token=token, text_encoder=encoder, tokenizer=tokenizer)
    return model, stock


def test_both_encoders_of_sdxl_read_their_vectors(trained, tmp_path):
    files = export_tokens(trained, tmp_path)
    assert [file.name for file in files] == ["x.safetensors", "y.safetensors"]
    model, stock = loaded(files)
    text = "a photo of <x> on <y>"
    assert spelt_out(trained.tokenizer, text) == stock.maybe_convert_prompt(text, stock.tokenizer)
    wanted = encode_prompts(trained, [text])
    found = encode_prompts(model, [text])
    assert set(found) == {"embeddings", "pooled"}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    plain = encode_prompts(StableDiffusion(base("sdxl")).build(), [text])
    assert not torch.allclose(plain["embeddings"], wanted["embeddings"], atol=1e-2)


def test_the_certificate_covers_adapters_and_words_of_sdxl(trained, tmp_path):
    from visadapt.report.certificate import certify

    va.adapt(trained, va.LoRA(rank=1), ["unet.cross"])
    for adapter in va.adapters(trained).values():
        nn.init.normal_(adapter.up, std=0.1)
    va.export(trained, tmp_path / "l.safetensors", format="diffusers")
    tokens = export_tokens(trained, tmp_path)
    given = (StableDiffusion(base("sdxl")).build, tmp_path / "l.safetensors", "diffusers")
    found = certify(trained, *given, tokens=tokens, prompts=(), steps=1)
    assert not found.problems
    assert found.renders["prompts"] == ["a photo of <x>", "a photo of <y>"]
    with torch.no_grad():
        extended(trained)[1].new_tokens.add_(1.0)  # clip_g no longer as in the file
    changed = certify(trained, *given, tokens=tokens, prompts=(), steps=1)
    assert any("deviate" in problem for problem in changed.problems)
    assert render(trained, ["<x>"], [0], steps=1).isfinite().all()
