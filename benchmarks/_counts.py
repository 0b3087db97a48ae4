"""Deterministic counts of one step: FLOPs, operators, bytes touched, bytes kept for backward, peak bytes.

They do not depend on the machine's load, so tests assert them and CI can trust them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MIB = 1 << 20
aten = torch.ops.aten


def _addmm(shape: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def _matvec(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a)


# torch's own table has no in-place updates and no matrix-vector products: they would count as 0
_SHAPES: dict[Any, Callable[..., int]] = {
    aten.addmm_: _addmm,
    aten.baddbmm_: _addmm,
    aten.mv: _matvec,
    aten.dot: _matvec,
    aten.addmv: lambda _, a, b, *rest, **kw: _matvec(a, b),
    aten.addmv_: lambda _, a, b, *rest, **kw: _matvec(a, b),
}
# storage is only created or renamed by these: no bytes move
_FREE = {
    "aten.empty",
    "aten.empty_like",
    "aten.empty_strided",
    "aten.detach",
    "aten._unsafe_view",
    "aten.lift_fresh",
}


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else value


class Count(TorchDispatchMode):
    """Count operators, FLOPs of the matrix products, convolutions and attention, and bytes read plus written.

    It reads torch's table of FLOP formulas instead of running ``FlopCounterMode``, whose module tracking
    fails under ``no_grad`` and adds hooks to the graph. FFTs count as zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.operators = 0
        self.traffic = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if func.is_view or str(packet) in _FREE:
            return out
        self.operators += 1
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        self.traffic += sum(t.numel() * t.element_size() for t in tensors.values())
        if packet in _SHAPES:
            self.flops += _SHAPES[packet](*map(_shape, args))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


class _Held:
    """A saved tensor; it lives exactly as long as the autograd node that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd's nodes took in during a forward pass, each storage once.

    Attributes:
        seen: all of them, the definition of the study that set the bars. It includes what a node took in and
            gave up before forward returned (PEFT's DoRA builds an identity matrix per layer that way).
        kept: those still there when forward returned, so what a training step really pays.
    """

    seen: int
    kept: int


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> Saved:
    """What ``forward`` saves for backward, the model's own state excluded.

    Args:
        forward: runs the model and returns its output.
        model: parameters and buffers of which occupy memory anyway.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: list[Tensor] = []  # strong references, so that no address is used twice
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        kept = _Held(tensor.detach())  # a saved output would otherwise hold its own node: a cycle, never freed
        held.add(kept)
        seen.append(kept.tensor)
        return kept

    def total(tensors: Iterable[Tensor]) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(size for pointer, size in storages.items() if pointer not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = forward()
    result = Saved(total(seen), total(kept.tensor for kept in held))
    del output
    return result


@dataclass(frozen=True)
class Memory:
    """Live bytes above the state before the step.

    Attributes:
        peak: the most that was alive at once during forward and backward.
        held: alive when forward returned, its output included; shows what saved-tensor hooks cannot see.
    """

    peak: int
    held: int


def memory(forward: Callable[[], Tensor], backward: Callable[[Tensor], None], device: str) -> Memory:
    """Peak and held bytes of one forward and backward, from the allocator's own events."""
    return _cuda_memory(forward, backward) if device == "cuda" else _cpu_memory(forward, backward)


def _cuda_memory(forward: Callable[[], Tensor], backward: Callable[[Tensor], None]) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = forward()
    held = torch.cuda.memory_allocated() - before
    backward(output)
    return Memory(torch.cuda.max_memory_allocated() - before, held)


def _cpu_memory(forward: Callable[[], Tensor], backward: Callable[[Tensor], None]) -> Memory:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        output = forward()
        with torch.profiler.record_function("visadapt::forward_done"):
            pass
        backward(output)
    events = profiler.profiler.kineto_results.events()
    mark = next(event.start_ns() for event in events if event.name() == "visadapt::forward_done")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = held = 0
    for when, size in changes:
        live += size
        peak = max(peak, live)
        held = live if when <= mark else held
    return Memory(peak, held)


def state_bytes(model: nn.Module, base: Iterable[Tensor]) -> int:
    """Bytes of parameters and buffers that ``model`` has and the frozen base has not."""
    own = {t.untyped_storage().data_ptr() for t in base}
    extra = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(size for pointer, size in extra.items() if pointer not in own)
