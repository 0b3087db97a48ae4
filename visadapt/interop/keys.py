"""Tensor names of LoRA files: which layer, and what of it. Needs no torch."""

from __future__ import annotations

import re

# End of a tensor name -> what it is of its layer.
ROLES = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_linear_layer.down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "lora_linear_layer.up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    **{f"hada_w{i}_{side}": f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"},
    **{f"lokr_{end}": f"lokr_{end}" for end in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
# What other tools write and visadapt does not read; it is named, not ignored.
UNREAD = {
    "hada_t1": "LoHa with Tucker cores",
    "lokr_t1": "LoKr with a core in its left factor",
    "oft_": "OFT",
    "lora_B.bias": "LoRA with a bias",
    "vera_": "VeRA",
    "ia3_": "IA³",
    "diff": "full-rank differences",
}
# The first form that diffusers had: attention processors owned the factors.
_PROCESSOR = re.compile(r"(.+)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight")


def split(key: str) -> tuple[str, str] | None:
    """A tensor name as (layer, role); None if it is no part of LoRA, DoRA, LoHa, LoKr or a Tucker core.

    Args:
        key: name in a file of diffusers, kohya, LyCORIS or PEFT.
    """
    if match := _PROCESSOR.fullmatch(key):
        layer, which, role = match.groups()
        return f"{layer}.to_{which}" + (".0" if which == "out" else ""), role
    for end, role in ROLES.items():
        if key.endswith(f".{end}"):
            return key.removesuffix(f".{end}").removeprefix("base_model.model."), role
    return None


def is_lora(keys: list[str]) -> bool:
    """Whether these are the names of a LoRA file of some tool (alphas alone are not)."""
    return any(_telling(key) for key in keys)


def _telling(key: str) -> bool:
    found = split(key)
    if found is not None:
        return found[1] != "alpha"
    return unread(key) is not None and (key.startswith(("lora_", "lycoris_", "unet.", "transformer.", "text_encoder")))


def unread(key: str) -> str | None:
    """What the tensor belongs to, if it is a kind of adapter that visadapt does not read."""
    last = key.rpartition(".")[2]
    for sign, kind in UNREAD.items():
        if key.endswith(f".{sign}") or (sign.endswith("_") and last.startswith(sign)) or last.startswith(f"{sign}_"):
            return kind
    return None
