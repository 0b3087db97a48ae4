"""PEFT folders: `adapter_config.json` and `adapter_model.safetensors`, for stock PEFT (checked with 0.21)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import nn

from visadapt.core.export import acting, lora_factors
from visadapt.core.model import adapt, adapters, is_adapter_key
from visadapt.core.site import Site
from visadapt.core.state import base_identity
from visadapt.core.target import exact
from visadapt.core.undo import Undo, all_or_nothing
from visadapt.interop.forms import only_dora
from visadapt.interop.loha import read_loha
from visadapt.interop.lokr import lokr_tensors, only_lokr, peft_config, read_lokr
from visadapt.interop.made import Made, graft_made
from visadapt.interop.parts import NEW_TOKENS, is_diffusion, network, parts
from visadapt.interop.peft_rules import (
    PREFIX,
    check_all_read,
    from_pattern,
    pattern_keys,
    read_config,
    same_shape,
    saved_tensors,
    target_modules,
)
from visadapt.methods import DoRA, LoRA

Model = TypeVar("Model", bound=nn.Module)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LYCORIS = {"LOKR": ("lokr_", read_lokr), "LOHA": ("hada_", read_loha)}  # PEFT's name -> how keys begin, reader


def export_peft(model: nn.Module, path: str | Path, rank: int | None = None) -> float:
    """Write all adapters as one PEFT folder; of a diffusion model, one folder per adapted part (`path/unet` …).

    LowRank methods are exact (alpha = rank, every scale folded into B); DoRA by rows is written as
    PEFT's own DoRA, and LoKr as PEFT's own where all layers are LoKr, in shapes that PEFT makes too;
    trained parameters outside adapters go to `modules_to_save`. Files appear together, once they are
    complete.

    Returns:
        The largest relative error of a layer (only `rank` makes it non-zero).

    Raises:
        ValueError: a change that a LoRA folder cannot hold.
    """
    if not is_diffusion(model):
        config, tensors, error = _folder(model, rank)
        _write(Path(path), config, tensors)
        return error
    changed = {part: module for part, module in parts(model).items() if acting(module)}
    if strange := [name for name in acting(model) if name.partition(".")[0] not in changed]:
        raise ValueError(
            f"'{strange[0]}' is adapted, but only the network and text encoders have PEFT folders; merge instead"
        )
    if not changed:
        raise ValueError("nothing to export: the model has no adapters, or all are at strength 0")
    folders = {part: _folder(module, rank) for part, module in changed.items()}
    for part, (config, tensors, _) in folders.items():
        _write(Path(path) / part, config, tensors)
    return max(error for _, _, error in folders.values())


def _folder(model: nn.Module, rank: int | None) -> tuple[dict[str, Any], dict[str, torch.Tensor], float]:
    """Configuration, tensors and largest error."""
    native = _lokrs(model)
    layers = acting(model)
    use_dora = bool(layers) and all(only_dora(layer) for layer in layers.values())
    tensors, ranks, error = native[1:] if native else _doras(model) if use_dora else _loras(model, rank)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and not is_adapter_key(n)]
    saved = sorted({n.rpartition(".")[0] for n in trained if not n.endswith(NEW_TOKENS)})
    for module in saved:
        for name, tensor in model.get_submodule(module).state_dict().items():
            tensors[f"{PREFIX}{module}.{name}"] = tensor.detach()
    own = {"peft_type": "LORA", "lora_alpha": max(ranks.values()), "use_dora": use_dora, "bias": "none"}
    config = (native[0] if native else own) | {
        "task_type": None,
        "base_model_name_or_path": base_identity(model)["name"],
        "r": max(ranks.values()),
        "target_modules": target_modules(model, ranks),
        "rank_pattern": pattern_keys(ranks),
        "alpha_pattern": pattern_keys(ranks),  # alpha = rank: a scale of 1
        "modules_to_save": saved or None,
    }
    return config, {k: v.float().cpu().contiguous().clone() for k, v in tensors.items()}, error


def _loras(model: nn.Module, rank: int | None) -> tuple[dict[str, torch.Tensor], dict[str, int], float]:
    tensors, ranks, error = {}, {}, 0.0
    for name, factors in lora_factors(model, rank).items():
        up = factors.up
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.down.detach()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up.view(*up.shape, *[1] * (factors.down.dim() - 2)).detach()
        ranks[name], error = len(factors.down), max(error, factors.error)
    return tensors, ranks, error


def _doras(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, int], float]:
    tensors, ranks = {}, {}
    for name, layer in acting(model).items():
        adapter = only_dora(layer)
        assert adapter is not None
        ones = [1] * (adapter.down.dim() - 2)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.down.detach()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (adapter.up * adapter.scale).detach().view(*adapter.up.shape, *ones)
        m = adapter.magnitude.detach()
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = m.view(1, -1, *ones) if ones else m
        ranks[name] = adapter.rank
    return tensors, ranks, 0.0


def _lokrs(model: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, int], float] | None:
    """PEFT's own LoKr, where that is all there is and PEFT would make the same shapes."""
    found = {name: (only_lokr(layer), layer) for name, layer in acting(model).items()}
    mine = {name: (one, layer) for name, (one, layer) in found.items() if one is not None}
    made = peft_config(mine) if mine and len(mine) == len(found) else None
    if made is None:
        return None
    options, ranks = made
    config = {"peft_type": "LOKR", "alpha": max(ranks.values()), **options}
    tensors = {f"{PREFIX}{n}.{key}": t for n, (one, _) in mine.items() for key, t in lokr_tensors(one).items()}
    return config, tensors, ranks, 0.0


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    known = {CONFIG, TENSORS, "README.md"}
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - known):
        raise ValueError(f"'{folder}' exists and is not a PEFT folder; choose another output or remove it")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (temporary / TENSORS).write_bytes(serialise(tensors, {"format": "pt"}))
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def import_peft(model: Model, path: str | Path, name: str = "default") -> Model:
    """Graft the LoRA, DoRA, LoKr or LoHa of a PEFT folder, or of the folders of a diffusion model's parts, onto a base.

    The model is unchanged if anything does not fit, or is not read.

    Raises:
        FileNotFoundError: the folder lacks one of its two files.
        ValueError: another PEFT method, options that are not supported, or layers that do not fit.
    """
    folder = Path(path)
    with all_or_nothing(model) as undo:
        if is_diffusion(model) and not (folder / CONFIG).is_file():
            _import_parts(model, folder, name, undo)
        else:
            _import(model, folder, name, undo)
    return model


def _import(model: nn.Module, folder: Path, name: str, undo: Undo) -> None:
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"'{folder}' is no PEFT folder: it has no {file}")
    config = read_config(folder / CONFIG, {"LORA": "lora_alpha"} | dict.fromkeys(LYCORIS, "alpha"))
    try:
        held = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"'{folder / TENSORS}' is damaged: {error}") from error
    held = {k.removeprefix(PREFIX): v for k, v in held.items()}
    whole = not is_diffusion(model) or any(k.partition(".")[0] in parts(model) for k in held)
    target = model if whole else network(model)  # the folder of a UNet alone, as `pipe.unet.save_pretrained` writes it
    try:
        saved = saved_tensors(config, held, target)
        graft = _graft_lora if config["peft_type"] == "LORA" else _graft_lycoris
        read = graft(target, config, {k: v for k, v in held.items() if k not in saved}, name)
        check_all_read(held, [*read, *saved])
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{folder}' does not fit this {type(model).__name__}: {error}") from error
    for key, tensor in saved.items():
        undo.replace(target.state_dict()[key], tensor)
        if key in dict(target.named_parameters()):
            target.get_parameter(key).requires_grad_(True)


def _graft_lycoris(model: nn.Module, config: dict[str, Any], held: dict[str, torch.Tensor], name: str) -> list[str]:
    """Keys that were read."""
    start, reader = LYCORIS[config["peft_type"]]
    roles: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in held.items():
        layer, _, role = key.rpartition(".")
        if role.startswith(start):
            roles.setdefault(layer, {})[role] = tensor
    made: dict[str, Made] = {}
    for n, given in roles.items():
        r, alpha = (
            from_pattern(config.get(f"{of}_pattern"), n, config[k]) for of, k in (("rank", "r"), ("alpha", "alpha"))
        )
        try:
            made[n] = reader(Site(model.get_submodule(n)), given, float(alpha) / r)
        except (ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
            raise ValueError(f"'{n}' {error}") from error
    if not made:
        raise ValueError(f"no {config['peft_type']} in it")
    graft_made(model, made, name)
    return [f"{n}.{role}" for n, given in roles.items() for role in given]


def _graft_lora(model: nn.Module, config: dict[str, Any], held: dict[str, torch.Tensor], name: str) -> list[str]:
    """Keys that were read."""
    layers = [k.removesuffix(".lora_A.weight") for k in held if k.endswith(".lora_A.weight")]
    bias = [k for k in held if k.endswith("lora_B.bias")]
    if bias or not layers:
        raise ValueError(f"'{bias[0]}' (lora_bias) has no counterpart" if bias else "no LoRA in it")
    method = DoRA if config.get("use_dora") else LoRA
    roles = ("lora_A.weight", "lora_B.weight", *(("lora_magnitude_vector",) if method is DoRA else ()))
    read = [f"{n}.{role}" for n in layers for role in roles]
    if lacking := [key for key in read if key not in held]:
        raise ValueError(f"the file lacks '{lacking[0]}'")
    targets = {exact(n): _rank_and_alpha(n, len(held[f"{n}.lora_A.weight"]), config) for n in layers}
    before = {id(a) for a in adapters(model).values()}
    adapt(model, method(), targets, name)
    for found, adapter in adapters(model, name).items():
        if id(adapter) not in before:
            n = found.rpartition(".adapters.")[0]
            for role, own in zip(roles, ("down", "up", "magnitude"), strict=False):
                tensor, mine = held[f"{n}.{role}"], getattr(adapter, own)
                given = tensor.flatten() if own == "magnitude" else tensor.flatten(1) if own == "up" else tensor
                same_shape(f"{n}.{role}", given, mine)
                with torch.no_grad():
                    mine.copy_(given)
    return read


def _rank_and_alpha(name: str, r: int, config: dict[str, Any]) -> dict[str, float]:
    told = from_pattern(config.get("rank_pattern"), name, config.get("r") or r)
    if told != r:  # the alpha beside it would be another layer's too
        raise ValueError(f"'{name}.lora_A.weight' is of rank {r}, and {CONFIG} says {told}, so PEFT cannot load it")
    alpha = float(from_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    # rsLoRA divides alpha by √r; as plain LoRA that is alpha · √r.
    return {"rank": r, "alpha": alpha * (r**0.5 if config.get("use_rslora") else 1)}


def _import_parts(model: nn.Module, folder: Path, name: str, undo: Undo) -> None:
    inside = {part: m for part, m in parts(model).items() if (folder / part / CONFIG).is_file()}
    if not inside:
        raise FileNotFoundError(f"'{folder}' has no PEFT folder of a part ({', '.join(parts(model))})")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and is_adapter_key(key))
    for part, child in inside.items():
        _import(child, folder / part, name, undo)
