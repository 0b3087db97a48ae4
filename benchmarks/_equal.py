"""Equality in float64: two cases with the same weights must give the same output and gradients.

A time ratio between two programs means something only if they compute the same thing, so this is the
precondition of a row. Every source names and lays out its tensors in its own way; here each is mapped to the
same canonical matrices, and one side's values are copied to the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks._cases import Case
from benchmarks._hosts import Host

TOLERANCE = 1e-10  # float64 products of a few thousand terms agree to about 1e-14

_PEFT = {"down": r"lora_A\.default\.weight", "up": r"lora_B\.default\.weight"}
_LOCON = {"down": r"lora_down\.weight", "up": r"lora_up\.weight"}
_HADA = {"up1": "w1_a", "down1": "w1_b", "up2": "w2_a", "down2": "w2_b"}
_LOKR = {"left": "w1", "up": "w2_a", "down": "w2_b", "whole": "w2"}
_AXES = {f"axis{k}": rf"axes\.{k}" for k in (0, 1)}
_BRANCHES = [
    (f"{branch}_{end}{bias}", f"{prefix}{end}{bias}")
    for branch, prefix in (("parallel", ""), ("sequential", "seq_"))
    for end in ("down", "up")
    for bias in ("", "_bias")
]
_LEVELS = [(f"{end}{k}", rf"{end}\.{k}") for end in ("up", "down") for k in (0, 1, 2)]


def _ours(**names: str) -> dict[str, str]:
    return {canonical: rf"adapters\.default\.{end}" for canonical, end in names.items()}


# canonical name -> end of the parameter's name, as a regular expression
NAMES: dict[tuple[str, str], dict[str, str]] = {
    ("LoRA", "visadapt"): _ours(down="down", up="up"),
    ("LoRA", "peft"): _PEFT,
    ("LoRA", "lycoris"): _LOCON,
    ("DoRA", "visadapt"): _ours(down="down", up="up", magnitude="magnitude"),
    ("DoRA", "peft"): {**_PEFT, "magnitude": r"lora_magnitude_vector\.default\.weight"},
    ("DoRA", "lycoris"): {**_LOCON, "magnitude": "dora_scale"},
    ("LoHa", "visadapt"): _ours(up1="up_a", down1="down_a", up2="up_b", down2="down_b"),
    ("LoHa", "peft"): {name: rf"hada_{end}\.default" for name, end in _HADA.items()},
    ("LoHa", "lycoris"): {name: f"hada_{end}" for name, end in _HADA.items()},
    ("LoKr", "visadapt"): _ours(left="left", up="right_up", down="right_down", whole="right"),
    ("LoKr", "peft"): {name: rf"lokr_{end}\.default" for name, end in _LOKR.items()},
    ("LoKr", "lycoris"): {name: f"lokr_{end}" for name, end in _LOKR.items()},
    ("FLoRA", "visadapt"): _ours(core="core", up="up", inner="inner", **_AXES),
    ("FLoRA", "literal"): {"core": "core", "up": "up", "inner": "inner", **_AXES},
    ("WaRA", "visadapt"): _ours(**dict(_LEVELS)),
    ("WaRA", "literal"): dict(_LEVELS),
    ("SALT", "visadapt"): _ours(alpha="scale", beta="shift", x="mix_left", y="mix_right"),
    ("SALT", "literal"): {name: name for name in ("alpha", "beta", "x", "y")},
    ("Hydra", "visadapt"): _ours(**{theirs: ours for theirs, ours in _BRANCHES}),
    ("Hydra", "literal"): {name: name for name, _ in _BRANCHES},
    ("SSF", "visadapt"): _ours(gamma="scale", beta="shift"),
    ("SSF", "literal"): {"gamma": "gamma", "beta": "beta"},
    ("MiSS", "visadapt"): _ours(shard="shard"),
    ("MiSS", "peft"): {"shard": r"miss_block\.default"},
    ("HRA", "visadapt"): _ours(vectors="vectors"),
    ("HRA", "peft"): {"vectors": r"hra_u\.default"},
}
TRANSPOSED = {("MiSS", "peft"), ("HRA", "peft")}
# LyCORIS differentiates DoRA's norm; PEFT and we hold it constant (section 4.3 of the DoRA paper)
OTHER_GRADIENT = {("DoRA", "lycoris"): ("down", "up")}


@dataclass(frozen=True)
class Slot:
    """A parameter that stores a canonical matrix, row by row (vectors are one row) or column by column."""

    parameter: nn.Parameter
    transposed: bool = False

    def canonical(self, value: Tensor) -> Tensor:
        """A value or gradient of the parameter as the canonical matrix."""
        if self.transposed:
            return value.t()
        return value.reshape(1, -1) if max(value.shape) == value.numel() else value.reshape(len(value), -1)

    def fill(self, matrix: Tensor) -> None:
        """Store a canonical matrix."""
        with torch.no_grad():
            self.parameter.copy_((matrix.t() if self.transposed else matrix).reshape(self.parameter.shape))


def slots(case: Case) -> dict[str, list[Slot]]:
    """Canonical name to the parameters that store it, one per adapted layer, in module order."""
    found: dict[str, list[Slot]] = {}
    trained = {id(p) for p in case.trained}
    for name, parameter in case.model.named_parameters():
        for canonical, end in NAMES[case.method, case.source].items():
            if id(parameter) in trained and re.search(rf"(^|\.){end}$", name):
                found.setdefault(canonical, []).append(Slot(parameter, (case.method, case.source) in TRANSPOSED))
    return found


def comparable(ours: Case, peer: Case) -> bool:
    """Whether two cases of one method state the same mathematics and their tensors are known."""
    keys = [(case.method, case.source) for case in (ours, peer)]
    return ours.group == peer.group and all(key in NAMES for key in keys) and peer.variant != "tucker"


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def relative_error(ours: Case, peer: Case, host: Host, x: Tensor) -> float:
    """Largest relative difference of output, input gradient and adapter gradients at equal weights.

    Args:
        ours: the case that gets the peer's weights.
        peer: the other case, on the same frozen weights.
        host: of both.
        x: float64 input.

    Raises:
        ValueError: the two do not have the same number of tensors.
    """
    mine, theirs = slots(ours), slots(peer)
    if {k: len(v) for k, v in mine.items()} != {k: len(v) for k, v in theirs.items()} or not mine:
        raise ValueError(f"{ours.label} has {list(mine)} and {peer.label} {list(theirs)}: not the same tensors")
    for name, pairs in mine.items():
        for slot, other in zip(pairs, theirs[name], strict=True):
            slot.fill(other.canonical(other.parameter.detach()))
    results = [_run(case, host, x) for case in (ours, peer)]
    errors = [_difference(a, b) for a, b in zip(*results, strict=True)]
    skipped = {
        name for key in ((ours.method, ours.source), (peer.method, peer.source)) for name in OTHER_GRADIENT.get(key, ())
    }
    for name, pairs in mine.items():
        for slot, other in zip(pairs, theirs[name], strict=True):
            if name not in skipped:
                grads = [s.canonical(s.parameter.grad) for s in (slot, other)]
                errors.append(_difference(*grads))
    return max(errors)


def _run(case: Case, host: Host, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and the gradient at the start of the model."""
    start = case.model.get_parameter(host.source) if host.source else x
    start.grad = None
    for parameter in case.trained:
        parameter.grad = None
    y = case.model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(weights.to(y.device, y.dtype))
    return y.detach(), start.grad.clone()
