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

# Names load on first use, so that `visadapt --help` does not wait for torch.
_HOME = {
    **dict.fromkeys(
        ["Adaptation", "adapt", "adapters", "merge", "merged", "rebuild", "remove", "strength", "summary"],
        "visadapt.core.model",
    ),
    **dict.fromkeys(["Adapter", "FeatureMap", "WeightMap", "Delta", "LowRank"], "visadapt.core.adapter"),
    **dict.fromkeys(["penalty", "parameter_groups"], "visadapt.core.train"),
    **dict.fromkeys(["save"], "visadapt.core.state"),
    **dict.fromkeys(["load", "export"], "visadapt.interop"),
    **dict.fromkeys(["compose"], "visadapt.interop.compose"),
    **dict.fromkeys(["Zip"], "visadapt.core.zip"),
    **dict.fromkeys(
        ["METHODS", "LoRA", "DoRA", "FLoRA", "WaRA", "LoHa", "LoKr", "SALT", "Hydra", "SSF", "B4M"], "visadapt.methods"
    ),
}  # fmt: skip


__all__ = [
    "B4M",
    "METHODS",
    "SALT",
    "SSF",
    "Adaptation",
    "Adapter",
    "Delta",
    "DoRA",
    "FLoRA",
    "FeatureMap",
    "Hydra",
    "LoHa",
    "LoKr",
    "LoRA",
    "LowRank",
    "WaRA",
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
    from visadapt.methods import B4M, METHODS, SALT, SSF, DoRA, FLoRA, Hydra, LoHa, LoKr, LoRA, WaRA


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'visadapt' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
