"""Adapters into one: `visadapt.compose`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from visadapt.core.adapter import Adapter, LowRank
from visadapt.core.compose import concatenated, interpolated, scaled, truncated, update_of
from visadapt.core.export import Factors
from visadapt.core.layer import prune
from visadapt.core.model import adapt, adapters, grafted, label, remove, strength
from visadapt.core.site import Site
from visadapt.core.state import read
from visadapt.core.target import exact, resolve
from visadapt.core.zip import Merger, Zip, merged, zip_columns, zip_outputs
from visadapt.interop import load
from visadapt.methods import B4M, LoRA

How = Literal["concat", "svd", "linear", "zip", "make"]
Held = dict[str, list[tuple[Adapter, Site]]]  # target label -> its adapters in one source


def compose(
    model: nn.Module, sources: Sequence[str | Path], weights: Sequence[float] | None = None, how: How = "concat", *,
    rank: int | None = None, name: str = "default", zipping: Zip | None = None,
) -> dict[str, float]:  # fmt: skip
    """Put the weighted updates of several adapters on a model, as one set.

    Layers that only one source adapts keep its update. What `how` makes of shared ones, with ΔW = Σ w_i ΔW_i:
        concat: exactly ΔW, as a LoRA whose rank is the sum of the ranks.
        svd: the LoRA of rank `rank` nearest to ΔW.
        linear: factors interpolated as PEFT does; keeps the rank, adds products between the adapters.
        zip: ZipLoRA (Shah et al. 2023, arXiv 2311.13600): columns scaled so that the adapters keep apart.
        make: Break-for-Make's second stage: a `B4M` from a content run and a style run, in this order.

    Args:
        model: the base, with or without sets of its own.
        sources: names of sets on the model, which the new set replaces, or files of any format that `load` reads.
        weights: one per source, also negative; None means 1 each.
        how: see above.
        rank: of "svd"; None means the largest rank of a source in each layer.
        name: name of the new set.
        zipping: how "zip" learns; None is `Zip()`, without data.

    Returns:
        Target → ‖ΔW_new − ΔW‖ / ‖ΔW‖: 0 for concat, what an SVD leaves out, how far linear and zip move
        away from the sum.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: sources that do not go together, or a method that has no update to add; the model is
            then as it was.
    """
    weights = [1.0] * len(sources) if weights is None else list(weights)
    _check(sources, weights, how, rank)
    held = [_take(model, source) for source in sources]
    if how == "make":
        return _make(model, sources, held, name)
    _check_thin(held, how, rank)
    shares: dict[str, list[tuple[int, Factors]]] = {}  # target -> numbers of its sources and their updates
    for i, source in enumerate(held):
        for target, found in source.items():
            shares.setdefault(target, []).append((i, concatenated([update_of(*one) for one in found])))
    zipping = zipping or Zip()
    if how == "zip" and zipping.predict is not None:
        made = _zip_on_outputs(model, sources, weights, shares, zipping)
    else:
        made = {t: _one([(u, weights[i]) for i, u in share], how, rank, zipping) for t, share in shares.items()}
    _replace(model, sources, name, LoRA(), {t: {"rank": len(f.down)} for t, f in made.items()})
    for path, adapter in adapters(model, name).items():
        with torch.no_grad():
            adapter.get_parameter("down").copy_(made[label(path, adapter)].down)
            adapter.get_parameter("up").copy_(made[label(path, adapter)].up)
    return {target: found.error for target, found in made.items()}


def _one(share: list[tuple[Factors, float]], how: How, rank: int | None, zipping: Zip) -> Factors:
    """The composition of one layer."""
    weighted = [scaled(update, weight) for update, weight in share]
    if how == "svd":
        return truncated(concatenated(weighted), rank or max(len(u.down) for u in weighted))
    if how == "concat" or len(share) == 1:
        return concatenated(weighted)
    if how == "linear":
        return interpolated([u for u, _ in share], [w for _, w in share])
    return zip_columns(weighted, zipping)


def _check(sources: Sequence[str | Path], weights: Sequence[float], how: str, rank: int | None) -> None:
    if how not in ("concat", "svd", "linear", "zip", "make"):
        raise ValueError(f"how={how!r}: there is 'concat', 'svd', 'linear', 'zip' and 'make'")
    if len(sources) < 2 or len(set(map(str, sources))) < len(sources):
        raise ValueError(
            f"sources: two or more different sets or files are composed, here are {list(map(str, sources))}"
        )
    if len(weights) != len(sources):
        raise ValueError(f"weights: {len(weights)} for {len(sources)} sources; give one each")
    if rank is not None and (how != "svd" or rank < 1):
        raise ValueError("rank: at least 1, and for how='svd' alone; the other ways have ranks of their own")
    if how == "make" and (len(sources) != 2 or any(w != 1 for w in weights)):
        raise ValueError("how='make' takes a content and a style run, in this order and without weights")
    for source in sources:
        extra = _trained(Path(source))
        if extra:
            raise ValueError(f"'{source}' also holds trained tensors ({', '.join(extra[:3])}), which cannot be added; "
                             "only adapters are composed")  # fmt: skip


def _trained(path: Path) -> list[str]:
    """What a file holds beside adapters (a head)."""
    if (path / "adapter_config.json").is_file():
        return list(json.loads((path / "adapter_config.json").read_text()).get("modules_to_save") or [])
    try:
        _, tensors = read(path)
    except (ValueError, FileNotFoundError):
        return []  # a set of the model, or a file of another tool
    return sorted(k.removeprefix("trained.") for k in tensors if k.startswith("trained."))


def _take(model: nn.Module, source: str | Path) -> Held:
    """The adapters of a source; those of a file are taken off again."""
    before = {id(a): a.name for a in adapters(model).values()}
    if str(source) in before.values():
        new = adapters(model, str(source))
    else:
        load(model, source, name="composing" if before else None)  # a file of several sets needs its own names
        new = {path: a for path, a in adapters(model).items() if id(a) not in before}
    held: Held = {}
    for path, adapter in new.items():
        layer = model.get_submodule(path.rpartition("adapters.")[0].rstrip("."))
        held.setdefault(label(path, adapter), []).append((adapter, Site(layer, adapter.param, adapter.rows)))
    if str(source) not in before.values():
        for _, grafted_layer in list(grafted(model)):
            prune(grafted_layer, [k for k, a in grafted_layer.adapters.items() if id(a) not in before])
    return held


def _check_thin(held: Sequence[Held], how: How, rank: int | None) -> None:
    for source in held:
        for target, found in source.items():
            for adapter, _ in found:
                if not isinstance(adapter, LowRank) and not (how == "svd" and rank):
                    raise ValueError(f"'{target}': {type(adapter).__name__} is no low-rank update; "
                                     "give how='svd' and a rank (--how svd --rank N), an approximation")  # fmt: skip


def _replace(
    model: nn.Module, sources: Sequence[str | Path], name: str, method: Adapter, targets: dict[str, dict[str, Any]]
) -> None:
    """Put a new set on the model, on the sites of these labels, in the place of the sets among the sources."""
    present = {a.name for a in adapters(model).values()}
    gone = {str(s) for s in sources} & present
    if name in present - gone:
        raise ValueError(f"name: the model has a set '{name}' already; give the new one another name")
    sites = {exact(target): overrides for target, overrides in targets.items()}
    resolve(model, sites)  # raises where rows overlap, before anything is taken off
    for source in gone:
        remove(model, source)
    adapt(model, method, sites, name)


def _make(model: nn.Module, sources: Sequence[str | Path], held: Sequence[Held], name: str) -> dict[str, float]:
    """Break-for-Make's second stage, exact by construction."""
    content, style = held
    pairs: dict[str, tuple[B4M, B4M]] = {}
    for target in dict.fromkeys([*content, *style]):
        both = [*content.get(target, ()), *style.get(target, ())]
        kinds = [a for a, _ in both if isinstance(a, B4M)]
        if len(kinds) != 2 or len(both) != 2:
            raise ValueError(f"'{target}': how='make' needs one B4M of each run there; adapt the same layers in both")
        pairs[target] = kinds[0], kinds[1]
        kinds[0].check_shared(kinds[1])
    _replace(model, sources, name, B4M(), {t: {**s.hparams(), "learns": "both"} for t, (_, s) in pairs.items()})
    for path, adapter in adapters(model, name).items():
        assert isinstance(adapter, B4M)
        adapter.make(*pairs[label(path, adapter)])
    return dict.fromkeys(pairs, 0.0)


def _zip_on_outputs(
    model: nn.Module, sources: Sequence[str | Path], weights: Sequence[float],
    shares: dict[str, list[tuple[int, Factors]]], zipping: Zip,
) -> dict[str, Factors]:  # fmt: skip
    """ZipLoRA by the model's outputs: the updates alone are the teachers, mergers the student."""
    sets = {a.name for a in adapters(model).values()} & {str(s) for s in sources}
    names = [f"zip-{i}" for i in range(len(sources))]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    parts = {t: [(i, scaled(u, weights[i])) for i, u in share] for t, share in shares.items()}
    try:
        for i, name in enumerate(names):
            ranks = {
                exact(t): {"ranks": [len(u.down) for j, u in s if i == j]} for t, s in parts.items() if i in dict(s)
            }
            adapt(model, Merger(), ranks, name)
        ranks = {exact(t): {"ranks": [len(u.down) for _, u in s]} for t, s in parts.items()}
        adapt(model, Merger(), ranks, "zip-merged")
        for i, name in enumerate([*names, "zip-merged"]):
            for path, adapter in adapters(model, name).items():
                assert isinstance(adapter, Merger)
                adapter.fill([u for j, u in parts[label(path, adapter)] if i == j or i == len(names)])
        with strength(model, None, **dict.fromkeys(sets, 0.0)):
            zip_outputs(model, names, "zip-merged", zipping)
        students = {label(p, a): a.get_parameter("merge").detach() for p, a in adapters(model, "zip-merged").items()}
    finally:
        for _, layer in list(grafted(model)):
            prune(layer, [k for k, a in layer.adapters.items() if a.name in (*names, "zip-merged")])
        for n, p in model.named_parameters():
            p.requires_grad_(flags.get(n, p.requires_grad))
    return {t: merged([u for _, u in share], students[t]) for t, share in parts.items()}
