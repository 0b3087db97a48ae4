"""Grafting: a layer's class is swapped for `Adapted<Class>`, and adapters become its children.

No wrapper, no moved parameter, no renamed key: `isinstance`, references, `state_dict` names and
code that reads `layer.weight` stay as they were, and pruning gives back the original object.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.core import ops
from visadapt.core.adapter import Adapter, FeatureMap, LowRank, WeightMap
from visadapt.core.chain_op import Chain, can_chain, chain_update
from visadapt.core.linear_op import Part, update
from visadapt.core.site import MatrixSite, Site, stored


class Grafted(nn.Module):
    """What every grafted module has: its adapters, and pickling of its made-up class."""

    _base: type[nn.Module]
    _views: tuple[str, ...] = ()
    adapters: nn.ModuleDict

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._base, self._views), self.__dict__

    def active(self, param: str) -> list[Adapter]:
        """Adapters of one parameter that are switched on, in the order in which they act."""
        found: list[Any] = [a for a in self.adapters.values() if a.param == param and a.strength != 0]
        return sorted(found, key=_acts_on_output)


class AdaptedLayer(Grafted):
    """Mixin in front of a Linear or convolution: its forward with adapters.

    Weight-space adapters act first, then output-space adapters, each in the order in which they
    were added; `fold` follows the same order.
    """

    lean: bool = False

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted output; `output_size` of transposed convolutions is passed on."""
        size = args[0] if args else kwargs.get("output_size")
        todo = self.active("weight")
        parts, todo = self._take_parts(todo)
        if parts:
            y = update(self, input, self.weight, self.bias, parts, size, self.lean)  # type: ignore[arg-type]
        elif (chain := self._take_chain(todo)) is not None:
            y = chain_update(self, input, self.weight, self.bias, chain, todo[0].rows, size)  # type: ignore[arg-type]
            todo = todo[1:]
        elif (whole := self._take_whole(todo, input)) is not None:
            y, todo = whole, todo[1:]
        elif (turned := self._take_turned(todo, input)) is not None:
            y, todo = super().forward(turned, *args, **kwargs), todo[1:]
        elif todo and not _acts_on_output(todo[0]):
            maps = [a for a in todo if not _acts_on_output(a)]
            todo = todo[len(maps) :]
            weight = _fold_weight(maps, ops.canonical(self, stored(self, "weight")))
            y = ops.apply(self, input, ops.native(self, weight), self.bias, size)  # type: ignore[arg-type]
        else:
            y = super().forward(input, *args, **kwargs)
        for adapter in todo:
            y = _output(self, adapter, input, y, size)
        return y

    def _take_chain(self, todo: list[Adapter]) -> Chain | None:
        # Three factors of the adapter at the front, on a layer that computes a convolution and nothing else.
        if not todo or not isinstance(todo[0], LowRank) or not ops.is_plain(self) or not can_chain(self):
            return None
        chain, strength = todo[0].chain(), todo[0].strength
        return chain if chain is None or strength == 1 else (*chain[:2], chain[2] * strength)

    def _take_whole(self, todo: list[Adapter], x: Tensor) -> Tensor | None:
        # The Linear and the adapter at the front of all its rows, where that has one operation for both.
        if not todo or not isinstance(todo[0], LowRank) or todo[0].rows is not None or not isinstance(self, nn.Linear):
            return None
        frozen = ops.is_plain(self) and not self.weight.requires_grad
        return todo[0].onto(x, self.weight, self.bias) if frozen else None

    def _take_turned(self, todo: list[Adapter], x: Tensor) -> Tensor | None:
        # The input that the adapter at the front makes of x, if no other replaces the weight.
        if not todo or not isinstance(todo[0], WeightMap) or todo[0].rows is not None or todo[0].strength != 1:
            return None
        alone = all(_acts_on_output(a) for a in todo[1:])
        return todo[0].turn(x, _site(self, todo[0])) if alone else None

    def _take_parts(self, todo: list[Adapter]) -> tuple[list[Part], list[Adapter]]:
        # The adapters at the front that the fused operation can do, and the others.
        if not todo or getattr(self, "groups", 1) > 1 or not ops.is_plain(self):
            return [], todo
        parts: list[Part] = []
        for adapter in todo:
            part = _part(adapter, _site(self, adapter))
            if part is None or (parts and _clash(part, parts)):
                break
            parts.append(part)
        left = todo[len(parts) :]
        if left and not _acts_on_output(left[0]):
            return [], todo  # another method replaces the weight: all of them act on it densely
        return parts, left


def _acts_on_output(adapter: Adapter) -> bool:
    return isinstance(adapter, (LowRank, FeatureMap))


def _site(layer: nn.Module, adapter: Adapter) -> Site:
    return Site(layer, adapter.param, adapter.rows)


def _part(adapter: Adapter, site: Site) -> Part | None:
    if isinstance(adapter, LowRank):
        if not adapter.fusable:
            return None
        down, up = adapter.factors()
        return Part(down, up if adapter.strength == 1 else up * adapter.strength, None, adapter.rows)
    if isinstance(adapter, WeightMap) and adapter.strength == 1:
        scaled = adapter.scaled_factors(site)
        return None if scaled is None else Part(*scaled, adapter.rows)
    return None


def _clash(part: Part, parts: list[Part]) -> bool:
    """Updates on the same rows can be done together only where none of them scales the others."""
    for other in parts:
        if part.gain is None and other.gain is None:
            continue
        if part.rows is None or other.rows is None:
            return True
        if part.rows[0] < other.rows[1] and other.rows[0] < part.rows[1]:
            return True
    return False


def _output(layer: nn.Module, adapter: Adapter, x: Tensor, y: Tensor, size: list[int] | None) -> Tensor:
    """One output-space adapter: y' on its rows, at its strength."""
    site = Site(layer, adapter.param, adapter.rows, size)
    channel = ops.channel_dim(layer)
    old = y if adapter.rows is None else y.narrow(channel, adapter.rows[0], site.width)
    if isinstance(adapter, LowRank):
        side = adapter.side(x, site)
        new = old + (side if adapter.strength == 1 else side * adapter.strength).to(old.dtype)
    else:
        new = adapter(x, old, site).to(old.dtype)
        new = new if adapter.strength == 1 else torch.lerp(old, new, adapter.strength)
    return new if adapter.rows is None else torch.slice_scatter(y, new, channel, *adapter.rows)


def _fold_weight(adapters: list[Any], weight: Tensor) -> Tensor:
    """The canonical weight after weight-space adapters."""
    for adapter in adapters:
        rows = slice(None) if adapter.rows is None else slice(*adapter.rows)
        old = weight[rows]
        new = adapter.new_weight(old)
        new = new if adapter.strength == 1 else old + adapter.strength * (new - old)
        weight = new if adapter.rows is None else torch.slice_scatter(weight, new, 0, *adapter.rows)
    return weight


def fold(layer: Grafted, param: str) -> tuple[Tensor, Tensor | None]:
    """The weight as stored, and the bias, that equal the layer with its adapters.

    Raises:
        ValueError: a method has no merged form on this layer.
    """
    source = stored(layer, param).detach()
    exact = torch.promote_types(source.dtype, torch.float32)  # fold in fp32, round once
    weight = source.to(exact)
    bias: Tensor | None = layer._parameters.get("bias") if param == "weight" else None
    bias = None if bias is None else bias.detach().to(exact)
    called = ops.is_linear_op(layer) and param == "weight"
    weight = ops.canonical(layer, weight) if called else weight
    for adapter in layer.active(param):
        reason = adapter.refuse_merge(_site(layer, adapter))
        if reason is not None:
            raise ValueError(reason)
        if isinstance(adapter, FeatureMap):
            weight, bias = _fold_affine(layer, adapter, weight, bias)
        else:
            weight = _fold_weight([adapter], weight)
    weight = ops.native(layer, weight) if called else weight
    return weight.to(source.dtype), None if bias is None else bias.to(source.dtype)


def _fold_affine(
    layer: nn.Module, adapter: FeatureMap, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    # f on one-hot inputs reads off W' column by column: W' = (f(Wᵀ) − f(0))ᵀ, b' = f(0) at y = b.
    rows = slice(None) if adapter.rows is None else slice(*adapter.rows)
    old = weight[rows]
    old_bias = old.new_zeros(len(old)) if bias is None else bias[rows]
    site = MatrixSite(_site(layer, adapter), old, old_bias)
    matrix = old.flatten(1)
    x = torch.eye(matrix.shape[1], dtype=old.dtype, device=old.device)
    new_bias = adapter(x.new_zeros(1, len(x)), old_bias[None], site)[0].to(old.dtype)
    new = (adapter(x, matrix.t() + old_bias, site).to(old.dtype) - new_bias).t().reshape(old.shape)
    new, new_bias = torch.lerp(old, new, adapter.strength), torch.lerp(old_bias, new_bias, adapter.strength)
    weight = weight.clone()
    weight[rows] = new
    if bias is None and not new_bias.any():
        return weight, None  # a layer without bias gains one only if it must
    bias = weight.new_zeros(len(weight)) if bias is None else bias.clone()
    bias[rows] = new_bias
    return weight, bias


# --- the class swap ------------------------------------------------------------------------
@cache  # one class per base class and views: torch.compile reuses graphs over equal layers
def _class(base: Any, views: tuple[str, ...]) -> type[Grafted]:
    if not views:
        return type(f"Adapted{base.__name__}", (AdaptedLayer, base), {"_base": base})
    body: dict[str, Any] = {name: property(_view(name)) for name in views}
    return type(f"Viewed{base.__name__}", (Grafted, base), {"_base": base, "_views": views, **body})


def _view(name: str) -> Any:
    def folded(self: Grafted) -> Tensor:
        tensor = stored(self, name)
        maps = self.active(name) if "adapters" in self._modules else []
        return _fold_weight(maps, tensor) if maps else tensor

    return folded


def _blank(base: type[nn.Module], views: tuple[str, ...]) -> nn.Module:
    cls = _class(base, views)  # type: ignore[arg-type]
    return cls.__new__(cls)


def refuse_graft(layer: nn.Module, adapter: Adapter) -> str | None:
    """Why that adapter cannot be attached to that layer, or None."""
    if "forward" in layer.__dict__:
        return (
            f"this {type(layer).__name__} has a `forward` of its own (accelerate's offload hooks set one), which "
            "would bypass the adapter; remove the hook before `adapt`"
        )
    if isinstance(layer, Grafted) and bool(layer._views) != adapter.view:
        return "one layer cannot have adapters both on its call and on a view of its weight"
    if adapter.view and not isinstance(adapter, WeightMap):
        return (
            f"{type(adapter).__name__} changes outputs, but code that reads a parameter has none; "
            "use a method that changes weights (LoRA, DoRA, …)"
        )
    return None


def graft(layer: nn.Module, key: str, adapter: Adapter) -> None:
    """Attach a built adapter to a layer under `adapters.<key>` (`refuse_graft` says whether that works)."""
    base, views = (layer._base, layer._views) if isinstance(layer, Grafted) else (type(layer), ())
    held = dict(layer.adapters.items()) if isinstance(layer, Grafted) else {}
    layer.adapters = nn.ModuleDict({**held, key: adapter})
    layer.__class__ = _class(base, tuple(sorted({*views, adapter.param})) if adapter.view else ())  # type: ignore[arg-type]


def prune(layer: Grafted, keys: list[str]) -> None:
    """Detach adapters; the layer is its own class again once the last one is gone."""
    left = {key: a for key, a in layer.adapters.items() if key not in keys}
    layer.adapters = nn.ModuleDict(left)  # a new one: `merged` holds the old
    if not left:
        del layer._modules["adapters"]
        layer.__dict__.pop("lean", None)
        layer.__class__ = layer._base  # type: ignore[assignment]
