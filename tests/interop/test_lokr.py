"""LoKr in the files of LyCORIS, ComfyUI and PEFT, read by these libraries themselves and read back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import visadapt as va
from tests.interop.conftest import largest, outputs
from tests.interop.test_diffusers_file import adapted
from tests.tiny import moved
from visadapt.interop.keys import split
from visadapt.interop.kohya_names import written_names
from visadapt.interop.lokr import lokr_tensors

KINDS = {
    "thin": va.LoKr(rank=2, alpha=6),
    "both": va.LoKr(rank=1, alpha=3, decompose_both=True),
    "full": va.LoKr(rank=1, full=True),
    "tucker": va.LoKr(rank=2, alpha=3, tucker=True),
    "factor": va.LoKr(rank=2, factor=2),
}
SOME = ["unet.*.attn1.to_q", "unet.*.conv1", "unet.conv_in", "text_encoder.*.fc1"]


def of(path):
    """Layer name -> role -> tensor."""
    found = {}
    for key, tensor in load_file(path).items():
        layer, role = split(key)
        found.setdefault(layer, {})[role] = tensor
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", ["lycoris", "comfyui"])
def test_files_are_what_lycoris_and_comfyui_compute(kind, reader, base, tmp_path):
    """LyCORIS' own function, and the product as comfy/weight_adapter/lokr.py takes it, give the merged weights."""
    kron_weight = pytest.importorskip("lycoris.functional.lokr").kron_weight
    model = adapted(base(), KINDS[kind].clone(), SOME)
    assert va.export(model, tmp_path / "n.safetensors", format=reader) == 0.0
    back = va.load(base(), tmp_path / "n.safetensors")
    assert {type(a) for a in va.adapters(back).values()} == {va.LoKr}
    assert largest(outputs(back), outputs(model)) < 1e-5
    held, fresh, names = of(tmp_path / "n.safetensors"), base(), written_names(base())
    merged = va.merge(model)
    for own, name in names.items():
        roles = held.pop(name, None)
        if roles is None:
            continue
        weight = fresh.get_submodule(own).weight
        order = [roles.get(f"lokr_{end}") for end in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
        if order[5] is not None and order[6] is None:
            order[5] = order[5].view(len(order[5]), -1, *weight.shape[2:])
        ranks = [len(roles[end]) for end in ("lokr_w2_b", "lokr_w1_b") if end in roles]
        change = kron_weight(*order, scale=float(roles["alpha"]) / ranks[0] if ranks else 1.0).reshape(weight.shape)
        difference = merged.get_submodule(own).weight - weight
        torch.testing.assert_close(change, difference, rtol=1e-4, atol=1e-5, msg=name)
        w1 = roles["lokr_w1"] if "lokr_w1" in roles else roles["lokr_w1_a"] @ roles["lokr_w1_b"]
        if "lokr_t2" in roles:
            w2 = torch.einsum("ijkl,jr,ip->prkl", roles["lokr_t2"], roles["lokr_w2_b"], roles["lokr_w2_a"])
        else:
            w2 = roles["lokr_w2"] if "lokr_w2" in roles else roles["lokr_w2_a"] @ roles["lokr_w2_b"]
        w1 = w1[:, :, None, None] if w2.dim() == 4 else w1
        torch.testing.assert_close(
            torch.kron(w1, w2.contiguous()).reshape(weight.shape), difference, rtol=1e-4, atol=1e-5
        )
    assert not held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 40), lambda: nn.Conv2d(24, 40, 3)], ids=["linear", "conv"])
def test_tensors_are_those_that_lycoris_saves(kind, make):
    module = pytest.importorskip("lycoris.modules.lokr").LokrModule
    method = KINDS[kind].clone(alpha=None)
    model = moved(va.adapt(nn.Sequential(make()), method, "0"), 0.1)
    (adapter,) = va.adapters(model).values()
    theirs = module(
        "x", make(), lora_dim=method.rank,
        alpha=method.rank, factor=method.factor, use_tucker=method.tucker, decompose_both=method.decompose_both,
        full_matrix=method.full,
    )  # fmt: skip
    saved = {n: t for n, t in theirs.custom_state_dict().items() if n != "alpha"}
    ours = lokr_tensors(adapter)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in saved.items()}


def test_files_of_lycoris_are_read(base, tmp_path):
    """A scale other than 1, a split of its own, factors that our rule keeps whole, half precision."""
    torch.manual_seed(0)
    query = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"  # 32 × 32
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"  # 32 -> 64
    made = {
        f"{query}.lokr_w1_a": torch.randn(16, 1).half(), f"{query}.lokr_w1_b": torch.randn(1, 2).half(),
        f"{query}.lokr_w2_a": torch.randn(2, 1).half(), f"{query}.lokr_w2_b": torch.randn(1, 16).half(),
        f"{query}.alpha": torch.tensor(0.5),
        f"{text}.lokr_w1": torch.randn(8, 4), f"{text}.lokr_w2_a": torch.randn(8, 6),
        f"{text}.lokr_w2_b": torch.randn(6, 8), f"{text}.alpha": torch.tensor(3.0),
        "lycoris_conv_in.lokr_w1": torch.randn(2, 2), "lycoris_conv_in.lokr_w2": torch.randn(16, 2, 3, 3),
        "lycoris_conv_in.alpha": torch.tensor(9.0),
    }  # fmt: skip
    save_file(made, tmp_path / "other.safetensors")
    fresh, model = base(), va.load(base(), tmp_path / "other.safetensors")
    again = va.load(base(), va.save(model, tmp_path / "own.safetensors"))
    assert largest(outputs(again), outputs(model)) == 0
    f = {k: v.float() for k, v in made.items()}
    changes = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 0.5
        * torch.kron(
            f[f"{query}.lokr_w1_a"] @ f[f"{query}.lokr_w1_b"], f[f"{query}.lokr_w2_a"] @ f[f"{query}.lokr_w2_b"]
        ),
        "text_encoder.encoder.layers.0.mlp.fc1": 0.5
        * torch.kron(f[f"{text}.lokr_w1"], f[f"{text}.lokr_w2_a"] @ f[f"{text}.lokr_w2_b"]),
        "unet.conv_in": torch.kron(f["lycoris_conv_in.lokr_w1"][..., None, None], f["lycoris_conv_in.lokr_w2"]),
    }
    merged = va.merge(model)
    for own, change in changes.items():
        difference = merged.get_submodule(own).weight - fresh.get_submodule(own).weight
        torch.testing.assert_close(difference, change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lokr_w1": (3, 4)}, "lokr_w1 of 3 × 4, which does not divide the layer's 32 × 32"),
        ({"lokr_w2_b": (2, 7)}, r"lokr_w2_b of shape \(2, 7\), the layer needs \(2, 8\)"),
        ({"dora_scale": (32, 1)}, "holds dora_scale, lokr_w1, lokr_w2_a, lokr_w2_b, which is no whole LoRA"),
        ({"lokr_w2_a": None}, r"holds lokr_w1, lokr_w2_b, which is no whole LoKr \(lokr_w2\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, message, base, tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    shapes = {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)} | change
    save_file({f"{name}.{k}": torch.ones(s) for k, s in shapes.items() if s}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        va.load(base(), tmp_path / "x.safetensors")


def host():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 24, 3, padding=1), nn.Conv2d(24, 40, 1), nn.Flatten(2), nn.Linear(36, 60)).eval()


@pytest.mark.slow  # PEFT imports transformers: 10 s on a busy machine
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_its_own_lokr(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    model = moved(va.adapt(host(), KINDS[kind].clone(), {"0": {}, "1": {}, "3": {"rank": 3}}), 0.1)
    assert va.export(model, tmp_path / "p") == 0.0
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LOKR"
    x = torch.randn(2, 4, 6, 6)
    stock = peft.PeftModel.from_pretrained(host(), tmp_path / "p")
    torch.testing.assert_close(stock(x), model(x), rtol=1e-4, atol=1e-5)
    back = va.load(host(), tmp_path / "p")
    assert {type(a) for a in va.adapters(back).values()} == {va.LoKr}
    torch.testing.assert_close(back(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_peft_of_its_own_making_is_read(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    config = peft.LoKrConfig(
        r=2, alpha=3, target_modules=["0", "1", "3"], decompose_factor=6, decompose_both=True, init_weights=False,
        use_effective_conv2d=True, rank_pattern={"1": 1}, alpha_pattern={"1": 5},
    )  # fmt: skip
    stock = peft.get_peft_model(host(), config)
    stock.save_pretrained(tmp_path)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(va.load(host(), tmp_path)(x), stock(x), rtol=1e-4, atol=1e-5)


def test_what_peft_cannot_shape_is_plain_lora(tmp_path):
    """Splits that no one factor gives, and methods side by side: exact all the same."""
    for sets in ([va.LoKr(rank=1, factor=[2, 4]), va.LoKr(rank=1, factor=[5, 2])], [va.LoKr(rank=1), va.LoRA(rank=2)]):
        model = host()
        for number, (method, target) in enumerate(zip(sets, ("0", "1"), strict=True)):
            va.adapt(model, method, target, f"set{number}")
        moved(model, 0.1)
        folder = tmp_path / type(sets[1]).__name__
        assert va.export(model, folder) == 0.0
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
        x = torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(va.load(host(), folder)(x), model(x), rtol=1e-4, atol=1e-5)
