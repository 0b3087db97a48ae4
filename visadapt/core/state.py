"""One adapter file: safetensors with the whole plan in its metadata.

Tensors: `<layer>.adapters.<key>.<tensor>` of every adapter, and `trained.<name>` for parameters
outside adapters that were trained (a new head). Metadata `visadapt`: JSON with the sets (method,
hyper-parameters, sites, the values of the weights where the method depends on them) and the identity of the base model.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from visadapt.core.adapter import Adapter
from visadapt.core.files import replacing, serialise
from visadapt.core.model import adapt, adapters, check_unmerged, grafted, is_adapter_key, label, overrides_of
from visadapt.core.site import stored
from visadapt.core.target import exact
from visadapt.core.undo import all_or_nothing

FORMAT = "1"
Model = TypeVar("Model", bound=nn.Module)


def base_identity(model: nn.Module, name: str | None = None) -> dict[str, str]:
    """Name and hash of the base model: what an adapter was trained on.

    The hash covers the names, shapes and up to 65,536 evenly spaced values of every frozen base
    tensor, rounded to bf16 so that a bf16 copy of the same model counts as the same.
    """
    digest = hashlib.sha256()
    for path, tensor in sorted(model.state_dict().items()):
        if is_adapter_key(path) or not tensor.is_floating_point() or _is_trained(model, path):
            continue
        flat = tensor.detach().flatten()
        flat = flat[:: max(1, flat.numel() // 65536)].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{path}{tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.int16).numpy().tobytes())
    config = getattr(model, "pretrained_cfg", None) or {}
    known = name or (config.get("architecture") if isinstance(config, Mapping) else None) or type(model).__name__
    return {"name": str(known), "sha256": digest.hexdigest()}


def _is_trained(model: nn.Module, path: str) -> bool:
    try:
        return model.get_parameter(path).requires_grad
    except AttributeError:
        return False  # a buffer


def plan(model: nn.Module, base_name: str | None = None) -> dict[str, Any]:
    """Everything needed to rebuild the adapters on a fresh base, as plain data."""
    sets: dict[tuple[str, str], dict[str, Any]] = {}
    for path, adapter in adapters(model).items():
        method = f"{type(adapter).__module__}.{type(adapter).__qualname__}"
        entry = sets.setdefault(
            (adapter.name, method),
            {"name": adapter.name, "method": method, "hparams": adapter.hparams(), "sites": {}},
        )
        entry["sites"][label(path, adapter)] = overrides_of(entry["hparams"], adapter)
    for entry in sets.values():
        if find_method(entry["method"]).exact_base:
            entry["weights"] = _values(model, entry["name"])
    lean = [path for path, layer in grafted(model) if layer.__dict__.get("lean")]
    return {"format": FORMAT, "base": base_identity(model, base_name), "sets": list(sets.values()), "lean": bool(lean)}


def _values(model: nn.Module, name: str) -> str:
    """Hash of up to 65,536 values in float32 of every weight that a set is on; see `Adapter.exact_base`."""
    digest = hashlib.sha256()
    for _, layer in grafted(model):
        found: list[Adapter] = [a for a in layer.adapters.values() if isinstance(a, Adapter) and a.name == name]
        for param in sorted({a.param for a in found if a.exact_base}):
            flat = stored(layer, param).detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 65536)].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapter file: adapters' parameters and persistent buffers, and what else was trained."""
    spared = {f"{path}.{n}" for path, a in adapters(model).items() for n in a.training_state}
    found = {k: v for k, v in model.state_dict().items() if is_adapter_key(k) and k not in spared}
    trained = {n for n, p in model.named_parameters() if p.requires_grad and not is_adapter_key(n)}
    state = model.state_dict()
    found |= {f"trained.{n}": state[n] for n in trained}
    # Running statistics move with a trained normalisation layer.
    owners = {n.rpartition(".")[0] for n in trained}
    found |= {f"trained.{n}": b for n, b in model.named_buffers() if n.rpartition(".")[0] in owners and n in state}
    return {k: v.detach().cpu().contiguous().clone() for k, v in found.items()}


def save(
    model: nn.Module, path: str | Path, base_name: str | None = None, extra: Mapping[str, str] | None = None
) -> Path:
    """Write the adapters of a model, and what else was trained, as one safetensors file.

    Args:
        model: the adapted model.
        path: file to write; replaced only once the new one is complete.
        base_name: how the base is called (timm name, hub id or path).
        extra: further metadata, strings only.

    Raises:
        ValueError: the model has nothing to save.
    """
    check_unmerged(model)
    held = tensors(model)
    if not held:
        raise ValueError("nothing to save: the model has no adapters and no trained parameter")
    metadata = {**(extra or {}), "format": "pt", "visadapt": json.dumps(plan(model, base_name))}
    with replacing(path) as temporary:
        temporary.write_bytes(serialise(held, metadata))
    return Path(path)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plan and tensors of an adapter file, without running anything in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not safetensors, or not an adapter file of visadapt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "visadapt" not in metadata:
                raise ValueError(
                    f"'{path}' is a safetensors file but not an adapter of visadapt; `visadapt inspect` says what it is"
                )
            return _plan(metadata["visadapt"], path), {k: file.get_tensor(k) for k in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is not a complete safetensors file ({error}); adapters load from nothing else"
        ) from error


def _plan(text: str, path: Path) -> dict[str, Any]:
    """What a file says of its adapters."""
    try:
        found: dict[str, Any] = json.loads(text)
        whole = all({"name", "method", "hparams", "sites"} <= entry.keys() for entry in found["sets"])
        if not (whole and {"name", "sha256"} <= found["base"].keys()):
            raise KeyError("sets")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is an adapter of visadapt, but what it says of itself is broken") from error
    return found


def load_native(model: Model, path: str | Path, strict: bool = False, name: str | None = None) -> Model:
    """Rebuild the adapters of a file on a model; the model is unchanged if anything does not fit.

    Args:
        model: a fresh base, or one with other sets.
        path: file written by `save`.
        strict: refuse a base whose identity differs; otherwise warn.
        name: new name of the set (files with one set only, which may be of several methods).

    Raises:
        ValueError: wrong kind of file, unknown method, or layers and shapes that differ.
    """
    file_plan, held = read(path)
    if file_plan.get("format") != FORMAT:
        raise ValueError(
            f"'{path}' has format {file_plan.get('format')}, this visadapt reads {FORMAT}; upgrade visadapt"
        )
    _check_base(model, file_plan["base"], held, path, strict)
    sets = file_plan["sets"]
    if name is not None:
        names = {entry["name"] for entry in sets}
        if len(names) != 1:
            raise ValueError(f"'{path}' holds {len(names)} sets; `name` renames files with one set only")
        held = {_rename(k, sets[0]["name"], name): v for k, v in held.items()}
        sets = [{**entry, "name": name} for entry in sets]
    try:
        with all_or_nothing(model) as undo:
            for entry in sets:
                prototype = find_method(entry["method"])(**entry["hparams"])
                sites = {exact(label): overrides for label, overrides in entry["sites"].items()}
                adapt(model, prototype, sites, entry["name"], lean=file_plan.get("lean", False))
            if any("weights" in entry and entry["weights"] != _values(model, entry["name"]) for entry in sets):
                raise ValueError(
                    "its method computes directions from the weights, and these have other values than those that it "
                    "was trained on; load the base in the precision of the training, load the adapter, convert both"
                )
            _fill(model, held, {id(a) for a in adapters(model).values()} - undo.before, path)
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{path}' does not fit this {type(model).__name__}: {error}") from error
    return model


def _rename(key: str, old: str, new: str) -> str:
    head, marker, tail = key.rpartition("adapters.")
    return f"{head}{marker}{new}{tail[len(old) :]}" if marker and tail.startswith(old) else key


def _check_base(model: nn.Module, base: Mapping[str, str], held: Mapping[str, Tensor], path: Any, strict: bool) -> None:
    trained = {k.removeprefix("trained.") for k in held if k.startswith("trained.")}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.requires_grad_(n in trained)  # the file's trained tensors are not part of its base
    try:
        here = base_identity(model)
    finally:
        for n, p in model.named_parameters():
            p.requires_grad_(flags[n])
    if here["sha256"] != base["sha256"]:
        message = (
            f"'{path}' was trained on another base: {base['name']} ({base['sha256'][:12]}), "
            f"here {here['name']} ({here['sha256'][:12]})"
        )
        if strict:
            raise ValueError(f"{message}; load that base, or pass strict=False")
        warnings.warn(message, stacklevel=3)


def find_method(qualified: str) -> type[Adapter]:
    """The method of that name among the classes that are imported; a file never imports code.

    Raises:
        ValueError: no imported class has the name.
    """
    stack: list[type[Adapter]] = [Adapter]
    while stack:
        cls = stack.pop()
        if f"{cls.__module__}.{cls.__qualname__}" == qualified:
            return cls
        stack += cls.__subclasses__()
    raise ValueError(f"the method {qualified} is not known; import its module before loading")


def _fill(model: nn.Module, held: Mapping[str, Tensor], new: set[int], path: Any) -> None:
    state = model.state_dict()
    wanted = {
        f"{p}.{n}"
        for p, a in adapters(model).items() if id(a) in new for n in a.state_dict() if n not in a.training_state
    }  # fmt: skip
    source = {k.removeprefix("trained."): v for k, v in held.items()}
    problems = [f"the file lacks '{k}'" for k in sorted(wanted - set(source))]
    for key, tensor in source.items():
        if key not in state:
            problems.append(f"the model has no '{key}'")
        elif state[key].shape != tensor.shape:
            problems.append(f"'{key}' is {tuple(tensor.shape)} in the file, {tuple(state[key].shape)} in the model")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        if any(k.startswith("trained.") and k.removeprefix("trained.") not in state for k in held):
            more += (
                ". The file also holds what its task trained besides adapters, such as a head or new words: call "
                "`task.configure_model()` of such a task and load into `task.model`, or `visadapt predict --adapter`"
            )
        raise ValueError("; ".join(problems[:3]) + more)
    with torch.no_grad():
        for key, tensor in source.items():
            state[key].copy_(tensor)
    for name in held:
        if name.startswith("trained.") and name.removeprefix("trained.") in dict(model.named_parameters()):
            model.get_parameter(name.removeprefix("trained.")).requires_grad_(True)  # saved again with the adapters
