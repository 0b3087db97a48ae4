r"""Which layers, and which of their rows, a pattern means.

attn.qkv              suffix of a layer's name
blocks.*.mlp.fc?      glob over the whole name
re:blocks\.[0-3]\..*  regular expression over the whole name
type:Conv2d           layer type
attention             preset: of the model (`model.adapter_presets`) or of PRESETS
attn.in_proj_weight   a parameter that code reads instead of calling a layer
…:q  …:k  …:v         thirds of a fused projection;  …:0/2  first of two equal parts
=fc1                  that name alone, no suffix and no preset: what files say (`exact`)
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from visadapt.core import ops

Targets = str | Sequence[str] | Mapping[str, Mapping[str, Any]]

# Names that the supported model families use; a backbone may set `adapter_presets` instead.
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": (
        "attn.qkv", "attn.proj", "self_attn.?_proj", "self_attn.out_proj", "to_q", "to_k", "to_v", "to_out.0",
        "attn.q_proj", "attn.k_proj", "attn.v_proj", "in_proj_weight", "out_proj",
    ),
    "mlp": ("mlp.fc1", "mlp.fc2", "mlp.lin1", "mlp.lin2", "ff.net.0.proj", "ff.net.2", "linear1", "linear2"),
    "linears": ("type:Linear",),
    "convs": ("type:_ConvNd",),
    "all": ("type:Linear", "type:_ConvNd"),
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One site: a module, its parameter, rows and the hyper-parameters that its pattern overrides."""

    name: str
    module: nn.Module
    param: str = "weight"
    view: bool = False
    part: str = ""
    rows: tuple[int, int] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Layer, parameter and part as a pattern that finds it again."""
        viewed = f"{self.name}.{self.param}" if self.view else self.name
        return f"{viewed}:{self.part}" if self.part else viewed


def exact(label: str) -> str:
    """The pattern that means the site of a `Target.label` and no other."""
    return f"={label}"


def resolve(model: nn.Module, targets: Targets, exclude: Sequence[str] | str = ()) -> list[Target]:
    """The sites that `targets` mean, in the order of the model; the last pattern on a site wins.

    Raises:
        ValueError: a pattern matches nothing, or its rows do not divide the layer.
    """
    listed = [targets] if isinstance(targets, str) else targets
    wanted = _spell_out(model, listed if isinstance(listed, Mapping) else {pattern: {} for pattern in listed})
    if not wanted:
        raise ValueError("no targets: name layers, for instance ['attn.qkv:q', 'attn.qkv:v'] or 'attention'")
    candidates = _candidates(model)
    left_out = set()
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        excluded = _matches(model, pattern, candidates)
        if not excluded:
            raise ValueError(f"exclude pattern '{pattern}' matches no layer; it was probably meant to")
        left_out |= set(excluded)
    found: dict[tuple[str, str], Target] = {}
    for pattern, overrides in wanted.items():
        body, _, part = pattern.rpartition(":") if _has_part(pattern) else (pattern, "", "")
        names = _matches(model, body, candidates)
        if not names:
            raise ValueError(_no_match(model, pattern, body, candidates))
        for name in names:
            if name not in left_out:
                module_name, param, view = candidates[name]
                module = model.get_submodule(module_name)
                rows = _rows(pattern, part, name, module, param)
                found[name, part] = Target(module_name, module, param, view, part, rows, overrides or {})
    if not found:
        raise ValueError(f"`exclude` leaves nothing of the targets {', '.join(wanted)}")
    order = {name: i for i, name in enumerate(candidates)}
    result = [found[key] for key in sorted(found, key=lambda k: order[k[0]])]
    _no_overlap(result)
    return result


def _spell_out(model: nn.Module, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A preset of the model that names rows (…:q) stands for its patterns; other presets are matched as one."""
    own: Mapping[str, Sequence[str]] = getattr(model, "adapter_presets", {})
    spelt: dict[str, Any] = {}
    for pattern, overrides in wanted.items():
        parts = own.get(pattern, ())
        spelt |= dict.fromkeys(parts if any(map(_has_part, parts)) else (pattern,), overrides)
    return spelt


def _candidates(model: nn.Module) -> dict[str, tuple[str, str, bool]]:
    # name -> (module, parameter, is it a view)
    found: dict[str, tuple[str, str, bool]] = {}
    for name, module in model.named_modules():
        if ".adapters." in f".{name}." or name.endswith("adapters"):
            continue
        if ops.is_linear_op(module):
            # MultiheadAttention reads out_proj.weight and never calls out_proj; a convolution with a forward of its own
            # (weight standardisation, padding by the input's size) does with the weight what only it knows.
            read = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
            read = read or (isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not ops.is_plain(module))
            found[name] = (name, "weight", read)
            if isinstance(module, nn.Linear) or read:
                found[f"{name}.weight" if name else "weight"] = (name, "weight", True)
        else:
            for param, tensor in module._parameters.items():
                if tensor is not None and tensor.dim() == 2:
                    found[f"{name}.{param}" if name else param] = (name, param, True)
    return found


def _has_part(pattern: str) -> bool:
    return bool(re.search(r":([qkv]|\d+/\d+)$", pattern))


def _matches(model: nn.Module, pattern: str, candidates: Mapping[str, tuple[str, str, bool]]) -> list[str]:
    if pattern.startswith("="):
        return [n for n in candidates if n == pattern[1:]]
    own: Mapping[str, Iterable[str]] = getattr(model, "adapter_presets", {})
    if pattern in own or pattern in PRESETS:
        patterns = own.get(pattern, PRESETS.get(pattern, ()))
        names = {n for p in patterns if p != pattern for n in _matches(model, p, candidates)}
        return [n for n in candidates if n in names]
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"'{pattern}' is not a regular expression: {error}") from error
        return [n for n in candidates if expression.fullmatch(n) and _called(candidates[n], n)]
    if pattern.startswith("type:"):
        kind = pattern[5:].removeprefix("nn.")
        return [n for n in candidates if _called(candidates[n], n) and _is_type(model.get_submodule(n), kind)]
    if any(c in pattern for c in "*?["):
        explicit = pattern.rsplit(".", 1)[-1]
        return [
            n for n, (_, param, _v) in candidates.items()
            if (fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"*.{pattern}"))
            and (_called(candidates[n], n) or param == explicit)
        ]  # fmt: skip
    return [n for n in candidates if n == pattern or n.endswith(f".{pattern}")]


def _called(candidate: tuple[str, str, bool], name: str) -> bool:
    return candidate[0] == name


def _is_type(module: nn.Module, kind: str) -> bool:
    base = getattr(type(module), "_base", type(module))
    return any(c.__name__ == kind for c in base.__mro__ if c is not nn.Module)


def _rows(pattern: str, part: str, name: str, module: nn.Module, param: str) -> tuple[int, int] | None:
    if not part:
        return None
    if ops.is_linear_op(module):
        width, _, _, groups = ops.shape_of(module)
    else:
        width, groups = module._parameters[param].shape[0], 1  # type: ignore[union-attr]
    index, count = ("qkv".index(part), 3) if part in "qkv" else tuple(map(int, part.split("/")))
    if groups > 1:
        raise ValueError(f"'{pattern}': {name} is a grouped convolution, whose rows cannot be adapted alone")
    if width % count or index >= count:
        raise ValueError(f"'{pattern}': {name} has {width} outputs, which have no part {part} of equal size")
    size = width // count
    return index * size, (index + 1) * size


def _no_overlap(found: list[Target]) -> None:
    seen: dict[str, list[Target]] = {}
    for target in found:
        for other in seen.setdefault(f"{target.name}.{target.param}", []):
            a, b = target.rows, other.rows
            if a is None or b is None or (a[0] < b[1] and b[0] < a[1]):
                raise ValueError(
                    f"'{target.label}' and '{other.label}' name the same rows; use two sets with different names "
                    "to put two adapters on them"
                )
        seen[f"{target.name}.{target.param}"].append(target)


def _no_match(model: nn.Module, pattern: str, body: str, candidates: Mapping[str, Any]) -> str:
    presets = {*PRESETS, *getattr(model, "adapter_presets", {})}
    layers = [n for n in candidates if _called(candidates[n], n)]
    suffixes = {
        ".".join(n.split(".")[i:]) for n in layers for i in range(len(n.split("."))) if not n.split(".")[i].isdigit()
    }
    pattern, body = pattern.removeprefix("="), body.removeprefix("=")
    near = difflib.get_close_matches(body, sorted({*suffixes, *presets} - {body}), n=4, cutoff=0.5)
    near = near or sorted({re.sub(r"\d+", "*", n) for n in layers})[:6]
    hint = ", ".join(f"'{n}'" for n in near) or "no Linear or convolution at all"
    return f"target '{pattern}' matches no layer of {type(model).__name__}; near misses: {hint}"
