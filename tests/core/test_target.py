from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.tiny import tiny_vit
from visadapt.core.target import resolve


def names(targets, model=None, exclude=()):
    return [t.label for t in resolve(model or tiny_vit(), targets, exclude)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attn.qkv", ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        ("blocks.1.attn.qkv", ["blocks.1.attn.qkv"]),
        ("blocks.*.mlp.fc?", ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]),
        (r"re:blocks\.0\..*proj", ["blocks.0.attn.proj"]),
        ("type:Conv2d", ["patch_embed.proj"]),
        ("convs", ["patch_embed.proj"]),
        (["attn.qkv:q", "attn.qkv:v"], [f"blocks.{i}.attn.qkv:{p}" for i in (0, 1) for p in "qv"]),
        ("blocks.0.mlp.fc1:1/4", ["blocks.0.mlp.fc1:1/4"]),
        ("blocks.0.attn.qkv.weight", ["blocks.0.attn.qkv.weight"]),
    ],
)
def test_patterns(targets, expected):
    assert names(targets) == expected


def test_presets_cover_the_families():
    assert names("attention") == [f"blocks.{i}.attn.{n}" for i in (0, 1) for n in ("qkv", "proj")]
    assert names("mlp") == [f"blocks.{i}.mlp.fc{n}" for i in (0, 1) for n in (1, 2)]
    assert len(names("all")) == 10  # eight block Linears, the patch embedding, the head
    attends = nn.Sequential(nn.MultiheadAttention(8, 2))
    assert names("attention", attends) == ["0.in_proj_weight", "0.out_proj.weight"]


def test_a_model_may_bring_its_own_presets():
    model = tiny_vit()
    model.adapter_presets = {"attention": ["attn.proj"], "stem": ["patch_embed.proj"]}
    assert names("attention", model) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    assert names("stem", model) == ["patch_embed.proj"]


def test_exclude_and_rows():
    assert names("attn.qkv", exclude="blocks.0.*") == ["blocks.1.attn.qkv"]
    rows = {t.part: t.rows for t in resolve(tiny_vit(), ["blocks.0.attn.qkv:q", "blocks.0.attn.qkv:v"])}
    assert rows == {"q": (0, 32), "v": (64, 96)}


def test_the_last_pattern_on_a_site_sets_its_hyperparameters():
    model = va.adapt(tiny_vit(), va.LoRA(rank=4), {"attention": {}, "blocks.0.attn.qkv": {"rank": 2}})
    ranks = {path: a.rank for path, a in va.adapters(model).items()}
    assert ranks["blocks.0.attn.qkv.adapters.default"] == 2
    assert ranks["blocks.1.attn.qkv.adapters.default"] == 4


@pytest.mark.parametrize(
    ("targets", "exclude", "words"),
    [
        ("attn.qkw", (), "matches no layer of VisionTransformer; near misses: 'attn.qkv'"),
        ("atention", (), "'attention'"),
        ([], (), "no targets"),
        ("attn.qkv:3/3", (), "no part 3/3 of equal size"),
        ("head:q", (), "head has 10 outputs, which have no part q"),
        (["attn.qkv", "attn.qkv:q"], (), "name the same rows"),
        ("attn.qkv", "attn.qkv", "`exclude` leaves nothing"),
        ("attn.qkv", "nothing-like-it", "exclude pattern 'nothing-like-it' matches no layer"),
        ("re:(", (), "not a regular expression"),
    ],
)
def test_errors_say_what_to_do(targets, exclude, words):
    with pytest.raises(ValueError, match="(?s)") as error:
        resolve(tiny_vit(), targets, exclude)
    assert words in str(error.value)


def test_grouped_rows_are_refused():
    with pytest.raises(ValueError, match="grouped convolution, whose rows cannot be adapted alone"):
        resolve(nn.Sequential(nn.Conv2d(6, 6, 3, groups=3)), "0:1/2")


def test_dry_run_prints_and_leaves_the_model(capsys):
    model = tiny_vit()
    va.adapt(model, va.LoRA(rank=4), ["attn.qkv:q"], name="birds", dry_run=True)
    out = capsys.readouterr().out
    assert "blocks.1.attn.qkv:q" in out
    assert "birds" in out
    assert "512 trainable" in out
    assert not va.adapters(model)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.blocks[0].attn.qkv) is torch.nn.Linear
