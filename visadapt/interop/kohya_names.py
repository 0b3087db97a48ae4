"""Layer names of kohya's single files: `lora_unet_…`, `lora_te_…`, for SDXL those of the original UNet."""

from __future__ import annotations

import re

from torch import nn

from visadapt.interop.parts import OLD, TRANSFORMER, UNET, config_of, is_xl, layers, network

# Outside blocks, and inside residual blocks: diffusers' name -> the original (LDM) name.
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def written_names(model: nn.Module) -> dict[str, str]:
    """Own path -> name in a kohya file, for every Linear and convolution."""
    return {own: names[0] for own, names in _names(model).items()}


def readable_names(model: nn.Module) -> dict[str, str]:
    """Every name that some tool gives a layer -> own path. Names with `text_model_` are also read without it."""
    return {name: own for own, names in _names(model).items() for name in names}


def _names(model: nn.Module) -> dict[str, list[str]]:
    """Own path -> names, the one to write first."""
    xl, found = is_xl(model), {}
    unet = network(model)
    for part, name, own in layers(model):
        if part == TRANSFORMER:
            continue  # kohya's files are of UNets
        if part == UNET:
            original = _original(name, unet)
            names = [f"lora_unet_{name}", f"lycoris_{name}"]
            names[0 if xl else 1 : 0 if xl else 1] = [f"lora_unet_{original}"] if original else []
        else:
            heads = ["te2"] if part.endswith("_2") else ["te1", "te"] if xl else ["te", "te1"]
            names = [f"lora_{head}_{n}" for n in (name, name.removeprefix(OLD)) for head in heads]
        found[own] = list(dict.fromkeys(n.replace(".", "_") for n in names))
    return found


def _original(name: str, unet: nn.Module) -> str | None:
    """LDM's name of a layer of diffusers' UNet; None where blocks have different depths."""
    if name in _OUTER:
        return _OUTER[name]
    depth = getattr(getattr(unet, "config", None), "layers_per_block", None)
    match = _BLOCK.fullmatch(name)
    if match is None or not isinstance(depth, int):
        return None
    side, block, kind, index, rest = match.groups()
    rest = _RESNET.get(rest, rest) if kind == "resnets" else rest
    if side is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{rest}"
    first = int(block) * (depth + 1)
    slot = 1 if kind == "attentions" else 0
    if kind.endswith("samplers"):
        index = str(depth)
    if kind == "downsamplers":
        rest = "op"
    if kind == "upsamplers":
        slot = 2 if hasattr(unet.up_blocks[int(block)], "attentions") else 1  # type: ignore[index, union-attr]
    blocks, offset = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
    return f"{blocks}.{first + int(index) + offset}.{slot}.{rest}"


def base_version(model: nn.Module) -> str | None:
    """What kohya calls the base: by the width of the text that the UNet reads; None for unknown ones."""
    if is_xl(model):
        return "sdxl_base_v1-0"
    return {768: "sd_v1", 1024: "sd_v2"}.get(getattr(config_of(model), "cross_attention_dim", 0))
