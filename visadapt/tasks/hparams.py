"""Constructor arguments as plain data, so that checkpoints load with ``weights_only=True``."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

UNKNOWN = object()


def plain(value: Any) -> Any:
    """``value`` as str, int, float, bool, None, list and dict, in the form that YAML configs use.

    Objects that state their own arguments (adapters, dataclasses, ``functools.partial``, classes) become
    ``{"class_path", "init_args"}``. Returns ``UNKNOWN`` for anything else; inside a container, it is left
    out.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return _known({str(k): plain(v) for k, v in value.items()})
    if isinstance(value, list | tuple | set | frozenset):
        return [v for v in map(plain, value) if v is not UNKNOWN]
    if isinstance(value, type):
        return {"class_path": _path(value)}
    if isinstance(value, functools.partial) and isinstance(value.func, type) and not value.args:
        return {"class_path": _path(value.func), "init_args": plain(value.keywords)}
    if hasattr(value, "hparams") and callable(value.hparams):
        return {"class_path": _path(type(value)), "init_args": plain(value.hparams())}
    if dataclasses.is_dataclass(value):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"class_path": _path(type(value)), "init_args": _known(fields)}
    return UNKNOWN


def _known(items: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in items.items() if v is not UNKNOWN}


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
