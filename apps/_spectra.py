"""How much an adapter changes each layer: the norm of ΔW and how many directions it uses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visadapt.interop.files import read_tensors
from visadapt.interop.keys import split

ROWS = 40  # layers that a picture names; of more it shows the shape only


@dataclass(frozen=True)
class Spectrum:
    """One layer of an adapter.

    Args:
        layer: Its name.
        norm: Frobenius norm of ΔW.
        effective: exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ / Σσ, with σ the singular values of ΔW: 1 where one direction holds
            everything, the rank where all are alike (Roy and Vetterli 2007, The effective rank).
        rank: Singular values that are not zero.
    """

    layer: str
    norm: float
    effective: float
    rank: int


def spectrum(layer: str, values: Tensor) -> Spectrum:
    """Norm and ranks from the singular values of ΔW."""
    values = values.double()
    largest = float(values.max()) if values.numel() else 0.0
    kept = values[values > largest * 1e-6] if largest > 0 else values[:0]
    share = kept / kept.sum() if len(kept) else kept
    effective = float(torch.exp(-(share * share.log()).sum())) if len(kept) else 0.0
    return Spectrum(layer, float(values.norm()), effective, len(kept))


def of_product(up: Tensor, down: Tensor) -> Tensor:
    """Singular values of up (out, r) · down (r, in), from two small factors: those of R_up R_downᵀ."""
    up, down = up.double().flatten(1), down.double().flatten(1)
    return torch.linalg.svdvals(torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T)


def spectra(path: Path) -> tuple[list[Spectrum], list[str]]:
    """The layers of an adapter, and the names of those whose ΔW its file alone does not tell.

    Of DoRA it is the low-rank part: the magnitudes act on weights that the file does not hold.

    Args:
        path: A safetensors file of any tool, or a PEFT folder (also with a folder for each part).
    """
    found: list[Spectrum] = []
    silent: list[str] = []
    for layer, values in _layers(path):
        if values is None:
            silent.append(layer)
        else:
            found.append(spectrum(layer, values))
    return found, silent


def _layers(path: Path) -> Iterator[tuple[str, Tensor | None]]:
    if path.is_dir():
        for config in sorted(path.rglob("adapter_config.json")):
            weights = config.parent / "adapter_model.safetensors"
            tensors = read_tensors(weights)[1] if weights.is_file() else {}
            part = "" if config.parent == path else f"{config.parent.name}."
            yield from ((part + name, values) for name, values in _foreign(tensors, json.loads(config.read_text())))
        for file in sorted(path.rglob("pytorch_lora_weights.safetensors")):
            yield from _foreign(read_tensors(file)[1], {})
        return
    metadata, tensors = read_tensors(path)
    if "visadapt" in metadata:
        yield from _own(json.loads(metadata["visadapt"]), tensors)
    else:
        yield from _foreign(tensors, {})


def _own(plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    """Adapters of visadapt: every method is asked for its ΔW where its tensors are low-rank factors."""
    hparams = {entry["name"]: entry["hparams"] for entry in plan["sets"]}
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, marker, rest = key.partition(".adapters.")
        if marker:
            name, _, leaf = rest.partition(".")
            groups.setdefault((layer, name), {})[leaf] = tensor
    for (layer, name), held in groups.items():
        told = layer if len(hparams) == 1 else f"{layer} ({name})"
        if not {"up", "down"} <= set(held):
            yield told, None
            continue
        given = hparams.get(name.partition("_")[0], {})
        rank = len(held["down"])
        scale = float(given.get("alpha") or rank) / (rank**0.5 if given.get("rslora") else rank)
        yield told, of_product(held["up"], held["down"]) * scale


def _foreign(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor | None]]:
    """Files of other tools, layer by layer."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if found := split(key):
            groups.setdefault(found[0], {})[found[1]] = tensor
    for layer, roles in groups.items():
        yield layer, _values(roles, config.get("lora_alpha", config.get("alpha")), bool(config.get("use_rslora")))


def _values(roles: Mapping[str, Tensor], alpha: float | None, rslora: bool) -> Tensor | None:
    """Singular values of s · B A, of (B₁A₁) ∘ (B₂A₂) and of L ⊗ R; None where the file does not tell."""
    given = roles.get("alpha")
    alpha = float(given) if given is not None else alpha

    def scale(rank: int) -> float:
        return 1.0 if alpha is None else float(alpha) / (rank**0.5 if rslora else rank)

    if {"up", "down"} <= set(roles) and "mid" not in roles:
        return of_product(roles["up"], roles["down"]) * scale(len(roles["down"]))
    if "mid" in roles:
        mid, down = roles["mid"].double(), roles["down"].double().flatten(1)
        return of_product(roles["up"], torch.einsum("pq...,qi->pi...", mid, down)) * scale(len(down))
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= set(roles):
        a, b, c, d = (roles[f"hada_w{i}_{side}"].double() for i in (1, 2) for side in "ab")
        up = torch.einsum("or,os->ors", a, c).flatten(1)  # (B₁A₁) ∘ (B₂A₂) is a product of rank r²
        return of_product(up, torch.einsum("ri,si->rsi", b, d).flatten(0, 1)) * scale(len(b))
    if any(role.startswith("lokr_w") for role in roles) and "lokr_t2" not in roles:
        left, right = (_factor(roles, f"lokr_{side}") for side in ("w1", "w2"))
        whole = "lokr_w1" in roles and "lokr_w2" in roles
        rank = len(roles.get("lokr_w2_b", roles.get("lokr_w1_b", left)))
        values = torch.outer(torch.linalg.svdvals(left), torch.linalg.svdvals(right)).flatten()
        return values * (1.0 if whole else scale(rank))
    return None


def _factor(roles: Mapping[str, Tensor], name: str) -> Tensor:
    if name in roles:
        return roles[name].double().flatten(1)
    return roles[f"{name}_a"].double() @ roles[f"{name}_b"].double().flatten(1)


def picture(found: list[Spectrum]) -> Any:
    """Norms and effective ranks of the layers, one row each, as a figure of matplotlib."""
    from visadapt.report.plots import figure

    named = len(found) <= ROWS
    fig = figure(9, 2 + (0.19 * len(found) if named else 4))
    left, right = fig.subplots(1, 2, sharey=True)
    rows = list(range(len(found)))
    left.barh(rows, [s.norm for s in found], color="#0072B2", height=0.8 if named else 1)
    left.set_xlabel("norm of ΔW")
    right.barh(rows, [s.rank for s in found], color="#dddddd", height=0.8 if named else 1, label="rank")
    right.barh(rows, [s.effective for s in found], color="#E69F00", height=0.8 if named else 1, label="effective rank")
    right.set_xlabel("rank and effective rank")
    fig.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    left.invert_yaxis()
    left.set_ylabel("" if named else "layer, in the order of the file")
    left.set_yticks(rows if named else [], [s.layer for s in found] if named else [], fontsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return fig
