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
from visadapt.interop.forms import only_dora
from visadapt.interop.loha import read_loha
from visadapt.interop.lokr import lokr_tensors, only_lokr, peft_config, read_lokr
from visadapt.interop.made import Made, graft_made
from visadapt.interop.parts import NEW_TOKENS, is_diffusion, network, parts
from visadapt.methods import DoRA, LoRA

Model = TypeVar("Model", bound=nn.Module)
PREFIX = "base_model.model."
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
        "target_modules": sorted(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,  # alpha = rank: a scale of 1
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
    known = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - known):
        raise ValueError(f"'{folder}' exists and is not a PEFT folder; choose another output or remove it")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (temporary / "adapter_model.safetensors").write_bytes(serialise(tensors, {"format": "pt"}))
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def import_peft(model: Model, path: str | Path, name: str = "default") -> Model:
    """Graft the LoRA, DoRA, LoKr or LoHa of a PEFT folder, or of the folders of a diffusion model's parts, onto a base.

    Raises:
        FileNotFoundError: the folder lacks one of its two files.
        ValueError: another PEFT method, options that are not supported, or layers that do not fit.
    """
    folder = Path(path)
    if is_diffusion(model) and not (folder / "adapter_config.json").is_file():
        return _import_parts(model, folder, name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"'{folder}' is no PEFT folder: it has no {file}")
    config = json.loads((folder / "adapter_config.json").read_text())
    kind = config.get("peft_type")
    if kind != "LORA" and kind not in LYCORIS:
        known = ", ".join(LYCORIS)
        raise ValueError(f"'{folder}' holds PEFT's {kind}; LORA (with or without use_dora), {known} can be read")
    try:
        held = load_file(folder / "adapter_model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"'{folder / 'adapter_model.safetensors'}' is damaged: {error}") from error
    held = {k.removeprefix(PREFIX): v for k, v in held.items()}
    whole = not is_diffusion(model) or any(k.partition(".")[0] in parts(model) for k in held)
    target = model if whole else network(model)  # the folder of a UNet alone, as `pipe.unet.save_pretrained` writes it
    if kind in LYCORIS:
        _graft_lycoris(target, folder, config, held, name)
    else:
        _graft_lora(target, folder, config, held, name)
    for module in config.get("modules_to_save") or []:
        for key in [k for k in held if k.startswith(f"{module}.")]:
            with torch.no_grad():
                target.state_dict()[key].copy_(held[key])
            if key in dict(target.named_parameters()):
                target.get_parameter(key).requires_grad_(True)
    return model


def _graft_lycoris(
    model: nn.Module, folder: Path, config: dict[str, Any], held: dict[str, torch.Tensor], name: str
) -> None:
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
        except (ValueError, AttributeError) as error:
            raise ValueError(f"'{folder}' does not fit this {type(model).__name__}: '{n}' {error}") from error
    if not made:
        raise ValueError(f"'{folder}': no {config['peft_type']} in it")
    graft_made(model, made, name)


def _graft_lora(
    model: nn.Module, folder: Path, config: dict[str, Any], held: dict[str, torch.Tensor], name: str
) -> None:
    layers = [k.removesuffix(".lora_A.weight") for k in held if k.endswith(".lora_A.weight")]
    bias = [k for k in held if k.endswith("lora_B.bias")]
    if bias or not layers:
        raise ValueError(f"'{folder}': " + (f"'{bias[0]}' (lora_bias) has no counterpart" if bias else "no LoRA in it"))
    alphas = {n: from_pattern(config.get("alpha_pattern"), n, config["lora_alpha"]) for n in layers}
    method = DoRA if config.get("use_dora") else LoRA
    targets = {}
    for n in layers:
        r = len(held[f"{n}.lora_A.weight"])
        # rsLoRA divides alpha by √r; as plain LoRA that is alpha · √r.
        targets[n] = {"rank": r, "alpha": float(alphas[n]) * (r**0.5 if config.get("use_rslora") else 1)}
    adapt(model, method(), targets, name)
    for found, adapter in adapters(model, name).items():
        n = found.rpartition(".adapters.")[0]
        with torch.no_grad():
            adapter.down.copy_(held[f"{n}.lora_A.weight"])  # type: ignore[operator, union-attr]
            adapter.up.copy_(held[f"{n}.lora_B.weight"].flatten(1))  # type: ignore[operator, union-attr]
            if isinstance(adapter, DoRA):
                adapter.magnitude.copy_(held[f"{n}.lora_magnitude_vector"].flatten())


def _import_parts(model: Model, folder: Path, name: str) -> Model:
    inside = {part: m for part, m in parts(model).items() if (folder / part / "adapter_config.json").is_file()}
    if not inside:
        raise FileNotFoundError(f"'{folder}' has no PEFT folder of a part ({', '.join(parts(model))})")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and is_adapter_key(key))
    for part, child in inside.items():
        import_peft(child, folder / part, name)
    return model


def from_pattern(patterns: dict[str, float] | None, name: str, default: float) -> float:
    """The value of PEFT's `rank_pattern` or `alpha_pattern` for a layer."""
    for pattern, value in (patterns or {}).items():
        if name == pattern.removeprefix("^") or name.endswith(f".{pattern}"):
            return value
    return default
