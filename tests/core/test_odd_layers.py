"""Layers that do more than their class says, and code that does not call its layers."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Conv2dSame
from timm.layers.std_conv import StdConv2d
from torch import nn

import visadapt as va
from tests.tiny import moved


@pytest.mark.parametrize("mask", [False, True])
def test_a_fused_transformer_layer_calls_its_adapted_layers_in_evaluation_too(mask):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    va.adapt(model, va.LoRA(rank=2), ["linear1", "linear2"])
    moved(model)
    x = torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    options = {"src_key_padding_mask": padding} if mask else {}
    want = model.train()(x, **options)
    with torch.no_grad():
        got = model.eval()(x, **options)
        assert (got - want).abs()[~padding].max() < 1e-5
        with va.merged(model):
            assert (model(x, **options) - want).abs()[~padding].max() < 1e-5


@pytest.mark.parametrize("method", [va.LoRA(rank=2), va.DoRA(rank=2), va.OFT(block=2)], ids=repr)
@pytest.mark.parametrize("kind", [StdConv2d, Conv2dSame])
def test_a_convolution_with_a_forward_of_its_own_is_adapted_where_it_reads_its_weight(tmp_path, method, kind):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(kind(4, 6, 3, stride=2)).eval()

    model, x = build(), torch.randn(2, 4, 9, 9)
    y = model(x)
    va.adapt(model, method, "convs")
    torch.testing.assert_close(model(x), y)
    moved(model)
    changed = model(x)
    assert not torch.allclose(changed, y)
    with va.merged(model):
        torch.testing.assert_close(model(x), changed)
    loaded = va.load(build(), va.save(model, tmp_path / "a.safetensors"), strict=True)
    assert torch.equal(loaded(x), changed)


def test_outputs_of_such_a_convolution_cannot_be_adapted():
    with pytest.raises(ValueError, match="changes outputs"):
        va.adapt(nn.Sequential(StdConv2d(4, 6, 3)), va.SSF(), "convs")


def test_a_parameter_that_is_computed_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"LoRA on '0'.*remove_parametrizations"):
        va.adapt(model, va.LoRA(), "0")


@pytest.mark.parametrize("method", [va.LoRA(rank=2), va.DoRA(rank=2)], ids=repr)
def test_an_empty_batch_goes_through_a_convolution(method):
    model = va.adapt(nn.Sequential(nn.Conv2d(3, 4, 3)), method, "0")
    y = model(torch.zeros(0, 3, 5, 5, requires_grad=True))
    assert y.shape == (0, 4, 3, 3)
    y.sum().backward()
    assert not any(p.grad.any() for p in va.adapters(model)["0.adapters.default"].parameters() if p.grad is not None)


def nested():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_a_name_that_ends_another_is_loaded_and_composed_alone(tmp_path):
    model = moved(va.adapt(nested(), va.LoRA(rank=2), {"re:0": {}, "re:1.1": {"rank": 1}}))
    x = torch.randn(3, 4)
    path = va.save(model, tmp_path / "a.safetensors")
    assert torch.equal(va.load(nested(), path, strict=True)(x), model(x))
    both = va.load(va.load(nested(), path, name="a"), path, name="b")
    va.compose(both, ["a", "b"], weights=[0.5, 0.5])
    torch.testing.assert_close(both(x), model(x))


def test_what_is_done_to_a_merged_model_would_be_lost_and_is_refused(tmp_path):
    model = moved(va.adapt(nested(), va.LoRA(rank=2), "re:0"))
    path = va.save(model, tmp_path / "a.safetensors")
    held = path.read_bytes()
    model[1][0].requires_grad_(True)
    with va.merged(model):
        for act in (
            lambda: va.save(model, path),
            lambda: va.load(model, path, name="b"),
            lambda: va.adapt(model, va.LoRA(), "re:0", name="b"),
        ):
            with pytest.raises(ValueError, match="leave the block first"):
                act()
    assert path.read_bytes() == held
    va.adapt(model, va.LoRA(), "re:0", name="b")


def test_a_weight_in_a_buffer_comes_back_from_merging():
    layer = nn.Linear(4, 4)
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.register_buffer("weight", weight.clone())
    model = moved(va.adapt(nn.Sequential(layer), va.LoRA(rank=2), "0"))
    with va.merged(model):
        assert not torch.equal(model[0].weight, weight)
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("name", ["keys", "items", "train", "training", "type"])
def test_names_that_modules_have_themselves_are_no_names_of_sets(name):
    model = nested()
    with pytest.raises(ValueError, match="set name"):
        va.adapt(model, va.LoRA(), "re:0", name=name)
    assert all(p.requires_grad for p in model.parameters())


def test_a_method_without_its_parentheses_is_told_of():
    with pytest.raises(TypeError, match=r"give one such as va.LoRA"):
        va.adapt(nested(), va.LoRA, "re:0")
