"""Layers of video networks that files of other tools cannot hold, because no stock code would load them."""

from __future__ import annotations

import re

from torch import nn

from visadapt.core.export import acting
from visadapt.interop.parts import TEXT, UNET, is_diffusion, network

MOTION = re.compile(r"(?:^|\.)motion_modules\.\d+\.")
_BY_KEYWORD = re.compile(rf"{MOTION.pattern}proj_(?:in|out)$")


def check_layers(model: nn.Module, format: str) -> None:
    """Raise where stock code would refuse, or crash on, what an export of a video network writes.

    AnimateDiff calls the projections of its motion modules by keyword (``proj_in(input=…)``, diffusers 0.42), which
    the layers of PEFT 0.21 do not take. ``UNet3DConditionModel`` and others load no LoRA files at all, and no tool
    knows kohya's names of motion modules or transformers.

    Raises:
        ValueError: naming the layer and what to do instead.
    """
    layers = list(acting(model))
    called = [path for path in layers if _BY_KEYWORD.search(path)]
    if called and format in ("peft", "diffusers"):
        raise ValueError(
            f"'{called[0]}': AnimateDiff calls this layer by a keyword that PEFT does not take, so no stock pipeline "
            "could load it; merge instead, or train without the preset temporal.proj"
        )
    if format == "peft" or not is_diffusion(model):
        return
    net = network(model)
    if hasattr(net, "config") and not hasattr(net, "load_lora_adapter"):
        raise ValueError(f"{type(net).__name__} loads no LoRA files in diffusers; take format 'peft', or merge")
    if format == "diffusers":
        return
    strange = [path for path in layers if MOTION.search(path) or path.partition(".")[0] not in (UNET, *TEXT)]
    if strange:
        raise ValueError(
            f"'{strange[0]}': no tool knows a name for this layer in a {format} file; take format 'diffusers' or 'peft'"
        )
