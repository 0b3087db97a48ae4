"""kohya's single file: read by stock diffusers, by LyCORIS' own modules, by ComfyUI's formula, and read back."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import visadapt as va
from tests.interop.conftest import largest, outputs
from tests.interop.test_diffusers_file import EVERYWHERE, adapted
from tests.tiny import FORMS
from visadapt.interop.kohya import model_hash
from visadapt.interop.kohya_names import written_names


def layers(path):
    """Layer name -> what the file holds of it."""
    found = defaultdict(dict)
    for key, tensor in load_file(path).items():
        layer, _, rest = key.partition(".")
        found[layer][rest] = tensor
    return found


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
@pytest.mark.parametrize("name", FORMS)
def test_plain_files_are_exact_in_the_stock_pipeline(name, layout, base, pipeline, tmp_path):
    also = ["unet.add_embedding.linear_1", "text_encoder_2.*.out_proj"] if layout == "sdxl" else ["text_encoder.*.fc2"]
    model = adapted(base(layout), va.METHODS[name](rank=3), [*EVERYWHERE, *also])
    assert va.export(model, tmp_path / "k.safetensors", format="kohya") == 0.0
    stock = pipeline(layout)
    stock.load_lora_weights(tmp_path / "k.safetensors")
    assert largest(outputs(stock), outputs(model)) < 1e-5
    back = va.load(base(layout), tmp_path / "k.safetensors")
    assert largest(outputs(back), outputs(model)) < 1e-5


def test_mixed_ranks_have_one_alpha(base, pipeline, tmp_path):
    """diffusers loses alphas that differ between layers, so no two may."""
    model = adapted(base(), va.LoRA(rank=2, alpha=7), {"unet.*.to_q": {}, "unet.*.to_k": {"rank": 5}})
    va.export(model, tmp_path / "k.safetensors", format="kohya")
    assert {float(held["alpha"]) for held in layers(tmp_path / "k.safetensors").values()} == {5.0}
    stock = pipeline()
    stock.load_lora_weights(tmp_path / "k.safetensors")
    assert largest(outputs(stock), outputs(model)) < 1e-5


def test_names_of_sd_are_those_of_diffusers_and_of_sdxl_the_original_ones(base):
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    text = "encoder.layers.1.self_attn.q_proj"
    sd, xl = written_names(base("sd")), written_names(base("sdxl"))
    assert sd[f"unet.{attention}"] == f"lora_unet_{attention.replace('.', '_')}"
    assert sd[f"text_encoder.{text}"] == "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    assert xl[f"unet.{attention}"] == "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_out_0"
    assert xl[f"text_encoder.{text}"] == "lora_te1_text_model_encoder_layers_1_self_attn_q_proj"
    assert xl[f"text_encoder_2.text_model.{text}"] == "lora_te2_text_model_encoder_layers_1_self_attn_q_proj"
    for names in (sd, xl):
        assert len(set(names.values())) == len(names)


def test_original_names_are_those_of_the_official_sdxl_unet():
    """Fixed points of Stability's checkpoint: two residual blocks to a level, three levels, attention in two."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            transformer_layers_per_block=(1, 2, 3),
            attention_head_dim=8,
        )
    names = written_names(unet)
    known = {
        "conv_in": "input_blocks_0_0",
        "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
        "down_blocks.2.attentions.1.transformer_blocks.2.ff.net.2": "input_blocks_8_1_transformer_blocks_2_ff_net_2",
        "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
        "mid_block.attentions.0.proj_out": "middle_block_1_proj_out",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.1.attentions.2.proj_in": "output_blocks_5_1_proj_in",
        "up_blocks.2.resnets.2.conv2": "output_blocks_8_0_out_layers_3",
        "time_embedding.linear_2": "time_embed_2",
        "add_embedding.linear_1": "label_emb_0_0",
        "conv_out": "out_2",
    }
    assert {own: names[own] for own in known} == {own: f"lora_unet_{name}" for own, name in known.items()}


NATIVE = [
    (va.LoRA(rank=3, alpha=6), {"lora_down.weight", "lora_up.weight", "alpha"}),
    (va.DoRA(rank=3, alpha=6), {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}),
    (va.LoHa(rank=3, alpha=6), {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"}),
    (va.FLoRA(rank=4, scale=0.5), {"lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"}),
]


@pytest.mark.parametrize(("method", "keys"), NATIVE, ids=lambda x: type(x).__name__)
def test_native_forms_are_what_lycoris_computes(method, keys, base, tmp_path):
    """Each layer of the file becomes LyCORIS' own module, whose merged weight is compared."""
    pytest.importorskip("lycoris", reason="checks the file in stock LyCORIS: pip install 'visadapt[bench]'")
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule

    model = adapted(base(), method)
    assert va.export(model, tmp_path / "n.safetensors", format="lycoris") == 0.0
    held, fresh, names = layers(tmp_path / "n.safetensors"), base(), written_names(base())
    assert any(set(tensors) == keys for tensors in held.values())
    back = va.load(base(), tmp_path / "n.safetensors")
    assert largest(outputs(back), outputs(model)) < 1e-5
    merged = va.merge(model)
    assert len(held) > 40
    for own, name in names.items():
        tensors = held.pop(name, None)
        if tensors is None:
            continue
        kind, order = (LohaModule, "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2")
        if "lora_up.weight" in tensors:
            kind, order = (LoConModule, "lora_up.weight lora_down.weight lora_mid.weight")
        given = [tensors.get(key) for key in [*order.split(), "alpha", "dora_scale"]]
        with torch.no_grad():
            module = kind.make_module_from_state_dict(name, fresh.get_submodule(own), *given)
            found = module.get_merged_weight(shape=fresh.get_submodule(own).weight.shape)[0]
        torch.testing.assert_close(found, merged.get_submodule(own).weight, rtol=1e-4, atol=1e-5, msg=name)
    assert not held


def test_dora_by_inputs_is_what_lycoris_computes(base, tmp_path):
    general = pytest.importorskip("lycoris.functional.general")
    model = adapted(base(), va.DoRA(rank=2, axis="in"), ["unet.*.conv1", "unet.*.to_k"])
    va.export(model, tmp_path / "n.safetensors", format="lycoris")
    back = va.load(base(), tmp_path / "n.safetensors")
    assert {a.axis for a in va.adapters(back).values()} == {"in"}
    held, fresh, names = layers(tmp_path / "n.safetensors"), base(), written_names(base())
    merged = va.merge(model)
    for own, name in names.items():
        if name in held:
            weight = fresh.get_submodule(own).weight
            change = (held[name]["lora_up.weight"].flatten(1) @ held[name]["lora_down.weight"].flatten(1)).view_as(
                weight
            )
            found = general.weight_decompose(weight + change, held[name]["dora_scale"], wd_on_out=False)
            torch.testing.assert_close(found, merged.get_submodule(own).weight, rtol=1e-4, atol=1e-5)
    assert largest(outputs(back), outputs(merged)) < 1e-5


def test_dora_for_comfyui_follows_its_formula(base, tmp_path):
    """ComfyUI divides rows by the norm of the base weight: W' = dora_scale ⊙ (W + ΔW) / ‖W‖."""
    model = adapted(base(), va.DoRA(rank=2, alpha=5), ["unet.*.conv1", "unet.*.to_k"])
    va.export(model, tmp_path / "c.safetensors", format="comfyui")
    held, fresh, names = layers(tmp_path / "c.safetensors"), base(), written_names(base())
    back = va.load(base(), tmp_path / "c.safetensors")
    merged = va.merge(model)
    for own, name in names.items():
        if name in held:
            weight = fresh.get_submodule(own).weight
            change = held[name]["lora_up.weight"].flatten(1) @ held[name]["lora_down.weight"].flatten(1)
            norm = weight.flatten(1).norm(dim=1).view_as(held[name]["dora_scale"])
            found = (weight + change.view_as(weight)) * held[name]["dora_scale"] / norm
            torch.testing.assert_close(found, merged.get_submodule(own).weight, rtol=1e-4, atol=1e-6)
    assert largest(outputs(back), outputs(merged)) < 1e-5


def test_plain_files_refuse_what_they_cannot_say(base, tmp_path):
    model = adapted(base(), va.DoRA(rank=2), ["unet.*.to_q"], 0.01)
    with pytest.raises(ValueError, match="give `rank`"):
        va.export(model, tmp_path / "k.safetensors", format="kohya")
    assert 0 < va.export(model, tmp_path / "k.safetensors", format="kohya", rank=4) < 1
    with pytest.raises(ValueError, match=r"should end in \.safetensors"):
        va.export(model, tmp_path / "folder", format="kohya")


def test_metadata_and_hash(base, tmp_path):
    path = tmp_path / "mine.safetensors"
    va.export(adapted(base("sdxl"), va.LoRA(rank=3), ["unet.*.conv1", "unet.*.to_q"]), path, format="kohya")
    found = metadata(path)
    assert found["sshs_model_hash"] == model_hash(path.read_bytes())
    wanted = {"ss_network_module": "networks.lora", "ss_network_dim": "3", "ss_network_alpha": "3"}
    assert wanted.items() <= found.items()
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "3"}
    assert found["ss_base_model_version"] == "sdxl_base_v1-0"
    va.export(adapted(base(), va.FLoRA(rank=4), ["unet.*.conv1"]), path, format="lycoris")
    found = metadata(path)
    assert found["ss_network_module"] == "lycoris.kohya"
    assert json.loads(found["ss_network_args"])["use_tucker"] == "True"
    assert "ss_base_model_version" not in found


def test_files_of_others_are_read(base, tmp_path):
    """Own alphas, a layer without one, a half-precision tensor, LyCORIS' prefix, a rank above the layer's width."""
    torch.manual_seed(0)
    query = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    made = {
        f"{query}.lora_down.weight": torch.randn(4, 32).half(),
        f"{query}.lora_up.weight": torch.randn(32, 4).half(),
        f"{query}.alpha": torch.tensor(1.0),
        "lora_te_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 32),
        "lora_te_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(64, 2),
        "lycoris_conv_in.lora_down.weight": torch.randn(8, 4, 1, 1),
        "lycoris_conv_in.lora_mid.weight": torch.randn(8, 8, 3, 3),
        "lycoris_conv_in.lora_up.weight": torch.randn(32, 8, 1, 1),
        "lycoris_conv_in.alpha": torch.tensor(4.0),
    }
    save_file(made, tmp_path / "other.safetensors")
    fresh, model = base(), va.load(base(), tmp_path / "other.safetensors")
    assert sorted(type(a).__name__ for a in va.adapters(model).values()) == ["FLoRA", "LoRA", "LoRA"]
    changes = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 0.25
        * made[f"{query}.lora_up.weight"].float()
        @ made[f"{query}.lora_down.weight"].float(),
        "text_encoder.encoder.layers.0.mlp.fc1": made["lora_te_encoder_layers_0_mlp_fc1.lora_up.weight"]
        @ made["lora_te_encoder_layers_0_mlp_fc1.lora_down.weight"],
        "unet.conv_in": 0.5
        * torch.einsum(
            "pqkl,op,qi->oikl",
            made["lycoris_conv_in.lora_mid.weight"],
            made["lycoris_conv_in.lora_up.weight"].flatten(1),
            made["lycoris_conv_in.lora_down.weight"].flatten(1),
        ),
    }
    merged = va.merge(model)
    for own, change in changes.items():
        difference = merged.get_submodule(own).weight - fresh.get_submodule(own).weight
        torch.testing.assert_close(difference, change, rtol=1e-4, atol=1e-4)
