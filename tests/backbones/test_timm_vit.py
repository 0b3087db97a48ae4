"""TimmViT: weights, heads, presets and transforms of real timm models; one clear error for each bad input."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import visadapt as va
from visadapt.backbones import TimmViT
from visadapt.backbones.presets import presets

VIT = "vit_tiny_patch16_224"
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny(**arguments):
    return TimmViT(**({"name": VIT, "img_size": 32, "options": TINY} | arguments))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of four classes, in half precision."""
    model = tiny(pretrained=False).build(4)
    path = tmp_path / "base.safetensors"
    save_file({k: v.half() for k, v in model.state_dict().items()}, path, metadata={"format": "pt"})
    return path, model


def test_the_head_is_kept_for_the_same_classes(checkpoint):
    path, model = checkpoint
    backbone = tiny(checkpoint=str(path))
    loaded = backbone.build(4)
    assert not backbone.new_head
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].half().float()), name


def test_another_number_of_classes_gives_a_new_head_at_zero(checkpoint):
    path, model = checkpoint
    backbone = tiny(checkpoint=str(path))
    loaded = backbone.build(7)
    assert backbone.new_head
    assert loaded.head.weight.shape == (7, 32)
    assert not loaded.head.weight.any()
    assert torch.equal(loaded.norm.weight, model.norm.weight)
    assert tiny(checkpoint=str(path)).build().num_classes == 4


def test_other_class_names_give_a_new_head(checkpoint):
    path, _ = checkpoint
    path.with_suffix(".json").write_text(json.dumps({"class_names": ["a", "b", "c", "d"]}))
    for names, new in [(["a", "b", "c", "d"], False), (["d", "c", "b", "a"], True), (None, False)]:
        backbone = tiny(checkpoint=str(path))
        backbone.build(4, names)
        assert backbone.new_head is new


def test_a_pth_checkpoint_loads_as_well(tmp_path):
    model = tiny(pretrained=False).build(3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "base.pth")
    loaded = tiny(checkpoint=str(tmp_path / "base.pth")).build(3)
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_other_image_size_and_channels(checkpoint):
    path, _ = checkpoint
    model = tiny(checkpoint=str(path), img_size=48, in_chans=1, drop_path_rate=0.1).build(4)
    assert model(torch.zeros(2, 1, 48, 48)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (VIT, {"img_size": 32, **TINY}),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "img_size": 56},
        ),
        ("swinv2_tiny_window8_256", {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64}),
        ("beit_base_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32}),
        ("eva02_tiny_patch14_224", {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 28}),
        ("convnext_atto", {"dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1)}),
        ("resnet10t", {"channels": (8, 8, 8, 8), "stem_width": 8}),
    ],
)
def test_presets_name_layers_that_are_reached(name, options):
    backbone = TimmViT(name, pretrained=False, options=options)
    model = backbone.build(3)
    found = presets(model)
    assert {"all"} <= set(found) <= {"attention", "mlp", "convs", "all"}
    va.adapt(model, va.LoRA(rank=2), "all")
    size = backbone.options.get("img_size", 64)
    model(torch.randn(2, 3, size, size)).sum().backward()
    unreached = [path for path, a in va.adapters(model).items() if a.up.grad is None]
    assert not unreached
    heads = {id(p) for p in model.get_classifier().parameters()}
    assert heads.isdisjoint(id(p) for p in model.parameters() if p.requires_grad)


def test_presets_of_a_vit():
    found = tiny(pretrained=False).build(2).adapter_presets
    assert found["attention"] == ["blocks.*.attn.qkv", "blocks.*.attn.proj"]
    assert found["mlp"] == ["blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]
    assert found["convs"] == ["patch_embed.proj"]
    assert set(found["all"]) == {*found["attention"], *found["mlp"], *found["convs"]}


def test_evaluation_transform_is_the_models_own():
    transform = TimmViT(VIT).preprocess(train=False)
    image = Image.new("RGBA", (300, 200), (255, 255, 255, 255))
    tensor = transform(image)
    assert tensor.shape == (3, 224, 224)
    assert torch.allclose(tensor, torch.ones_like(tensor))  # mean and standard deviation are 0.5


def test_training_transform_takes_timms_arguments():
    backbone = tiny(transforms={"crop_pct": 1.0, "hflip": 0.0, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]})
    plain = TimmViT(VIT, img_size=32, transforms={**backbone.transforms, "color_jitter": 0.0})
    image = Image.effect_noise((32, 32), 50)
    train, evaluation = plain.preprocess(train=True)(image), plain.preprocess(train=False)(image)
    assert torch.allclose(train, evaluation)
    assert "ColorJitter" in repr(backbone.preprocess(train=True))
    assert "ColorJitter" not in repr(backbone.preprocess(train=False))
    assert tiny(in_chans=1).preprocess(train=False)(image).shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "vit_tinny_patch16_224"},
            r"no model 'vit_tinny_patch16_224'; did you mean: vit_tiny_patch16_224",
        ),
        ({"name": "tiny_digit"}, r"did you mean: .*tiny_digits"),
        (
            {"name": f"{VIT}.augreg"},
            r"no weights 'vit_tiny_patch16_224.augreg'; did you mean: .*augreg_in21k",
        ),
        (
            {"options": {"pach_size": 8}, "pretrained": False},
            r"unexpected keyword argument 'pach_size'; check",
        ),
    ],
)
def test_wrong_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments).build(3)


def test_wrong_transform_argument():
    with pytest.raises(ValueError, match=r"timm has no 'crop_pc'; did you mean: crop_pct"):
        tiny(transforms={"crop_pc": 1.0}).preprocess(train=False)


def test_missing_and_broken_checkpoints(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match=r"none\.pth' does not exist"):
        tiny(checkpoint=str(tmp_path / "none.pth")).build(3)
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"123")
        with pytest.raises(ValueError, match=rf"cannot read backbone checkpoint '.*{name}'"):
            tiny(checkpoint=str(tmp_path / name)).build(3)
    with pytest.raises(ValueError, match=r"base\.safetensors' does not fit .*blocks\.2"):
        tiny(checkpoint=str(checkpoint[0]), options=TINY | {"depth": 3}).build(4)
    checkpoint[0].with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"base\.json' .* not valid JSON"):
        tiny(checkpoint=str(checkpoint[0])).build(4)


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"could not be downloaded; run once with network access, or give"):
        TimmViT("vit_tiny_patch16_224").build(10)
