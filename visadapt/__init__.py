"""visadapt: adapt frozen vision and generation backbones with small, exact, mergeable adapters.

import timm, visadapt as va

model = timm.create_model("vit_base_patch16_224", pretrained=True)
va.adapt(model, va.LoRA(rank=8), ["attn.qkv:q", "attn.qkv:v"])
...
va.save(model, "birds.safetensors")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names load on first use, so that `visadapt --help` does not wait for torch; so do the methods of the catalogue.
_HOME = {
    **dict.fromkeys(
        ["Adaptation", "adapt", "adapters", "merge", "merged", "rebuild", "remove", "strength", "summary"],
        "visadapt.core.model",
    ),
    **dict.fromkeys(["Adapter", "FeatureMap", "WeightMap", "Delta", "LowRank"], "visadapt.core.adapter"),
    **dict.fromkeys(["penalty", "parameter_groups"], "visadapt.core.train"),
    "save": "visadapt.core.state",
    **dict.fromkeys(["load", "export"], "visadapt.interop"),
    "compose": "visadapt.interop.compose",
    "Zip": "visadapt.core.zip",
    "METHODS": "visadapt.methods",
}  # fmt: skip


__all__ = [
    "METHODS",
    "Adaptation",
    "Adapter",
    "Delta",
    "FeatureMap",
    "LowRank",
    "WeightMap",
    "Zip",
    "adapt",
    "adapters",
    "compose",
    "export",
    "load",
    "merge",
    "merged",
    "parameter_groups",
    "penalty",
    "rebuild",
    "remove",
    "save",
    "strength",
    "summary",
]

if TYPE_CHECKING:
    from visadapt.core.adapter import Adapter, Delta, FeatureMap, LowRank, WeightMap
    from visadapt.core.model import (
        Adaptation,
        adapt,
        adapters,
        merge,
        merged,
        rebuild,
        remove,
        strength,
        summary,
    )  # fmt: skip
    from visadapt.core.state import save
    from visadapt.core.train import parameter_groups, penalty
    from visadapt.core.zip import Zip
    from visadapt.interop import export, load
    from visadapt.interop.compose import compose
    from visadapt.methods import *  # noqa: F403
    from visadapt.methods import METHODS


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    methods = import_module("visadapt.methods").METHODS if name[0].isupper() else {}  # others may be modules
    if name not in methods:
        raise AttributeError(f"module 'visadapt' has no attribute '{name}'")
    return methods[name]


def __dir__() -> list[str]:
    return [*__all__, *import_module("visadapt.methods").METHODS, "__version__"]
