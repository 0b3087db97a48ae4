"""The verbs on a whole model. They never mention a method by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from visadapt.core import fast_path
from visadapt.core.adapter import Adapter
from visadapt.core.depth import depths
from visadapt.core.layer import Grafted, fold, graft, prune, refuse_graft
from visadapt.core.site import Site, stored
from visadapt.core.summary import Row, Summary
from visadapt.core.target import Target, Targets, resolve

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Adaptation:
    """One set of adapters in a config.

    Args:
        method: the method and its hyper-parameters.
        targets: a preset, a pattern, a list of patterns, or a mapping from patterns to the
            hyper-parameters that they override.
        name: name of the set.
        exclude: patterns of layers to leave alone.
        lean: recompute the inputs of adapted layers in backward where their producer allows it.
    """

    method: Adapter
    targets: str | list[str] | dict[str, dict[str, Any]] = "attention"
    name: str = "default"
    exclude: list[str] = field(default_factory=list)
    lean: bool = False

    def apply(self, model: Model) -> Model:
        """`adapt` with these settings."""
        return adapt(model, self.method, self.targets, self.name, exclude=self.exclude, lean=self.lean)


def adapt(
    model: Model, method: Adapter, targets: Targets, name: str = "default", *, freeze: bool = True,
    exclude: Sequence[str] | str = (), lean: bool = False, dry_run: bool = False,
) -> Model:  # fmt: skip
    """Graft one adapter of `method` on every site that `targets` mean; all or none.

    Args:
        model: any module; it is changed in place and returned.
        method: prototype, for instance `LoRA(rank=8)`.
        targets: see `visadapt.core.target`.
        name: name of the set; several sets live side by side.
        freeze: stop training every parameter that is not an adapter's. A frozen BatchNorm still moves its statistics
            in `train()`: keep it in `eval()`, as the tasks do.
        exclude: patterns to leave out.
        lean: recompute the layers' inputs in backward instead of keeping them.
        dry_run: print layer, set, method and parameters, and leave the model as it is.

    Raises:
        ValueError: a pattern matches nothing, a layer refuses the method, or the set has the site already.
        TypeError: an override names an unknown hyper-parameter.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"set name {name!r}: use letters, digits and '-' only, and no name that modules have themselves"
        )
    if not isinstance(method, Adapter):
        raise TypeError(f"method: {method!r} is no adapter; give one such as va.LoRA(rank=8)")
    check_unmerged(model)
    sites = [(t, _key(name, t)) for t in resolve(model, targets, exclude)]
    pool: dict[str, Tensor] = {}
    deep = depths([t.name for t, _ in sites])
    made = [(t, key, _make(method, t, key, name, pool, depth)) for (t, key), depth in zip(sites, deep)]
    if dry_run:
        print(Summary([_row(t.label, a) for t, _, a in made], sum(p.numel() for p in model.parameters())))
        return model
    if freeze:
        for path, parameter in model.named_parameters():
            if not is_adapter_key(path):
                parameter.requires_grad_(False)
    for target, key, adapter in made:
        graft(target.module, key, adapter)
        if lean and not adapter.view:
            target.module.lean = True  # type: ignore[assignment]
    fast_path.leave(model)
    return model


def _key(name: str, target: Target) -> str:
    return "_".join(
        [name, *([target.param] if target.view else []), *([target.part.replace("/", "of")] if target.part else [])]
    )


def _make(method: Adapter, target: Target, key: str, name: str, pool: dict[str, Tensor], depth: float) -> Adapter:
    if target.param not in target.module._parameters and target.param not in target.module._buffers:
        raise ValueError(
            f"{type(method).__name__} on '{target.label}': its {target.param} is computed from other tensors; call "
            "torch.nn.utils.parametrize.remove_parametrizations (or prune.remove, remove_weight_norm) on it first"
        )
    adapter = method.clone(**target.overrides)
    adapter.depth = depth
    adapter.name, adapter.param, adapter.rows, adapter.view = name, target.param, target.rows, target.view
    site = Site(target.module, target.param, target.rows)
    reason = adapter.refuse(site) or refuse_graft(target.module, adapter)
    if reason is None and isinstance(target.module, Grafted) and key in target.module.adapters:
        reason = f"the set '{name}' adapts it already; remove that set or give this one another name"
    if reason is not None:
        raise ValueError(f"{type(method).__name__} on '{target.label}': {reason}")
    _build(adapter, site, pool)
    return adapter.train(target.module.training)


def _build(adapter: Adapter, site: Site, pool: dict[str, Tensor]) -> None:
    """`build`, with the tensors that the adapters of a set share."""
    adapter._pool = pool
    try:
        adapter.build(site)
    finally:
        del adapter._pool


def is_adapter_key(path: str) -> bool:
    """Whether a parameter or buffer name belongs to an adapter."""
    return ".adapters." in f".{path}"


def grafted(model: nn.Module) -> Iterator[tuple[str, Grafted]]:
    """Names and modules that carry adapters."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Grafted))


def adapters(model: nn.Module, name: str | None = None) -> dict[str, Adapter]:
    """Path -> adapter, in model order, of one set or of all.

    Raises:
        ValueError: there is no set of that name.
    """
    found: dict[str, Any] = {
        f"{path}.adapters.{key}".lstrip("."): a
        for path, layer in grafted(model) for key, a in layer.adapters.items() if name in (None, a.name)
    }  # fmt: skip
    if name is not None and not found:
        raise ValueError(f"no set named '{name}'; the model has {_set_names(model)}")
    return found


def _set_names(model: nn.Module) -> str:
    return ", ".join(sorted({f"'{a.name}'" for a in adapters(model).values()})) or "no adapters"


class strength:
    """Set how far the sets act: 0 leaves the base, 1 is the method. As a context, restores on exit.

        va.strength(model, 0.5)                    # every set
        with va.strength(model, style=0.7): ...    # one set, here only

    Raises:
        ValueError: there is no set of that name.
    """  # fmt: skip

    def __init__(self, model: nn.Module, default: float | None = None, /, **sets: float) -> None:
        for name in sets:
            adapters(model, name)
        self._before = [(a, a.strength) for a in adapters(model).values()]
        for adapter, _ in self._before:
            value = sets.get(adapter.name, default)
            if value is not None:
                adapter.strength = float(value)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *args: object) -> None:
        for adapter, before in self._before:
            adapter.strength = before


def merge(model: Model) -> Model:
    """Write every adapter into the weights, for good: original classes and keys, no adapters.

    All adapted layers are checked first, so a refusal leaves the model as it was.

    Raises:
        ValueError: a method has no weight that equals it, or a tied weight would change elsewhere.
    """
    layers = list(grafted(model))
    _check_merge(model, layers)
    with torch.no_grad():
        for _, layer in layers:
            for param in dict.fromkeys(a.param for a in layer.adapters.values()):  # type: ignore[union-attr]
                weight, bias = fold(layer, param)  # type: ignore[arg-type]
                stored(layer, param).copy_(weight)  # type: ignore[arg-type]
                if bias is not None:
                    _set_bias(layer, bias)
            prune(layer, list(layer.adapters))
    return model


def _set_bias(layer: nn.Module, bias: Tensor) -> None:
    old = layer._parameters.get("bias")
    if old is None:
        layer.bias = nn.Parameter(bias, requires_grad=stored(layer, "weight").requires_grad)
    else:
        old.copy_(bias)


def _check_merge(model: nn.Module, layers: list[tuple[str, Grafted]]) -> None:
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    for path, layer in layers:
        for adapter in layer.adapters.values():
            reason = adapter.refuse_merge(Site(layer, adapter.param, adapter.rows))  # type: ignore[operator, arg-type]
            shared = owners.get(id(stored(layer, str(adapter.param))), [])
            if len(shared) > 1:
                reason = f"its weight is tied ({', '.join(shared)}); merging would change both, so keep the adapter"
            if reason is not None:
                raise ValueError(f"cannot merge '{path}': {reason}")


@contextmanager
def merged(model: Model) -> Iterator[Model]:
    """The merged model for the length of a `with`; afterwards every tensor is back, bit for bit.

    Raises:
        ValueError: as `merge`.
    """
    layers = list(grafted(model))
    _check_merge(model, layers)
    backup = []
    for _, layer in layers:
        names = sorted({*(str(a.param) for a in layer.adapters.values()), "bias"})
        stores: list[dict[str, Any]] = [layer._parameters, layer._buffers]
        found = [(n, where) for where in stores for n in names if n in where]
        tensors = [(n, where, None if where[n] is None else where[n].detach().clone()) for n, where in found]
        backup.append((layer, type(layer), layer.adapters, layer.__dict__.get("lean"), tensors))
    merge(model)
    model.__dict__["_merged"] = True
    try:
        yield model
    finally:
        del model.__dict__["_merged"]
        for layer, cls, held, lean, tensors in backup:
            layer.__class__ = cls
            layer.adapters = held
            if lean is not None:
                layer.lean = lean  # type: ignore[assignment]
            with torch.no_grad():
                for name, where, tensor in tensors:
                    if tensor is None:
                        where[name] = None
                    else:
                        where[name].copy_(tensor)


def check_unmerged(model: nn.Module) -> None:
    """Adapters are out of a model within `merged`: what is done to them there would be lost.

    Raises:
        ValueError: the model is merged for the length of a `with`.
    """
    if any("_merged" in module.__dict__ for module in model.modules()):
        raise ValueError(
            "the model is merged (`with va.merged(model)`), its adapters are out of it; leave the block first"
        )


def remove(model: Model, name: str | None = None) -> Model:
    """Take off one set or all; the base is bit-equal to what it was.

    Raises:
        ValueError: there is no set of that name.
    """
    adapters(model, name)
    for _, layer in list(grafted(model)):
        prune(layer, [key for key, a in layer.adapters.items() if name in (None, a.name)])
    return model


def rebuild(model: Model, name: str | None = None) -> Model:
    """Start the adapters again from the present base weights (after a base was loaded behind them)."""
    pools: dict[str, dict[str, Tensor]] = {}
    for path, adapter in adapters(model, name).items():
        layer = model.get_submodule(path.split(".adapters.")[0] if not path.startswith("adapters.") else "")
        for store in (adapter._parameters, adapter._buffers, adapter._modules):
            store.clear()
        _build(adapter, Site(layer, adapter.param, adapter.rows), pools.setdefault(adapter.name, {}))
    return model


def summary(model: nn.Module) -> Summary:
    """A table of layers, sets, methods and parameters; `.trainable` and `.total` are counts."""
    return Summary(
        [_row(label(path, adapter), adapter) for path, adapter in adapters(model).items()],
        sum(p.numel() for n, p in model.named_parameters() if not is_adapter_key(n)),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def label(path: str, adapter: Adapter) -> str:
    """The target pattern that finds the site of an adapter again (`attn.qkv:q`)."""
    layer, _, key = path.rpartition("adapters.")
    part, layer = key[len(adapter.name) + 1 :], layer.rstrip(".")
    if adapter.view:
        part, layer = part[len(adapter.param) + 1 :], f"{layer}.{adapter.param}".lstrip(".")
    return f"{layer}:{part.replace('of', '/')}" if part else layer


def _row(label: str, adapter: Adapter) -> Row:
    return Row(label, adapter.name, type(adapter).__name__, sum(p.numel() for p in adapter.parameters()))


def overrides_of(base: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The hyper-parameters of an adapter that differ from `base`."""
    return {k: v for k, v in adapter.hparams().items() if base.get(k) != v}
