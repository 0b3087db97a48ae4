"""The single file of kohya's sd-scripts, which ComfyUI, LyCORIS, A1111 and diffusers read."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from visadapt.core.adapter import LowRank
from visadapt.core.export import layer_factors
from visadapt.core.layer import Grafted
from visadapt.core.site import stored
from visadapt.interop.files import serialised, write_tensors
from visadapt.interop.forms import as_kernel, only_dora, row_norms
from visadapt.interop.kohya_names import base_version, written_names
from visadapt.interop.lokr import lokr_tensors, only_lokr
from visadapt.interop.parts import adapted
from visadapt.methods import DoRA, LoHa

Reader = Literal["kohya", "lycoris", "comfyui"]
BASE_NORM = "visadapt_dora_norm"  # metadata: `dora_scale` is divided by ‖W‖, as in ComfyUI


@torch.no_grad()
def export_kohya(model: nn.Module, path: str | Path, rank: int | None = None, reader: Reader = "kohya") -> float:
    """Write all adapters of a UNet and its text encoders as one file.

    Names are diffusers' with underscores, for SDXL those of the original UNet, as sd-scripts writes them. Plain LoRA
    has one alpha for all layers (diffusers 0.42 loses others), the largest rank; the rest of each scale is in
    `lora_up`. Other forms have alpha = rank.

    Args:
        model: a model with `unet` and text encoders as children, or a UNet.
        path: file to write, .safetensors.
        rank: rank of the SVD of changes that the file cannot hold as they are; None refuses them.
        reader: "kohya" writes plain LoRA, which all tools read. "lycoris" keeps DoRA (`dora_scale`, by rows or by
            inputs), LoHa (`hada_…`), LoKr (`lokr_…`) and Tucker cores on convolutions (`lora_mid`). "comfyui" does so
            for ComfyUI, whose DoRA by rows is m ⊙ V / ‖W‖ instead of m ⊙ V / ‖V‖ (comfy/weight_adapter/base.py):
            there `dora_scale` is m ⊙ ‖W‖ / ‖V‖.

    Returns:
        The largest relative error of a layer (only `rank` makes it non-zero).

    Raises:
        ValueError: a change that the file cannot hold, or another ending than .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"'{path}' should end in .safetensors")
    names, worst = written_names(model), 0.0
    forms: dict[str, dict[str, Tensor]] = {}
    for own, (_, _, layer) in adapted(model).items():
        form = None if reader == "kohya" else _native(layer, reader)
        if form is None:
            if reader == "kohya" and rank is None and only_dora(layer, ("out", "in")):
                raise ValueError(
                    f"'{own}' is changed by DoRA, which is no low-rank update: formats 'diffusers', 'lycoris' and "
                    "'comfyui' hold it as it is; for plain LoRA give `rank` (--rank), an SVD whose error is reported"
                )
            factors = layer_factors(own, layer, rank)
            form, worst = _plain(layer, factors.down, factors.up), max(worst, factors.error)
        forms[names[own]] = form
    if reader == "kohya":
        forms |= _recognisable(model, forms, names)
    alpha = float(max(_rank(form) for form in forms.values()))
    tensors: dict[str, Tensor] = {}
    for name, form in forms.items():
        if reader == "kohya":
            form["lora_up.weight"] = form["lora_up.weight"] * (_rank(form) / alpha)
        form["alpha"] = torch.tensor(alpha if reader == "kohya" else float(_rank(form)))
        tensors |= {f"{name}.{key}": tensor for key, tensor in form.items()}
    metadata = _metadata(model, forms, reader, alpha, path.stem)
    metadata["sshs_model_hash"] = model_hash(serialised(tensors, metadata))
    write_tensors(path, tensors, metadata)
    return worst


def _recognisable(
    model: nn.Module, forms: dict[str, dict[str, Tensor]], names: dict[str, str]
) -> dict[str, dict[str, Tensor]]:
    """A zero LoRA on one `out_proj` of each text encoder whose attention is adapted without any.

    diffusers 0.42 knows kohya's names of text attention by `out_proj`, and drops the others of a file without it.
    """
    added = {}
    for part in ("text_encoder", "text_encoder_2"):
        mine = [own for own, name in names.items() if own.startswith(f"{part}.") and name in forms]
        attention = [own for own in mine if own.endswith((".q_proj", ".k_proj", ".v_proj"))]
        if attention and not any(own.endswith(".out_proj") for own in mine):
            own = f"{attention[0].rpartition('.')[0]}.out_proj"
            weight = model.get_submodule(own).weight
            added[names[own]] = {"lora_down.weight": weight[:1] * 0, "lora_up.weight": weight[:, :1] * 0}  # type: ignore[index, operator]
    return added


def _rank(form: dict[str, Tensor]) -> int:
    held = [form[key] for key in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if key in form]
    return len(held[0]) if held else 1  # LoKr of two whole factors


def _plain(layer: Grafted, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {"lora_down.weight": down, "lora_up.weight": as_kernel(up, layer)}


def _native(layer: Grafted, reader: Reader) -> dict[str, Tensor] | None:
    """DoRA, LoHa, LoKr or a Tucker core as it is, if one of these is all that changes the layer."""
    dora = only_dora(layer, ("out", "in"))
    if dora is not None:
        return _plain(layer, dora.down, dora.up * dora.scale) | {"dora_scale": _dora_scale(layer, dora, reader)}
    if (lokr := only_lokr(layer)) is not None:
        return lokr_tensors(lokr)
    active = layer.active("weight")
    if len(active) != 1 or layer._views or not isinstance(active[0], LowRank) or active[0].rows is not None:
        return None
    one = active[0]
    if type(one) is LoHa:
        first = one.up_a * (one.scale * one.strength)
        pairs = (first, one.down_a.flatten(1), one.up_b, one.down_b.flatten(1))
        return dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), pairs))
    chain = one.chain()
    if chain is None or chain[1].shape[0] != chain[1].shape[1]:
        return None  # two factors are as small, or `lora_mid` is not square and no tool knows it
    inner, core, up = chain
    return _plain(layer, as_kernel(inner, layer), up * one.strength) | {"lora_mid.weight": core}


def _dora_scale(layer: Grafted, dora: DoRA, reader: Reader) -> Tensor:
    magnitude: Tensor = dora.magnitude
    if dora.axis == "in":
        return as_kernel(magnitude[None], layer)
    if reader == "comfyui":
        weight = stored(layer, "weight").detach().to(magnitude.dtype)
        direction = weight + (dora.scale * dora.up @ dora.down.flatten(1)).view(weight.shape)
        magnitude = magnitude * row_norms(weight) / row_norms(direction)
    return as_kernel(magnitude[:, None], layer)


def _metadata(
    model: nn.Module, forms: dict[str, dict[str, Tensor]], reader: Reader, alpha: float, name: str
) -> dict[str, str]:
    keys = {key for form in forms.values() for key in form}
    lokr = any(key.startswith("lokr_") for key in keys)
    plain = not lokr and not keys & {"hada_w1_a", "dora_scale", "lora_mid.weight"}
    args: dict[str, str] = {}
    if not plain:
        args["algo"] = "loha" if "hada_w1_a" in keys else "lokr" if lokr else "lora"
        args |= {"dora_wd": "True"} if "dora_scale" in keys else {}
        args |= {"use_tucker": "True"} if keys & {"lora_mid.weight", "lokr_t2"} else {}
    downs = {n: form["lora_down.weight"] for n, form in forms.items() if "lora_down.weight" in form}
    kernels = [len(down) for n, down in downs.items() if "lora_mid.weight" in forms[n] or down.shape[2:].numel() > 1]
    if kernels:
        args |= {"conv_dim": str(max(kernels)), "conv_alpha": f"{alpha:g}"}
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(max(map(_rank, forms.values()))),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(args),
        "ss_output_name": name,
    }
    if version := base_version(model):
        metadata |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    if reader == "comfyui" and "dora_scale" in keys:
        metadata[BASE_NORM] = "base"
    return metadata


def model_hash(content: bytes) -> str:
    """SHA-256 of a safetensors file without its header, by which A1111 and sd-scripts know a model."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return hashlib.sha256(content[start:]).hexdigest()
