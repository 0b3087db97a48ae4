from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import visadapt as va
from tests.tiny import images, moved, tiny_vit

QV = ["attn.qkv:q", "attn.qkv:v"]


def test_grafting_keeps_names_types_and_base_loading():
    model = tiny_vit()
    before = model.state_dict()
    va.adapt(model, va.LoRA(rank=2), "attention")
    assert set(before) < set(model.state_dict())
    assert all(".adapters." in k for k in set(model.state_dict()) - set(before))
    assert isinstance(model.blocks[0].attn.qkv, nn.Linear)
    missing, unexpected = model.load_state_dict(tiny_vit(seed=1).state_dict(), strict=False)
    assert not unexpected
    assert all(".adapters." in k for k in missing)


def test_rebuild_starts_from_the_base_that_was_loaded_afterwards():
    model = va.adapt(tiny_vit(), va.DoRA(rank=2), "attention")
    other = tiny_vit(seed=1)
    model.load_state_dict(other.state_dict(), strict=False)
    assert not torch.allclose(model(images()), other(images()), atol=1e-5)  # magnitudes of the old base
    va.rebuild(model)
    torch.testing.assert_close(model(images()), other(images()))


@pytest.mark.parametrize(
    "method", [va.VeRA(rank=4), va.LoCA(count=5), va.RandLoRA(rank=2)], ids=lambda m: type(m).__name__
)
def test_tensors_of_all_sites_stay_one_when_the_model_moves(method):
    def held(model):
        return {id(b): b.numel() for a in va.adapters(model).values() for b in a.buffers()}

    model = va.adapt(tiny_vit(), method, "attn.qkv")
    before = held(model)
    assert len(va.adapters(model)) > 1
    for move in (torch.Tensor.double, torch.Tensor.float, torch.clone):  # also functions that outlive the call
        model._apply(move)
        assert sorted(held(model).values()) == sorted(before.values())
    model.double().to("cpu")
    assert sorted(held(model).values()) == sorted(before.values())
    assert {b.dtype for a in va.adapters(model).values() for b in a.buffers()} == {torch.float64}


def test_several_sets_have_their_own_strength():
    model = va.adapt(tiny_vit(), va.LoRA(rank=2), QV, name="one")
    va.adapt(model, va.DoRA(rank=2), ["mlp.fc1", "attn.qkv:k"], name="two", freeze=False)
    moved(model)
    both = model(images())
    with va.strength(model, two=0.0):
        one = model(images())
    assert torch.equal(model(images()), both)
    va.remove(model, "two")
    assert torch.equal(model(images()), one)
    with pytest.raises(ValueError, match="no set named 'three'; the model has 'one'"):
        va.strength(model, three=1.0)


def test_adapting_twice_is_refused_and_changes_nothing():
    model = va.adapt(tiny_vit(), va.LoRA(rank=2), "blocks.1.attn.qkv")
    before = list(va.adapters(model))
    with pytest.raises(ValueError, match="the set 'default' adapts it already"):
        va.adapt(model, va.LoRA(rank=2), "attn.qkv")
    assert list(va.adapters(model)) == before


def test_unknown_override_and_bad_name():
    with pytest.raises(TypeError, match="LoRA has no hyper-parameter 'rnk'; it has rank"):
        va.adapt(tiny_vit(), va.LoRA(), {"attention": {"rnk": 2}})
    with pytest.raises(ValueError, match="set name 'a.b'"):
        va.adapt(tiny_vit(), va.LoRA(), "attention", name="a.b")


def test_a_forward_of_its_own_is_refused():
    model = tiny_vit()
    model.blocks[0].attn.qkv.forward = model.blocks[0].attn.qkv.forward
    with pytest.raises(ValueError, match="has a `forward` of its own"):
        va.adapt(model, va.LoRA(), "attention")
    assert not va.adapters(model)


def test_tied_weights_refuse_to_merge():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    va.adapt(model, va.LoRA(rank=2), "0")
    with pytest.raises(ValueError, match=r"tied \(0.weight, 1.weight\)"):
        va.merge(model)
    assert va.adapters(model)


def test_merged_restores_even_after_an_error():
    model = moved(va.adapt(tiny_vit(), va.LoRA(rank=2), "attention", lean=True))
    y = model(images())

    def use():
        with va.merged(model):
            assert not va.adapters(model)
            torch.testing.assert_close(model(images()), y)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use()
    assert torch.equal(model(images()), y)
    assert model.blocks[0].attn.qkv.lean


@pytest.mark.parametrize("train", [False, True])
def test_multihead_attention_sees_its_adapted_weights(train):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).train(train)
    x = torch.randn(2, 5, 16)
    va.adapt(layer, va.LoRA(rank=2), ["self_attn.in_proj_weight:q", "self_attn.out_proj", "linear1"])
    moved(layer, 0.3)
    dense = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).train(train)
    state = {k: v for k, v in layer.state_dict().items() if ".adapters." not in k}
    for path, adapter in va.adapters(layer).items():
        down, up = adapter.factors()
        key = f"{path.rpartition('.adapters.')[0]}.{adapter.param}"
        rows = slice(*(adapter.rows or (None,)))
        state[key] = state[key].clone()
        state[key][rows] += up @ down
    dense.load_state_dict(state)
    torch.testing.assert_close(layer(x), dense(x))


def test_feature_maps_refuse_weight_views():
    class Shift(va.FeatureMap):
        affine = True

        def forward(self, x, y, layer):
            return y + 1

    with pytest.raises(ValueError, match="code that reads a parameter has none"):
        va.adapt(nn.MultiheadAttention(8, 2), Shift(), "in_proj_weight")


@pytest.mark.parametrize("method", [va.LoRA(rank=2), va.DoRA(rank=2), va.DoRA(rank=2, axis="in")], ids=str)
def test_compiles_without_a_graph_break(method):
    model = moved(va.adapt(tiny_vit(), method, [*QV, "mlp.fc1", "patch_embed.proj"]))
    y = model(images())
    y.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images())
    torch.testing.assert_close(compiled, y)
    compiled.sum().backward()
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    """All producers that the lean form knows, and one that it does not."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b, self.c = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = nn.functional.gelu(self.a(self.norm(x)))
        return self.c(torch.tanh(self.b(nn.functional.silu(h))))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [tiny_vit, Net])
def test_lean_gives_the_same_gradients(make, autocast):
    torch.manual_seed(0)
    plain = moved(va.adapt(make(), va.LoRA(rank=2), "linears"))
    lean = copy.deepcopy(plain)
    for layer in lean.modules():
        if hasattr(layer, "adapters"):
            layer.lean = True
    x = images() if make is tiny_vit else torch.randn(3, 5, 8)
    for model in (plain, lean):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x.clone().requires_grad_())
        y.float().square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), lean.parameters()):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-2 if autocast else 1e-4, atol=1e-4, msg=name)


def test_lean_keeps_less():
    def kept(lean):
        model = va.adapt(tiny_vit(), va.LoRA(rank=2), ["attention", "mlp"], lean=lean)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen = {}

        def pack(t):
            s = t.untyped_storage()
            if s.data_ptr() not in own:
                seen[s.data_ptr()] = s.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(images(8).requires_grad_())
        del y
        return sum(seen.values())

    assert kept(True) < 0.8 * kept(False)


@pytest.mark.parametrize("lean", [False, True])
def test_activation_checkpointing(lean):
    model = moved(va.adapt(tiny_vit(), va.DoRA(rank=2), "linears", lean=lean))
    model(images()).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    checkpoint(model, images().requires_grad_(), use_reentrant=False).sum().backward()
    for p, e in zip([p for p in model.parameters() if p.grad is not None], expected):
        torch.testing.assert_close(p.grad, e, rtol=1e-4, atol=1e-5)


def test_an_in_place_activation_behind_dora_is_explained():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    va.adapt(model, va.DoRA(rank=2), "0")
    y = model(torch.randn(3, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match="inplace=False"):
        y.sum().backward()


def test_parameter_groups_split_rates_and_decay():
    model = va.adapt(tiny_vit(), va.DoRA(rank=2), "attention")
    model.head.requires_grad_(True)
    groups = va.parameter_groups(model, lr=1e-3, weight_decay=0.1, up_lr_ratio=16)
    held = {id(p): g for g in groups for p in g["params"]}
    assert len(held) == sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    adapter = next(iter(va.adapters(model).values()))
    assert held[id(adapter.magnitude)]["weight_decay"] == 0
    assert held[id(model.head.bias)]["weight_decay"] == 0
    assert held[id(adapter.up)]["lr"] == pytest.approx(16e-3)
    assert held[id(adapter.down)] == held[id(model.head.weight)]
    with pytest.raises(ValueError, match="nothing is trainable"):
        va.parameter_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)


def test_convtranspose_output_size_is_passed_on():
    layer = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1))
    x = torch.randn(1, 4, 5, 5)
    expected = layer[0](x, output_size=[10, 10])
    va.adapt(layer, va.LoRA(rank=2), "0")
    torch.testing.assert_close(layer[0](x, output_size=[10, 10]), expected)
    torch.testing.assert_close(layer[0](input=x).shape, torch.Size([1, 4, 9, 9]))


def test_unbatched_and_quantised_like_layers():
    conv = va.adapt(nn.Sequential(nn.Conv2d(4, 6, 3)), va.LoRA(rank=2), "0")
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(conv(x[0]), conv(x)[0])

    class Packed(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    linear = nn.Sequential(Packed(4, 4))
    y = linear(x[0, 0, :4, :4])
    va.adapt(linear, va.LoRA(rank=2), "0")
    torch.testing.assert_close(linear(x[0, 0, :4, :4]), y)  # its own forward is used
