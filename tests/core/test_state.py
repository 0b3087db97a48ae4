from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import visadapt as va
from tests.tiny import images, moved, tiny_vit
from visadapt.core.state import base_identity


@pytest.fixture
def file(tmp_path):
    model = va.adapt(tiny_vit(), va.LoRA(rank=3), {"attn.qkv:q": {}, "attn.qkv:v": {"rank": 2}})
    return va.save(moved(model), tmp_path / "adapter.safetensors", base_name="tiny")


def test_a_whole_plan_comes_back(tmp_path):
    model = va.adapt(tiny_vit(), va.LoRA(rank=3), {"attention": {}, "blocks.0.attn.qkv": {"rank": 2}}, name="one")
    va.adapt(model, va.DoRA(rank=2), ["mlp.fc1:0/2"], name="two")
    model.head.requires_grad_(True)
    with torch.no_grad():
        model.head.weight.add_(1)
    path = va.save(moved(model), tmp_path / "a.safetensors")
    fresh = va.load(tiny_vit(), path, strict=True)
    assert torch.equal(fresh(images()), model(images()))
    assert str(va.summary(fresh)) == str(va.summary(model))
    again = va.save(fresh, tmp_path / "b.safetensors")  # what was loaded is saved again, the head included
    assert torch.equal(va.load(tiny_vit(), again, strict=True)(images()), model(images()))


def test_a_file_with_a_trained_part_that_the_network_lacks_says_what_to_build(tmp_path):
    model = va.adapt(tiny_vit(), va.LoRA(rank=2), "attention")
    model.coarse = nn.Linear(2, 2)
    model.coarse.requires_grad_(True)
    path = va.save(model, tmp_path / "a.safetensors")
    bare = tiny_vit()
    with pytest.raises(ValueError, match=r"has no 'coarse.*load into `task.model`"):
        va.load(bare, path)
    assert not va.adapters(bare)


def test_the_file_holds_adapters_only(file):
    with safe_open(file, "pt") as f:
        plan = json.loads(f.metadata()["visadapt"])
        assert all(".adapters." in k for k in f.keys())
    assert plan["base"]["name"] == "tiny"
    assert plan["sets"][0]["method"] == "visadapt.methods.lora.LoRA"
    assert file.stat().st_size < 20_000


def test_another_base_warns_or_is_refused(file):
    with pytest.warns(UserWarning, match="trained on another base: tiny"):
        va.load(tiny_vit(seed=1), file)
    model = tiny_vit(seed=1)
    with pytest.raises(ValueError, match="trained on another base"):
        va.load(model, file, strict=True)
    assert not va.adapters(model)
    assert base_identity(tiny_vit().bfloat16().float())["sha256"] == base_identity(tiny_vit().bfloat16())["sha256"]


def test_two_files_side_by_side(file):
    model = va.load(va.load(tiny_vit(), file, name="one"), file, name="two")
    assert {a.name for a in va.adapters(model).values()} == {"one", "two"}
    with pytest.raises(ValueError, match="the set 'one' adapts it already"):
        va.load(model, file, name="one")
    assert {a.name for a in va.adapters(model).values()} == {"one", "two"}


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda p: p.unlink(), FileNotFoundError, "no adapter file at"),
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), ValueError, "not a complete safetensors file"),
        (lambda p: p.write_bytes(b"\x80\x04pickle"), ValueError, "adapters load from nothing else"),
        (lambda p: save_file({"x": torch.zeros(1)}, p), ValueError, "not an adapter of visadapt"),
    ],
)
def test_wrong_files(file, spoil, error, words):
    spoil(file)
    with pytest.raises(error, match=words):
        va.load(tiny_vit(), file)


def test_misfits_leave_the_model_alone(file):
    other = nn.Sequential(nn.Linear(3, 3))
    with (
        pytest.warns(UserWarning, match="another base"),
        pytest.raises(ValueError, match="matches no layer of Sequential"),
    ):
        va.load(other, file)
    assert type(other[0]) is nn.Linear
    with safe_open(file, "pt") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    plan = json.loads(metadata["visadapt"])
    plan["sets"][0]["method"] = "os.system"
    save_file(tensors, file, metadata={**metadata, "visadapt": json.dumps(plan)})
    with pytest.raises(ValueError, match="the method os.system is not known; import its module"):
        va.load(tiny_vit(), file)
    key, tensor = tensors.popitem()
    save_file(tensors, file, metadata=metadata)
    model = tiny_vit()
    with pytest.raises(ValueError, match="the file lacks 'blocks"):
        va.load(model, file)
    assert not va.adapters(model)
    save_file({**tensors, key: tensor[:, :1].clone()}, file, metadata=metadata)
    with pytest.raises(ValueError, match="in the file, .* in the model"):
        va.load(tiny_vit(), file)


def test_nothing_to_save_and_no_half_written_file(tmp_path):
    with pytest.raises(ValueError, match="nothing to save"):
        va.save(tiny_vit().requires_grad_(False), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_set_of_two_methods_takes_a_new_name(tmp_path):
    model = va.adapt(va.adapt(tiny_vit(), va.LoRA(rank=1), ["attn.qkv"]), va.DoRA(rank=1), ["mlp.fc1"])
    file = va.save(moved(model), tmp_path / "two.safetensors")
    found = va.load(tiny_vit(), file, name="mine")
    assert {adapter.name for adapter in va.adapters(found).values()} == {"mine"}
    assert torch.equal(found.eval()(images()), model.eval()(images()))


@pytest.mark.parametrize("method", [va.SALT(rank=2), va.LoLDU(rank=4)], ids=repr)
def test_directions_that_are_computed_from_the_weights_need_their_values(tmp_path, method):
    model = moved(va.adapt(tiny_vit(), method, "attention"))
    path = va.save(model, tmp_path / "a.safetensors")
    assert torch.equal(va.load(tiny_vit(), path, strict=True)(images()), model(images()))
    copy = tiny_vit().bfloat16()
    with pytest.raises(ValueError, match="computes directions from the weights"):
        va.load(copy, path)
    assert not va.adapters(copy)
    plain = va.save(moved(va.adapt(tiny_vit(), va.LoRA(rank=2), "attention")), tmp_path / "b.safetensors")
    assert va.adapters(va.load(copy, plain, strict=True))
