"""What a safetensors file of an adapter is, from names, shapes and metadata alone; no torch."""

from __future__ import annotations

import re
import struct
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from visadapt.interop.keys import ROLES, is_lora, split, unread

if TYPE_CHECKING:
    from visadapt.cli.inspect import Tensor

Facts = list[tuple[str, str]]
# What text a UNet reads tells the base: width of cross-attention's keys.
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_LEAF = re.compile(
    r"((?:attn[12]_)?to_(?:q|k|v|out_0)|ff_net_(?:0_proj|2)|conv_shortcut|conv_in|conv_out|conv[12]?|time_emb_proj|"
    r"proj_in|proj_out|(?:self_attn_)?(?:q|k|v|out)_proj|(?:mlp_)?fc[12]|in_layers_2|out_layers_3|emb_layers_1|"
    r"skip_connection|op|(?:time|add)_embedding_linear_[12]|text_projection|attn_(?:qkv|proj))$"
)
_MOTION = re.compile(r"[._]motion_modules[._]\d+[._]")  # AnimateDiff's layers across frames
_ROLES = {"mid": "LoRA with Tucker core", "magnitude": "DoRA", "dora_scale": "DoRA", "down": "LoRA"}
_ROLES |= dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "LoHa")
_ROLES |= {role: "LoKr" for role in ROLES.values() if role.startswith("lokr_")}


def recognise(path: Path, metadata: dict[str, str], tensors: list[Tensor]) -> tuple[str, Facts]:
    """Format and facts of a file that is not visadapt's own.

    Args:
        path: the file, for the values of alphas.
        metadata: of its header.
        tensors: of its header.
    """
    names = [t.name for t in tensors]
    if not is_lora(names):
        return _no_lora(metadata, tensors)
    kohya = any(n.startswith(("lora_unet_", "lora_te", "lycoris_")) for n in names)
    methods = _methods(names)
    alphas = _alphas(path, tensors)
    if kohya:
        plain = methods == ["LoRA"] and not any(n.startswith("lycoris_") for n in names)
        kind = "kohya adapter" if plain else "kohya / LyCORIS adapter"
        notes = _kohya_notes(names, methods, alphas, metadata)
    elif any(n.startswith("base_model.model.") for n in names):
        kind = "PEFT weights (the folder also holds adapter_config.json)"
        notes = [("loads in", "stock PEFT and visadapt, as the folder that it belongs to")]
    else:
        kind, notes = "diffusers adapter", _diffusers_notes(names, methods)
    facts = [("method", ", ".join(methods) or "unknown"), ("rank", _ranks(tensors))]
    facts += [("alpha", _range(alphas))] if alphas else []
    facts += [("modules", str(len(_layers(names)))), ("targets", _targets(names))]
    facts += [("base", base)] if (base := _base(metadata, tensors)) else []
    return kind, [*facts, *notes, *shown(metadata, "ss_" if kohya else "")]


def _no_lora(metadata: dict[str, str], tensors: list[Tensor]) -> tuple[str, Facts]:
    names = [t.name for t in tensors]
    flat = all(len(t.shape) <= 2 and "." not in t.name for t in tensors)
    if set(names) in ({"emb_params"}, {"clip_l", "clip_g"}) or (flat and len(names) == 1 and len(tensors[0].shape) > 0):
        widths = {t.name: (1 if len(t.shape) == 1 else t.shape[0], t.shape[-1]) for t in tensors}
        vectors = ", ".join(f"{n}: {count} of {width} numbers" for n, (count, width) in widths.items())
        return "textual inversion", [
            ("vectors", vectors),
            ("loads in", "diffusers: pipe.load_textual_inversion(FILE, token=…); ComfyUI, A1111: as an embedding"),
        ]
    facts = shown(metadata, "")
    if any(n.startswith("model.diffusion_model.") for n in names):
        xl = any(n.startswith("conditioner.embedders.1") for n in names)
        kind = f"full checkpoint: {'SDXL' if xl else 'Stable Diffusion'} in one file"
        return kind, [("loads in", "visadapt and diffusers (from_single_file), ComfyUI, A1111"), *facts]
    if any(n.startswith("down_blocks.") for n in names) and any(n.startswith("up_blocks.") for n in names):
        return "plain weights of a UNet (diffusers), no adapter", facts
    return "plain weights, no adapter", facts


def _methods(names: list[str]) -> list[str]:
    roles = {found[1] for n in names if (found := split(n))}
    methods = [m for role, m in _ROLES.items() if role in roles]
    methods += [kind for n in names if split(n) is None and (kind := unread(n))]
    methods = list(dict.fromkeys(methods))
    return [m for m in methods if m != "LoRA" or len(methods) == 1 or _beside(names)]


def _beside(names: list[str]) -> bool:
    """Whether some layers are plain LoRA beside layers of another method."""
    roles: dict[str, set[str]] = {}
    for name in names:
        if found := split(name):
            roles.setdefault(found[0], set()).add(found[1])
    return any("down" in held and not held & {"mid", "magnitude", "dora_scale"} for held in roles.values())


def _layers(names: list[str]) -> list[str]:
    return list(dict.fromkeys(found[0] if (found := split(n)) else n.rpartition(".")[0] for n in names))


def _ranks(tensors: list[Tensor]) -> str:
    found = [(split(t.name), t.shape) for t in tensors]
    ranks = [
        float(shape[0]) for named, shape in found if named and named[1] in ("down", "hada_w1_b", "lokr_w2_b") and shape
    ]
    whole = any(named and named[1] == "lokr_w2" for named, _ in found)
    return ", ".join(filter(None, [_range(ranks), "whole right factors" * whole])) or "unknown"


def _range(values: list[float]) -> str:
    distinct = sorted(set(values))
    if len(distinct) > 4:
        return f"{distinct[0]:g} to {distinct[-1]:g} ({len(distinct)} values)"
    return ", ".join(f"{v:g}" for v in distinct)


def _alphas(path: Path, tensors: list[Tensor]) -> list[float]:
    """Values of the alphas: one number each, read without torch."""
    found = []
    with path.open("rb") as file:
        for t in tensors:
            if t.name.endswith(".alpha") and t.size == 1 and t.dtype in ("F32", "F16", "BF16", "F64"):
                file.seek(t.offset)
                content = file.read({"F64": 8, "F32": 4}.get(t.dtype, 2))
                content = b"\0\0" + content if t.dtype == "BF16" else content  # the upper half of an F32
                code = {"F64": "<d", "F16": "<e"}.get(t.dtype, "<f")
                found.append(float(struct.unpack(code, content)[0]))
    return found


def _targets(names: list[str]) -> str:
    groups: dict[str, Counter[str]] = {}
    for layer in _layers(names):
        flat = re.sub(r"^(base_model\.model|lycoris)[._]", "", layer).replace(".", "_")
        part = re.match(r"(lora_unet|lora_te[12]?|unet|transformer|text_encoder_2|text_encoder)_", flat)
        leaf = _LEAF.search(flat)
        named = ([part[1]] if part else []) + ["motion modules"] * bool(_MOTION.search(layer))
        group = groups.setdefault(", ".join(named), Counter())
        group[leaf[1] if leaf else re.sub(r"\d+", "*", flat[part.end() if part else 0 :])] += 1
    told = (f"{part}: " * bool(part) + ", ".join(f"{leaf} ×{n}" for leaf, n in g.items()) for part, g in groups.items())
    return "; ".join(told)


def _base(metadata: dict[str, str], tensors: list[Tensor]) -> str:
    said = [
        metadata[k] for k in ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name") if k in metadata
    ]
    if any(_MOTION.search(t.name) for t in tensors):
        said.append("AnimateDiff")
    widths = set()
    for t in tensors:
        found = split(t.name)
        if _MOTION.search(t.name):  # both attentions there are over time
            continue
        if found and found[1] == "down" and re.search(r"attn2[._]to_[kv]$", found[0]) and len(t.shape) > 1:
            widths.add(t.shape[1])
    guess = [BASES.get(w, f"text of width {w}") for w in sorted(widths)]
    return ", ".join([*said, *(f"{g} (by the width of its text)" for g in guess)])


def _kohya_notes(names: list[str], methods: list[str], alphas: list[float], metadata: dict[str, str]) -> Facts:
    foreign = [m for m in methods if m not in ("LoRA", "DoRA")]
    lycoris = any(n.startswith("lycoris_") for n in names)
    if lycoris:
        diffusers = "does not load: it does not know names that begin with lycoris_"
    elif foreign:
        diffusers = f"refuses it: {', '.join(foreign)} is not plain LoRA"
    elif "DoRA" in methods:
        diffusers = "drops dora_scale with a warning: it loads, and renders something else"
    elif len(set(alphas)) > 1:
        diffusers = "loses alphas that differ between layers (attention, text encoder): it renders something else"
    else:
        diffusers = "loads"
    rows = any(len(found) == 2 and found[1] == "dora_scale" for n in names if (found := split(n)))
    for_comfy = metadata.get("visadapt_dora_norm") == "base"
    comfy = "loads" + (
        " (DoRA by rows is divided by another norm there: export format comfyui)" * (rows and not for_comfy)
    )
    theirs = "loads" if not for_comfy else "loads, but dora_scale was written for ComfyUI: export format lycoris"
    if any(n.endswith(".lokr_t2") for n in names):
        theirs = "fails: its own loader takes the rank of LoKr with a core from another tensor (4.1.3)"
    unknown = list(dict.fromkeys(kind for n in names if split(n) is None and (kind := unread(n))))
    own = f"does not read {', '.join(unknown)}" if unknown else "loads: va.load, visadapt import"
    return [("diffusers", diffusers), ("ComfyUI", comfy), ("LyCORIS", theirs), ("visadapt", own)]


def _diffusers_notes(names: list[str], methods: list[str]) -> Facts:
    motion = any(_MOTION.search(n) for n in names)
    diffusers = f"loads: {'AnimateDiffPipeline' if motion else 'pipe'}.load_lora_weights"
    if any(n.endswith(".alpha") for n in names):
        diffusers = "refuses it: keys that end in .alpha do not belong here"
    elif "LoKr" in methods:
        diffusers = "pipe.load_lora_weights refuses it; pipe.unet.load_lora_adapter loads the UNet's part"
    elif any(n.startswith("text_encoder") and n.endswith(".lora_magnitude_vector") for n in names):
        diffusers = "loads; with transformers 5 the magnitudes of the text encoder are dropped silently"
    unknown = [m for m in methods if m == "LoRA with a bias"]
    own = f"does not read {', '.join(unknown)}" if unknown else "loads: va.load, visadapt import"
    return [("diffusers", diffusers), ("visadapt", own)]


def shown(metadata: dict[str, str], prefix: str) -> Facts:
    """The entries of metadata that are short enough to print."""
    chosen = sorted((k, v) for k, v in metadata.items() if k.startswith(prefix) and len(v) < 200)
    return [(key, value) for key, value in chosen if key != "format"][:12]
