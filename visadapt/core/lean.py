"""Recompute an input in backward from what its producer already keeps.

An adapted layer must know its input x to train `down`; a frozen layer need not. Where x is a cheap
function of tensors that autograd keeps anyway (LayerNorm, GELU/SiLU, the head merge behind
attention), x itself need not be kept: ViT-B with LoRA on all Linears saves 282 instead of 446 MiB.
The layers of `lean_layers` make more producers known: GroupNorm, gated GELU, SiLU behind a norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Recipe:
    """How to make a tensor again: `make(*sources)` reshaped and cast."""

    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype

    def run(self, sources: tuple[Tensor, ...]) -> Tensor:
        """The tensor, from sources that went through save_for_backward."""
        with torch.no_grad():
            return self.make(*sources).reshape(self.shape).to(self.dtype)


def recipe(x: Tensor, dtype: torch.dtype) -> Recipe | None:
    """How to recompute x in that dtype, or None where that takes more than its producer keeps."""
    if not active():
        return None
    node: Any = x.grad_fn
    # Views and the copy of a permuted tensor: attention's (B, H, N, d) -> (B, N, H·d).
    permute: list[tuple[int, int]] = []
    while node is not None and node.name() in _LAYOUT:
        if node.name() == "TransposeBackward0":
            permute.append((_dim(node._saved_dim0), _dim(node._saved_dim1)))
        elif permute and "View" in node.name():
            return None  # a reshape below a transposition: not attention's head merge
        node = node.next_functions[0][0]
    if node is None or (permute and not node.name().startswith("ScaledDotProduct")):
        return None
    producer = _remade if hasattr(node, "remake") else _PRODUCERS.get(node.name())
    made = None if producer is None else producer(node)
    if made is None:
        return None
    make, sources = made
    if permute:
        inner = make

        def make(*tensors: Tensor) -> Tensor:
            out = inner(*tensors)
            for a, b in reversed(permute):
                out = out.transpose(a, b)
            return out

    return Recipe(make, tuple(s.detach() for s in sources), x.shape, dtype)


def active() -> bool:
    """Whether to recompute at all: the compiler and checkpointing decide for themselves what to keep."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not _checkpointing()


def keeps_little(x: Tensor) -> bool:
    """Whether an operation on x shall keep less for backward than torch's own does."""
    return x.requires_grad and active()


_LAYOUT = {"ViewBackward0", "UnsafeViewBackward0", "CloneBackward0", "TransposeBackward0", "ToCopyBackward0"}


def _dim(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value  # autograd reports negative dimensions unsigned


def _gelu(node: Any) -> Any:
    approximate = node._saved_approximate
    return (lambda u: F.gelu(u, approximate=approximate)), (node._saved_self,)


def _silu(node: Any) -> Any:
    return F.silu, (node._saved_self,)


def _layer_norm(node: Any) -> Any:
    weight, bias, mean, rstd = node._saved_weight, node._saved_bias, node._saved_result1, node._saved_result2
    if weight is None or bias is None:
        return None
    if NORM in node.metadata:  # by `LeanLayerNorm`: one pass instead of three
        _, eps = node.metadata[NORM]
        return (lambda h, w, b: F.layer_norm(h, w.shape, w, b, eps)), (node._saved_input, weight, bias)

    def make(h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addcmul(bias, (h - mean).mul_(rstd), weight)

    return make, (node._saved_input, mean, rstd, weight, bias)


def _group_norm(node: Any) -> Any:
    # The node lacks bias and epsilon, which `LeanGroupNorm` notes on it. Statistics are made again: that costs
    # less than two broadcast passes with the kept ones, and gives the same bits.
    if NORM not in node.metadata or node._saved_weight is None:
        return None
    (bias, eps), groups = node.metadata[NORM], node._saved_group

    def make(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(h, groups, weight, bias.to(weight.dtype), eps)

    return make, (node._saved_input, node._saved_weight, bias)


def _remade(node: Any) -> Any:
    # A Function of ours whose output follows from what it saved.
    return node.remake, node.saved_tensors


def _attention(node: Any) -> Any:
    output = getattr(node, "_saved_output", None)
    if output is None:
        return None
    return (lambda out: out), (output,)


NORM = "visadapt.norm"
_PRODUCERS: dict[str, Callable[[Any], Any]] = {
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "NativeLayerNormBackward0": _layer_norm,
    "NativeGroupNormBackward0": _group_norm,
    "ScaledDotProductFlashAttentionForCpuBackward0": _attention,
    "ScaledDotProductFlashAttentionBackward0": _attention,
    "ScaledDotProductEfficientAttentionBackward0": _attention,
    "ScaledDotProductCudnnAttentionBackward0": _attention,
}


def _checkpointing() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
