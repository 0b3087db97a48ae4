"""LoRA files of diffusers, kohya, LyCORIS and ComfyUI, read into adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from visadapt.core.site import Site
from visadapt.interop.files import read_keys, read_tensors
from visadapt.interop.forms import row_norms
from visadapt.interop.keys import is_lora, split, unread
from visadapt.interop.kohya import BASE_NORM
from visadapt.interop.kohya_names import readable_names
from visadapt.interop.loha import HADA, read_loha
from visadapt.interop.lokr import read_lokr
from visadapt.interop.made import Made, graft_made, shaped
from visadapt.interop.parts import OLD, TRANSFORMER, UNET, layers
from visadapt.interop.peft_rules import from_pattern
from visadapt.methods import DoRA, FLoRA, LoRA

Model = TypeVar("Model", bound=nn.Module)
_LORA = {"down", "up", "mid", "magnitude", "dora_scale"}


def is_lora_file(path: str | Path) -> bool:
    """Whether it is a LoRA file of another tool."""
    metadata, keys = read_keys(Path(path))
    return "visadapt" not in metadata and is_lora(keys)


@torch.no_grad()
def import_lora(model: Model, path: str | Path, name: str = "default") -> Model:
    """Graft what a file of diffusers, kohya, LyCORIS or ComfyUI holds onto a UNet and its text encoders.

    LoRA, DoRA (by rows or by inputs, as the shape of its magnitude says), Tucker cores (`lora_mid`, as FLoRA), LoHa and
    LoKr, with an own rank and alpha for each layer; without an alpha the scale is 1. Text keys may have `text_model.`
    or not. The model is unchanged if anything does not fit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor that belongs to no layer of the model, is of a kind that is not read, or has a wrong
            shape; the first ones are named.
    """
    path = Path(path)
    metadata, tensors = read_tensors(path)
    held, problems = _by_layer(_names(model), tensors)
    _add_alphas(held, metadata)
    made: dict[str, Made] = {}
    for own, roles in held.items():
        try:
            made[own] = _make(Site(model.get_submodule(own)), roles, metadata.get(BASE_NORM) == "base")
        except ValueError as error:
            problems.append(f"'{own}' {error}")
    if problems or not made:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        told = "; ".join(problems[:3]) or "it holds no LoRA, DoRA, LoHa or LoKr"
        raise ValueError(f"'{path}' does not fit this {type(model).__name__}: {told}{more}")
    graft_made(model, made, name)
    return model


def _names(model: nn.Module) -> dict[str, str]:
    """Every layer name of every format -> own path."""
    found = readable_names(model)
    for part, name, own in layers(model):
        found |= {f"{part}.{name}": own, f"{part}.{name.removeprefix(OLD)}": own}
        if part in (UNET, TRANSFORMER):
            found[name] = own  # `unet.save_lora_adapter` writes no prefix
    return found


def _by_layer(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Own path -> role -> tensor, and what is wrong with the other tensors."""
    held: dict[str, dict[str, Any]] = {}
    problems = []
    for key, tensor in tensors.items():
        layer, role = split(key) or ("", "")
        if layer in names:
            held.setdefault(names[layer], {"name": layer})[role] = tensor
        elif role:
            problems.append(f"'{key}' belongs to no layer of the model")
        elif kind := unread(key):
            problems.append(f"'{key}' is {kind}, which is not read (merge it with its own tool)")
        else:
            problems.append(f"'{key}' is not known")
    return held, problems


def _add_alphas(held: Mapping[str, dict[str, Any]], metadata: Mapping[str, str]) -> None:
    """Alphas that diffusers keeps in metadata: PEFT's configuration, with the part in front of each key."""
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    for roles in held.values():
        part, _, name = roles.pop("name").partition(".")
        prefix = f"{part}." if f"{part}.lora_alpha" in config else ""
        if "alpha" in roles or "down" not in roles or f"{prefix}lora_alpha" not in config:
            continue
        inner = name if prefix else f"{part}.{name}"
        patterns = config.get(f"{prefix}alpha_pattern")
        alpha = float(from_pattern(patterns, inner, config[f"{prefix}lora_alpha"]))
        rs = config.get(f"{prefix}use_rslora")
        roles["alpha"] = torch.tensor(alpha * (len(roles["down"]) ** 0.5 if rs else 1))


def _make(site: Site, roles: Mapping[str, Tensor], base_norm: bool) -> Made:
    """The method that says what a file holds of one layer.

    Raises:
        ValueError: a tensor is missing, or does not have the shape that the layer needs.
    """
    given = set(roles) - {"alpha"}
    if given == HADA:
        return read_loha(site, roles)
    if given and all(role.startswith("lokr_") for role in given):
        return read_lokr(site, roles)
    if not {"down", "up"} <= given or given - _LORA:
        raise ValueError(
            f"holds {', '.join(sorted(given)) or 'an alpha alone'}, which is no whole LoRA, DoRA, LoHa or LoKr"
        )
    rank = len(roles["down"])
    alpha = float(roles["alpha"]) if "alpha" in roles else float(rank)
    up = shaped(roles["up"], (site.width, rank), "up")
    down = roles["down"]
    if "mid" in given:
        mid = shaped(roles["mid"], (rank, rank, *site.in_shape[1:]), "mid")
        inner = shaped(down, (rank, site.in_shape[0]), "down")
        if not given & {"magnitude", "dora_scale"}:
            return _flora(site, mid, inner, up, alpha / rank)
        down = torch.einsum("pq...,qi->pi...", mid, inner)
    down = shaped(down, (rank, *site.in_shape), "down")
    tensors = {"down": down, "up": up}
    short = None if alpha == rank else alpha
    if not given & {"magnitude", "dora_scale"}:
        return LoRA(rank=rank, alpha=short), tensors
    scale = roles["magnitude"] if "magnitude" in given else roles["dora_scale"]
    by_row = "magnitude" in given or len(scale) == site.width  # as ComfyUI and LyCORIS tell them apart
    magnitude = shaped(scale, (site.width if by_row else site.in_shape[0],), "a magnitude")
    if base_norm and by_row:
        weight = site.weight.to(up.dtype)
        magnitude = magnitude * row_norms(weight + (alpha / rank * up @ down.flatten(1)).view(weight.shape))
        magnitude = magnitude / row_norms(weight)
    axis: Literal["out", "in"] = "out" if by_row else "in"
    return DoRA(rank=rank, alpha=short, axis=axis), tensors | {"magnitude": magnitude}


def _flora(site: Site, mid: Tensor, inner: Tensor, up: Tensor, scale: float) -> Made:
    """The core as it is; a mode that is smaller than the rank swallows its matrix."""
    rank, width, (fan_in, *kernel) = len(mid), site.width, site.in_shape
    into = inner.t()
    if rank > fan_in:
        mid, into = torch.einsum("pq...,qi->pi...", mid, inner), torch.eye(fan_in)
    if rank > width:
        mid, up = torch.einsum("pq...,op->oq...", mid, up), torch.eye(width)
    axes = {f"axes.{i}": torch.eye(k) for i, k in enumerate(kernel)}
    prototype = FLoRA(rank=rank, kernel_rank=max(kernel, default=1), scale=scale)
    return prototype, {"core": mid, "up": up, "inner": into, **axes}
