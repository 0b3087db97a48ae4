"""PEFT's rules: what `adapter_config.json` must hold, and which layers its names and patterns mean."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

PREFIX = "base_model.model."
# Starts that leave the base as it is; pissa, olora, corda, loftq and lora_ga subtract theirs from its weights.
HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def read_config(file: Path, kinds: Mapping[str, str]) -> dict[str, Any]:
    """The configuration of a PEFT folder; `kinds` maps the methods that are read to their key for alpha.

    Raises:
        ValueError: no JSON object, another method, a value of another kind, or a start that changes the base.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"'{file}' is damaged: it holds no JSON object")
    kind = str(config.get("peft_type"))
    if kind not in kinds:
        known = ", ".join(k for k in kinds if k != "LORA")
        raise ValueError(f"'{file.parent}' holds PEFT's {kind}; LORA (with or without use_dora), {known} can be read")
    for key in (kinds[kind], *(() if kind == "LORA" else ("r",))):
        if not _is_number(config.get(key)):
            raise ValueError(f"'{file}': '{key}' is {json.dumps(config.get(key))}, not a number")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(file, key, config.get(key))
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(one, str) for one in saved):
        raise ValueError(f"'{file}': 'modules_to_save' is no list of names")
    start = config.get("init_lora_weights")
    if kind == "LORA" and start not in HARMLESS:
        raise ValueError(
            f"'{file}': init_lora_weights={json.dumps(start)} changed the base that it was trained on, and the folder "
            "does not hold that base; save it again with PEFT's `path_initial_model_for_weight_conversion`"
        )
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_patterns(file: Path, key: str, patterns: object) -> None:
    if not isinstance(patterns, dict | None) or not all(_is_number(v) for v in (patterns or {}).values()):
        raise ValueError(f"'{file}': '{key}' does not map patterns to numbers")
    for pattern in patterns or {}:
        try:
            re.compile(f"({pattern})$")
        except re.error as error:
            raise ValueError(f"'{file}': '{pattern}' in '{key}' is no regular expression: {error}") from error


def from_pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of PEFT's `rank_pattern` or `alpha_pattern` for a layer: the first pattern that ends its name."""
    return next((value for pattern, value in (patterns or {}).items() if _means(pattern, name)), default)


def _means(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def pattern_keys(values: Mapping[str, int]) -> dict[str, int]:
    """Values of layers under keys that PEFT finds for that layer alone: `^fc1` where there is a `b.fc1` too."""
    return {
        f"^{re.escape(name)}" if any(other != name and _means(name, other) for other in values) else name: value
        for name, value in values.items()
    }


def target_modules(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """The layers as PEFT's `target_modules`: names, or one regular expression where a name ends others that stay."""
    wanted = sorted(names)
    others = {name for name, _ in model.named_modules()} - set(wanted)
    if any(other.endswith(f".{name}") for name in wanted for other in others):
        return "|".join(re.escape(name) for name in wanted)
    return wanted


def saved_tensors(config: Mapping[str, Any], held: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What the file holds of `modules_to_save`.

    Raises:
        ValueError: a module or tensor that the model does not have, or has in another shape.
    """
    state = model.state_dict()
    found: dict[str, Tensor] = {}
    for module in config.get("modules_to_save") or []:
        mine = {k: v for k, v in held.items() if f".{module}." in f".{k}"}
        if not mine and not any(f".{name}".endswith(f".{module}") for name, _ in model.named_modules()):
            raise ValueError(f"'{module}' in modules_to_save is no module of this {type(model).__name__}")
        for key, tensor in mine.items():
            if key not in state:
                raise ValueError(f"this {type(model).__name__} has no '{key}', which modules_to_save names")
            same_shape(key, tensor, state[key])
        found |= mine
    return found


def same_shape(key: str, given: Tensor, wanted: Tensor) -> None:
    """Refuse a tensor of another shape than the model's.

    Raises:
        ValueError: the shapes differ.
    """
    if given.shape != wanted.shape:
        raise ValueError(f"'{key}' is {tuple(given.shape)} in the file, {tuple(wanted.shape)} in the model")


def check_all_read(held: Iterable[str], read: Iterable[str]) -> None:
    """Refuse a file of which something was not read.

    Raises:
        ValueError: names the first of what is left.
    """
    if left := sorted(set(held) - set(read)):
        more = f" and {len(left) - 1} more tensors have" if len(left) > 1 else " has"
        raise ValueError(
            f"'{left[0]}'{more} no counterpart here, {len(left)} in all (trained biases, embeddings and tokens are "
            "not read); merge the adapter with PEFT's `merge_and_unload` and start from that model"
        )
