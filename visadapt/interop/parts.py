"""The parts of a diffusion model that LoRA files speak of, and what the files call their layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from visadapt.core import ops
from visadapt.core.export import acting
from visadapt.core.layer import Grafted
from visadapt.core.model import is_adapter_key

UNET, TRANSFORMER = "unet", "transformer"
TEXT = ("text_encoder", "text_encoder_2")
NEW_TOKENS = ".new_tokens"  # trained embeddings of new words, which have files of their own
OLD = "text_model."  # transformers before 5.6 had it in every CLIP; files keep it


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Name in files -> module: `unet` or `transformer`, `text_encoder`, `text_encoder_2`; a UNet alone is `unet`.

    Raises:
        ValueError: the model is neither a UNet nor a diffusion model.
    """
    if is_diffusion(model):
        return {n: getattr(model, n) for n in (UNET, TRANSFORMER, *TEXT) if _has(model, n)}
    if hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
        return {UNET: model}
    raise ValueError(
        f"{type(model).__name__} is no diffusion model (no child `unet`, no `down_blocks`), and files of diffusers, "
        "kohya and LyCORIS hold adapters of one; other models have format 'peft'"
    )


def is_diffusion(model: nn.Module) -> bool:
    """Whether `parts` finds the parts of the model as its children: models with a `transformer` are many."""
    return _has(model, UNET) or (_has(model, TRANSFORMER) and _has(model, "vae"))


def _has(model: nn.Module, name: str) -> bool:
    return isinstance(getattr(model, name, None), nn.Module)


def network(model: nn.Module) -> nn.Module:
    """The UNet or transformer."""
    found = parts(model)
    return found[UNET if UNET in found else TRANSFORMER]


def is_xl(model: nn.Module) -> bool:
    """Whether the UNet has SDXL's layout (size conditioning beside the pooled text)."""
    return getattr(config_of(model), "addition_embed_type", None) == "text_time"


def config_of(model: nn.Module) -> object:
    """The configuration of the UNet or transformer."""
    return getattr(network(model), "config", None)


def layers(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Part, name within it as files have it, and own path, of every Linear and convolution."""
    for part, module in parts(model).items():
        prefix = f"{part}." if is_diffusion(model) else ""
        for name, layer in module.named_modules():
            if ops.is_linear_op(layer) and not is_adapter_key(f"{name}."):
                yield part, file_name(part, name), prefix + name


def adapted(model: nn.Module) -> dict[str, tuple[str, str, Grafted]]:
    """Own path -> (part, name within it as files have it, layer) of every adapted layer.

    Raises:
        ValueError: nothing is adapted, or something that no LoRA file of a diffusion model can hold: another part,
            a parameter outside adapters that was trained.
    """
    named = {path: (part, name) for part, name, path in layers(model)}
    every = acting(model)
    found = {path: (*named[path], layer) for path, layer in every.items() if path in named}
    if strange := [path for path in every if path not in named]:
        raise ValueError(
            f"'{strange[0]}' is adapted, but these files hold the network and text encoders only; merge instead"
        )
    if not found:
        raise ValueError("nothing to export: the model has no adapters, or all are at strength 0")
    trained = [n for n, p in model.named_parameters() if p.requires_grad and not is_adapter_key(n)]
    trained = [n for n in trained if not n.endswith(NEW_TOKENS)]
    if trained:
        raise ValueError(
            f"'{trained[0]}' and {len(trained) - 1} more parameters outside the adapters were trained, which a LoRA "
            "file does not hold; merge instead, or freeze them if they were not"
        )
    return found


def file_name(part: str, name: str) -> str:
    """The name that files have for a layer: with `text_model.` in text encoders."""
    flat = part in TEXT and not name.startswith((OLD, "text_projection"))
    return OLD + name if flat else name
