"""Every weight-space change of a layer as one pair of LoRA factors, exact or truncated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visadapt.core import ops
from visadapt.core.adapter import LowRank
from visadapt.core.layer import Grafted, fold
from visadapt.core.model import grafted
from visadapt.core.site import stored


@dataclass(frozen=True)
class Factors:
    """W' − W = up · down on all rows of one layer.

    Attributes:
        down: (r, fan_in, *kernel).
        up: (out, r).
        error: ‖up · down − ΔW‖ / ‖ΔW‖, 0.0 where the factors are the method's own.
    """

    down: Tensor
    up: Tensor
    error: float


def acting(model: nn.Module) -> dict[str, Grafted]:
    """Layer name -> layer, of the adapted ones that some set acts on: sets at strength 0 change nothing."""
    return {name: layer for name, layer in grafted(model) if layer._views or layer.active("weight")}


def lora_factors(model: nn.Module, rank: int | None = None) -> dict[str, Factors]:
    """Layer name -> factors of everything that its adapters do to its weight.

    Args:
        model: the adapted model.
        rank: rank of the truncated SVD for methods that state no factors; None refuses them.

    Raises:
        ValueError: a layer's change is no single weight update, is on a grouped or transposed
            convolution or a weight view, or needs an SVD and `rank` is None.
    """
    found = {name: layer_factors(name, layer, rank) for name, layer in acting(model).items()}
    if not found:
        raise ValueError("nothing to export: the model has no adapters, or all are at strength 0")
    return found


def layer_factors(name: str, layer: Grafted, rank: int | None = None) -> Factors:
    """The factors of one layer, as `lora_factors` gives them for all.

    Raises:
        ValueError: as `lora_factors`.
    """
    if layer._views:
        raise ValueError(f"'{name}' is adapted where its parameter is read; LoRA files cannot say that, merge instead")
    if getattr(layer, "groups", 1) > 1 or getattr(layer, "transposed", False):
        raise ValueError(
            f"'{name}' is a grouped or transposed convolution, which LoRA files do not cover; merge instead"
        )
    return _exact(layer) or _truncated(name, layer, rank)


def _exact(layer: Grafted) -> Factors | None:
    downs, ups = [], []
    width = ops.shape_of(layer)[0]
    for adapter in layer.active("weight"):
        if not isinstance(adapter, LowRank):
            return None
        down, up = (t.detach() for t in adapter.factors())
        full = up.new_zeros(width, up.shape[1])
        full[slice(None) if adapter.rows is None else slice(*adapter.rows)] = up * adapter.strength
        downs.append(down)
        ups.append(full)
    return Factors(torch.cat(downs), torch.cat(ups, 1), 0.0) if downs else None


def _truncated(name: str, layer: Grafted, rank: int | None) -> Factors:
    methods = ", ".join(sorted({type(a).__name__ for a in layer.active("weight")}))
    if rank is None:
        raise ValueError(
            f"'{name}' is changed by {methods}, which is no low-rank update; give `rank` (--rank) to approximate it by "
            "an SVD, whose error is reported, or merge"
        )
    weight, bias = fold(layer, "weight")
    before = layer._parameters.get("bias")
    if bias is not None and (before is None or not torch.equal(bias, before)):
        raise ValueError(f"'{name}' is changed by {methods}, which also changes the bias; merge instead")
    change = (weight - stored(layer, "weight").detach()).float()
    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
    error = (s[rank:].norm() / s.norm().clamp_min(1e-30)).item()
    return Factors(vh[:rank].reshape(-1, *change.shape[1:]), u[:, :rank] * s[:rank], error)
