"""LoKr in files, under the names that LyCORIS, ComfyUI and PEFT share: w1 is the left factor, w2 the right one.

    w1 (o1, i1), or w1_a (o1, r) and w1_b (r, i1)
    w2 (o2, i2, *kernel), or w2_a (o2, r) and w2_b (r, i2 · kernel),
    or t2 (r, r, *kernel), w2_a (r, o2) and w2_b (r, i2)

The scale is alpha / r, with r that of w2_b, else that of w1_b; 1 where both factors are whole (PEFT: always alpha / r).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visadapt.core import ops
from visadapt.core.layer import Grafted
from visadapt.core.site import Site
from visadapt.interop.made import Made, shaped
from visadapt.maths.kronecker import split
from visadapt.methods import LoKr


def only_lokr(layer: Grafted) -> LoKr | None:
    """The LoKr that is all of a layer's change, on all its rows; None if there is no such."""
    active = layer.active("weight")
    if len(active) != 1 or layer._views or getattr(layer, "groups", 1) > 1 or getattr(layer, "transposed", False):
        return None
    one = active[0]
    return one if type(one) is LoKr and one.rows is None else None


def lokr_tensors(one: LoKr) -> dict[str, Tensor]:
    """What a file holds of an adapter, with scale and strength folded into w2."""
    held, factor = {n: p.detach() for n, p in one.named_parameters()}, one.scale * one.strength
    if "left" in held:
        made = {"lokr_w1": held["left"]}
    else:
        made = {"lokr_w1_a": held["left_up"], "lokr_w1_b": held["left_down"]}
    if "right" in held:
        return made | {"lokr_w2": held["right"] * factor}
    up, down = held["right_up"] * factor, held["right_down"]
    if "right_core" in held:
        return made | {"lokr_w2_a": up.t(), "lokr_w2_b": down, "lokr_t2": held["right_core"]}
    return made | {"lokr_w2_a": up, "lokr_w2_b": down.flatten(1)}


def read_lokr(site: Site, roles: Mapping[str, Tensor], scale: float | None = None) -> Made:
    """The method that says what a file holds of one layer.

    Factors that LyCORIS would not have factored are multiplied out, which changes nothing of the update.

    Args:
        site: of the layer.
        roles: `lokr_…` → tensor, and `alpha`.
        scale: where the file does not follow LyCORIS' rule.

    Raises:
        ValueError: a tensor is missing, or does not have the shape that the layer needs.
    """
    left, right = _pair(roles, "lokr_w1"), _pair(roles, "lokr_w2")
    rank = len(right[-1]) if len(right) == 2 else len(left[-1]) if len(left) == 2 else 0
    if scale is None:
        scale = float(roles["alpha"]) / rank if rank and "alpha" in roles else 1.0
    (o1, i1), (fan_in, *kernel) = (len(left[0]), left[-1].shape[1]), site.in_shape
    if site.width % o1 or fan_in % i1:
        raise ValueError(f"has lokr_w1 of {o1} × {i1}, which does not divide the layer's {site.width} × {fan_in}")
    o2, i2 = site.width // o1, fan_in // i1
    core = roles.get("lokr_t2")
    whole_right = len(right) == 1 or rank >= max(o2, i2) / 2
    whole_left = len(left) == 1 or len(left[-1]) != rank or rank >= max(o1, i1) / 2
    if not whole_left and whole_right and rank < max(o2, i2) / 2:
        whole_left = True  # the rule would factor w2 at this rank
    hparams: dict[str, Any] = {"rank": rank or 1, "full": whole_left and whole_right}
    tensors = {"left": left[0] @ left[1] if len(left) == 2 else left[0]}
    if not whole_left:
        hparams["decompose_both"] = True
        tensors = {"left_up": left[0], "left_down": left[1]}
    if hparams["full"]:
        right, scale = _scaled(right, scale), 1.0
    hparams |= {"tucker": core is not None and not whole_right, "alpha": None if scale == 1 else scale * rank}
    tensors |= _right(right, core, (o2, i2, *kernel), whole_right)
    if not all(split(n)[0] == m for n, m in ((site.width, o1), (fan_in, i1))):
        hparams["factor"] = [o1, i1]
    return LoKr(**hparams), {name: tensor.float() for name, tensor in tensors.items()}


def _pair(roles: Mapping[str, Tensor], name: str) -> list[Tensor]:
    ends = [name] if name in roles else [f"{name}_a", f"{name}_b"]
    found = [roles[end].float() for end in ends if end in roles and roles[end].dim() > 1]
    if len(found) < len(ends):
        raise ValueError(f"holds {', '.join(sorted(set(roles) - {'alpha'}))}, which is no whole LoKr ({name})")
    return found


def _scaled(right: list[Tensor], scale: float) -> list[Tensor]:
    return [right[0] * scale, *right[1:]]


def _right(right: list[Tensor], core: Tensor | None, shape: tuple[int, ...], whole: bool) -> dict[str, Tensor]:
    """The right factor as the method holds it."""
    (o2, i2, *kernel), what = shape, "lokr_w2"
    if len(right) == 1:
        return {"right": shaped(right[0], shape, what)}
    rank = len(right[1])
    if core is None:
        up, down = shaped(right[0], (o2, rank), f"{what}_a"), shaped(right[1], (rank, i2, *kernel), f"{what}_b")
    else:
        up, down = shaped(right[0], (rank, o2), f"{what}_a").t(), shaped(right[1], (rank, i2), f"{what}_b")
        core = shaped(core, (rank, rank, *kernel), "lokr_t2")
        if not whole and any(k != 1 for k in kernel):
            return {"right_up": up, "right_down": down, "right_core": core}
        down = torch.einsum("pq...,qi->pi...", core, down)
    return {"right": torch.einsum("or,r...->o...", up, down)} if whole else {"right_up": up, "right_down": down}


# --- PEFT: shapes follow from one configuration for all layers ------------------------------
def peft_config(found: Mapping[str, tuple[LoKr, Grafted]]) -> tuple[dict[str, Any], dict[str, int]] | None:
    """The configuration under which PEFT makes just these shapes, and the rank of each layer; None if there is none."""
    shapes = {name: _shape(one, layer) for name, (one, layer) in found.items()}
    both = {"left_up" in dict(one.named_parameters()) for one, _ in found.values()}
    cores = {c for shape, (one, layer) in zip(shapes.values(), found.values()) for c in _core(one, layer)}
    if len(cores) > 1 or not all(_plain(one, layer) for one, layer in found.values()):
        return None
    ranks = {name: _rank(one, shapes[name]) for name, (one, _) in found.items()}
    decompose = True in both
    if decompose and any(ranks[n] < max(shapes[n][:2]) / 2 and hasattr(one, "left") for n, (one, _) in found.items()):
        return None
    candidates = dict.fromkeys([-1, *(m for o1, i1, _, _ in shapes.values() for m in (o1, i1))])
    for factor in candidates:
        if all((_first(o1 * o2, factor), _first(i1 * i2, factor)) == (o1, i1) for o1, i1, o2, i2 in shapes.values()):
            options = {"decompose_both": decompose, "decompose_factor": factor, "use_effective_conv2d": True in cores}
            return options, ranks
    return None


def _shape(one: LoKr, layer: Grafted) -> tuple[int, int, int, int]:
    o1, i1 = (len(one.left_up), one.left_down.shape[1]) if hasattr(one, "left_up") else one.left.shape
    out, fan_in, _, _ = ops.shape_of(layer)
    return o1, i1, out // o1, fan_in // i1


def _core(one: LoKr, layer: Grafted) -> list[bool]:
    """Whether the layer has a core, if it might have one."""
    possible = hasattr(one, "right_up") and any(k != 1 for k in ops.shape_of(layer)[2])
    return [hasattr(one, "right_core")] if possible else []


def _plain(one: LoKr, layer: Grafted) -> bool:
    """PEFT pads with zeros, has no 3-D kernels, and reads cores of 2-D ones alone."""
    dims = len(ops.shape_of(layer)[2])
    return (
        getattr(layer, "padding_mode", "zeros") == "zeros"
        and dims < 3
        and (dims == 2 or not hasattr(one, "right_core"))
    )


def _rank(one: LoKr, shape: tuple[int, int, int, int]) -> int:
    whole = hasattr(one, "left") and hasattr(one, "right")
    return max(shape) if whole else one.rank  # a rank at which PEFT factors neither


def _first(size: int, factor: int) -> int:
    """PEFT's split: a factor that divides comes first, also if it is the larger one."""
    return factor if factor > 0 and size % factor == 0 else split(size, factor)[0]
