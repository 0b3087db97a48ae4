"""Files for stock `pipe.load_lora_weights`: what the pipeline then computes is what the adapted model computes."""

from __future__ import annotations

import pytest
import torch

import visadapt as va
from tests.interop.conftest import largest, outputs, shapes
from tests.tiny import FORMS, moved
from visadapt.interop.diffusers_file import FILE

# Attention, feed-forward, residual and sampling convolutions, both ends, embeddings, text attention and MLP.
EVERYWHERE = [
    "unet.*.to_q",
    "unet.*.to_out.0",
    "unet.*.ff.net.*",
    "unet.*.conv1",
    "unet.*.conv_shortcut",
    "unet.*.proj_in",
    "unet.*samplers.0.conv",
    "unet.conv_in",
    "unet.conv_out",
    "unet.time_embedding.linear_1",
    "unet.*.time_emb_proj",
    "text_encoder.*.v_proj",
    "text_encoder.*.fc1",
]


def adapted(model, method, targets=EVERYWHERE, scale=0.1):
    return moved(va.adapt(model, method, targets), scale).eval()


def effect(model, fresh):
    """How far the adapters move the outputs."""
    return largest(outputs(model), outputs(fresh))


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
@pytest.mark.parametrize("name", [*FORMS, "DoRA"])
def test_every_form_is_exact_in_the_stock_pipeline(name, layout, base, pipeline, tmp_path):
    model = adapted(base(layout), va.METHODS[name](rank=3))
    assert effect(model, base(layout)) > 1e-2
    assert va.export(model, tmp_path, format="diffusers") == 0.0
    stock = pipeline(layout)
    stock.load_lora_weights(tmp_path)
    assert largest(outputs(stock), outputs(model)) < 1e-5
    back = va.load(base(layout), tmp_path)
    assert largest(outputs(back), outputs(model)) < 1e-5


def test_dora_beside_other_methods_leaves_them_as_they_are(base, pipeline, tmp_path):
    model = base()
    va.adapt(model, va.DoRA(rank=2, alpha=6), ["unet.*.to_k", "unet.*.conv2"])
    va.adapt(model, va.LoRA(rank=4), ["unet.*.to_q", "text_encoder.*.q_proj"], "second")
    moved(model).eval()
    assert va.export(model, tmp_path / "mixed.safetensors", format="diffusers") == 0.0
    stock = pipeline()
    stock.load_lora_weights(tmp_path / "mixed.safetensors")
    assert largest(outputs(stock), outputs(model)) < 1e-5
    assert not any("text_encoder" in k and "magnitude" in k for k in shapes(tmp_path / "mixed.safetensors"))


@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_a_text_encoder_with_its_mlp_alone(name, base, pipeline, tmp_path):
    """diffusers cannot tell the usual spelling without attention layers."""
    model = adapted(base(), va.METHODS[name](rank=2), ["unet.*.to_q", "text_encoder.*.fc2"])
    va.export(model, tmp_path, format="diffusers")
    stock = pipeline()
    stock.load_lora_weights(tmp_path)
    assert largest(outputs(stock), outputs(model)) < 1e-5
    assert largest(outputs(va.load(base(), tmp_path)), outputs(model)) < 1e-5


def test_mixed_ranks_alphas_sets_and_strengths(base, pipeline, tmp_path):
    model = base("sdxl")
    va.adapt(model, va.LoRA(rank=2, alpha=7), {"unet.*.to_q": {}, "unet.*.to_v": {"rank": 5, "rslora": True}})
    va.adapt(model, va.LoRA(rank=3), ["unet.*.to_q", "text_encoder_2.*.fc2", "text_encoder.*.k_proj"], "other")
    moved(model).eval()
    va.strength(model, other=0.5)
    va.export(model, tmp_path, format="diffusers")
    stock = pipeline("sdxl")
    stock.load_lora_weights(tmp_path)
    assert largest(outputs(stock), outputs(model)) < 1e-5


def test_keys_are_those_of_the_ecosystem(base, tmp_path):
    model = adapted(base("sdxl"), va.LoRA(rank=2), ["unet.*.attn1.to_out.0", "unet.conv_in", "text_encoder*.q_proj"])
    va.export(model, tmp_path, format="diffusers")
    held = shapes(tmp_path / FILE)
    attention = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert held[f"{attention}.lora_A.weight"] == (2, 32)
    assert held["unet.conv_in.lora_A.weight"] == (2, 4, 3, 3)
    assert held["unet.conv_in.lora_B.weight"] == (32, 2, 1, 1)
    for part in ("text_encoder", "text_encoder_2"):
        assert held[f"{part}.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight"] == (32, 2)


def test_a_unet_alone(base, pipeline, tmp_path):
    unet = adapted(base().unet, va.LoRA(rank=2), ["attn2.to_k"])
    va.export(unet, tmp_path, format="diffusers")
    stock = pipeline()
    stock.load_lora_weights(tmp_path)
    model = base()
    model.unet = unet
    assert largest(outputs(stock), outputs(model)) < 1e-5
    assert len(va.adapters(va.load(base().unet, tmp_path))) == len(va.adapters(unet))


@pytest.mark.parametrize("old", ["lora.down", "processor", "no text_model", "unprefixed"])
def test_older_spellings_are_read(old, base, tmp_path):
    from safetensors.torch import load_file, save_file

    targets = [
        "unet.*.attn1.to_q",
        "unet.*.attn1.to_out.0",
        *([] if old == "unprefixed" else ["text_encoder.*.q_proj"]),
    ]
    model = adapted(base(), va.LoRA(rank=2), targets)
    va.export(model, tmp_path, format="diffusers")
    held = load_file(tmp_path / FILE)
    rename = {
        "lora.down": lambda k: k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        "processor": lambda k: (
            k.replace("attn1.to_", "attn1.processor.to_")
            .replace("to_q.lora_A", "to_q_lora.down")
            .replace("to_q.lora_B", "to_q_lora.up")
            .replace("to_out.0.lora_A", "to_out_lora.down")
            .replace("to_out.0.lora_B", "to_out_lora.up")
        ),
        "no text_model": lambda k: k.replace("text_model.", ""),
        "unprefixed": lambda k: k.removeprefix("unet."),
    }[old]
    renamed = {rename(k): v for k, v in held.items()}
    assert set(renamed) != set(held)
    save_file(renamed, tmp_path / "old.safetensors")
    assert largest(outputs(va.load(base(), tmp_path / "old.safetensors")), outputs(model)) < 1e-5


def test_alphas_in_the_metadata_of_peft_are_read(base, pipeline, tmp_path):
    """The file is written by diffusers and PEFT themselves, with an own rank and alpha for one layer."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    stock = pipeline()
    one = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", one], rank_pattern={one: 2}, alpha_pattern={one: 3})
    stock.unet.add_adapter(config)
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in stock.unet.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    stock.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(stock.unet),
        unet_lora_adapter_metadata=stock.unet.peft_config["default"].to_dict(),
    )
    model = va.load(base(), tmp_path)
    assert {(a.rank, a.scale) for a in va.adapters(model).values()} == {(4, 1.5), (2, 1.5)}
    assert largest(outputs(stock), outputs(model)) < 1e-5


def test_what_is_not_low_rank_is_refused_or_reported(base, tmp_path):
    model = adapted(base(), va.DoRA(rank=2, axis="in"), ["unet.*.to_q"], 0.05)
    with pytest.raises(ValueError, match="no low-rank update; give `rank`"):
        va.export(model, tmp_path, format="diffusers")
    errors = [va.export(model, tmp_path, format="diffusers", rank=r) for r in (4, 16, 64)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_refusals_name_the_layer(base, tmp_path):
    model = adapted(base("sdxl"), va.LoRA(rank=2), ["text_encoder_2.text_projection"])
    with pytest.raises(ValueError, match="'text_encoder_2.text_projection': of text encoders, diffusers reads"):
        va.export(model, tmp_path, format="diffusers")
    model = adapted(base(), va.LoRA(rank=2), ["unet.*.to_q"])
    model.unet.conv_norm_out.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'unet.conv_norm_out.weight' and 0 more .* were trained"):
        va.export(model, tmp_path, format="diffusers")
    with pytest.raises(ValueError, match="no diffusion model"):
        va.export(torch.nn.Linear(2, 2), tmp_path, format="diffusers")
    with pytest.raises(ValueError, match="the model has no adapters"):
        va.export(base(), tmp_path, format="diffusers")
    broken = adapted(base(), va.LoRA(rank=2), ["unet.*.to_q"])
    next(iter(va.adapters(broken).values())).up.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        va.export(broken, tmp_path, format="diffusers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet.nowhere.lora_A.weight": (2, 4)}, "'unet.nowhere.lora_A.weight' belongs to no layer"),
        ({"unet.conv_in.oft_blocks": (2, 4)}, "is OFT, which is not read"),
        ({"unet.conv_in.lokr_w1": (2, 4)}, "'unet.conv_in' holds lokr_w1, which is no whole LoKr"),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3)}, "'unet.conv_in' holds down, which is no whole LoRA"),
        ({"unet.conv_in.lora_A.weight": (2, 5), "unet.conv_in.lora_B.weight": (32, 2)}, r"has down of shape \(2, 5\)"),
        ({"something": (2,)}, "'something' is not known"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_and_the_model_stays(change, message, base, tmp_path):
    from safetensors.torch import load_file, save_file

    va.export(adapted(base(), va.LoRA(rank=2), ["unet.*.to_q"]), tmp_path, format="diffusers")
    held = load_file(tmp_path / FILE) | {k: torch.ones(shape) for k, shape in change.items()}
    save_file(held, tmp_path / FILE)
    model = base()
    with pytest.raises(ValueError, match=message):
        va.load(model, tmp_path)
    assert not va.adapters(model)


def test_one_peft_folder_per_part(base, pipeline, tmp_path):
    from peft import PeftModel

    model = adapted(base(), va.LoRA(rank=3))
    va.export(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text_encoder", "unet"]
    stock = pipeline()
    for part in ("unet", "text_encoder"):
        setattr(stock, part, PeftModel.from_pretrained(getattr(stock, part), tmp_path / part).get_base_model())
    assert largest(outputs(stock), outputs(model)) < 1e-5
    assert largest(outputs(va.load(base(), tmp_path)), outputs(model)) < 1e-5
