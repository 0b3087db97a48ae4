"""Target presets of any timm model, read off its layers."""

import re
from typing import Any

from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def presets(model: nn.Module) -> dict[str, list[str]]:
    """Target presets read off a model: "attention", "mlp", "convs" and "all", without the classifier.

    A timm attention that keeps its query bias apart (BEiT, EVA, Swin V2) reads ``qkv.weight`` instead of
    calling the layer; there the preset names the parameter.
    """
    classifier = as_tuple(getattr(model, "pretrained_cfg", {}).get("classifier"))
    found: dict[str, list[str]] = {"attention": [], "mlp": [], "convs": [], "all": []}
    for path, module in model.named_modules():
        if any(path == head or path.startswith(f"{head}.") for head in classifier):
            continue
        if isinstance(module, nn.Linear):
            parent, _, leaf = path.rpartition(".")
            bypassed = leaf == "qkv" and getattr(model.get_submodule(parent), "q_bias", None) is not None
            kind = "attention" if "attn" in path else "mlp" if "mlp" in path else None
            pattern = _pattern(path) + (".weight" if bypassed else "")
        elif isinstance(module, _CONVOLUTIONS):
            kind, pattern = "mlp" if "mlp" in path else None, _pattern(path)  # ConvNeXt's 1 x 1 form
            found["convs"].append(pattern)
        else:
            continue
        for key in ("all", kind) if kind else ("all",):
            found[key].append(pattern)
    return {key: list(dict.fromkeys(patterns)) for key, patterns in found.items() if patterns}


def _pattern(path: str) -> str:
    """Replace block numbers by stars; a last number stays, for layers of other types stand beside it."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Make timm's "one, several or none" a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)
