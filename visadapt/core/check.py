"""The contract of every method on every layer kind, as properties that either hold, are refused, or fail.

`run` works on any methods, so that users can check their own: `visadapt check --methods my.Method`.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from visadapt.core import ops
from visadapt.core.adapter import Adapter, LowRank, WeightMap, kaiming, zeros
from visadapt.core.calibrate import calibrate
from visadapt.core.layer import Grafted, _fold_weight
from visadapt.core.model import adapt, adapters, merge, merged, remove, strength
from visadapt.core.site import Site, stored
from visadapt.core.state import load_native, save
from visadapt.core.train import after_backward, after_step, before_step, parameter_groups, penalty

Status = Literal["pass", "refuse", "fail"]


@dataclass(frozen=True)
class Cell:
    """One method on one layer kind, one property."""

    method: str
    host: str
    prop: str
    status: Status
    message: str = ""


@dataclass(frozen=True)
class Host:
    """A layer kind with options: how to make it, its input, and the target on it."""

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    target: str = "0"


HOSTS: dict[str, Host] = {
    "Linear": Host(lambda: nn.Linear(6, 9), (2, 5, 6)),
    "Linear no bias": Host(lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "Linear rows": Host(lambda: nn.Linear(6, 12), (2, 5, 6), "0:v"),
    "Conv1d stride": Host(lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    "Conv2d": Host(lambda: nn.Conv2d(6, 9, 3, padding=1), (2, 6, 7, 5)),
    "Conv2d 1×1": Host(lambda: nn.Conv2d(6, 8, 1, bias=False), (2, 6, 5, 4)),
    "Conv2d reflect": Host(lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, padding_mode="reflect"), (2, 6, 7, 6)),
    "Conv2d circular": Host(lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 5, 6)),
    "Conv2d dilated 3×2": Host(lambda: nn.Conv2d(6, 8, (3, 2), dilation=2, padding="same"), (2, 6, 8, 7)),
    "Conv2d rows": Host(lambda: nn.Conv2d(6, 8, 3), (2, 6, 6, 6), "0:1/2"),
    "Conv2d groups": Host(lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 5, 5)),
    "Conv2d depthwise": Host(lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 5, 5)),
    "Conv3d 3×1×1": Host(lambda: nn.Conv3d(6, 8, (3, 1, 1), padding=(1, 0, 0)), (2, 6, 4, 3, 3)),
    "ConvTranspose2d": Host(lambda: nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1), (2, 6, 4, 5)),
    "ConvTranspose2d groups": Host(lambda: nn.ConvTranspose2d(6, 9, 3, stride=2, groups=3), (2, 6, 4, 4)),
    "Linear weight view": Host(lambda: _ReadsWeight(), (2, 5, 6), "0.linear.weight"),
    "MultiheadAttention": Host(lambda: _Attends(), (2, 5, 6), "0.attention.in_proj_weight:q"),
}


class _ReadsWeight(nn.Module):
    # As timm's BEiT and EVA do: the layer is never called.
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear.weight, self.linear.bias)


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class _Probe(LowRank):
    # A second adapter for "several adapters on one layer"; fixed, so that rows of the grid are comparable.
    rank: int = 2

    def build(self, layer: Site) -> None:
        self.down, self.up = kaiming(layer, self.rank, *layer.in_shape), zeros(layer, layer.width, self.rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up


class _Case:
    """A fresh host with the method on it, in float64 and from fixed seeds."""

    def __init__(self, host: Host, method: Adapter) -> None:
        self.host, self.method = host, method
        torch.manual_seed(0)
        self.base = nn.Sequential(host.layer()).double().requires_grad_(False)
        self.x = torch.randn(host.shape, dtype=torch.float64)
        self.plain = self.base(self.x).detach()

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def adapted(self, moved: bool = False) -> nn.Module:
        torch.manual_seed(1)
        model = adapt(self.fresh(), self.method.clone(), self.host.target)
        return move(model) if moved else model


def move(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Shift every trainable tensor by noise, so that nothing is at its start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    """Equal relative to the size of b.

    Raises:
        AssertionError: with the relative error.
    """
    error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
    assert error <= tolerance, f"relative error {error:.1e}"


def _identity(case: _Case) -> None:
    close(case.adapted()(case.x), case.plain)


def _effect(case: _Case) -> None:
    model = case.adapted()
    _train(model, case.x, steps=1, lr=0.5, optimizer=torch.optim.SGD)
    assert not torch.equal(model(case.x), case.plain), "one step changes nothing: a dead start"


def _gradients(case: _Case) -> None:
    model = case.adapted(moved=True)
    (model(case.x).square().sum() + penalty(model)).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    declared = {f"{path}.{n}" for path, a in adapters(model).items() for n, _ in a.named_parameters()}
    assert set(trained) == declared, f"not trained: {sorted(declared ^ set(trained))}"
    for name, parameter in trained.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert parameter.grad.any(), f"the gradient of {name} is zero away from the start"
    grouped = [id(p) for g in parameter_groups(model, 1e-3, 0.1) for p in g["params"]]
    assert sorted(grouped) == sorted(map(id, trained.values())), "not every tensor is in exactly one optimiser group"


def _fast_form(case: _Case) -> None:
    """Output and all gradients of the form that runs equal those through the stated new weight."""
    model = case.adapted(moved=True)
    if not all(isinstance(a, WeightMap) for a in adapters(model).values()):
        return  # FeatureMaps have one form only
    layer = next(m for m in model.modules() if isinstance(m, Grafted))
    x = case.x.clone().requires_grad_()
    y = model(x)
    sources = [x, *(p for p in model.parameters() if p.requires_grad)]
    torch.manual_seed(3)
    cotangent = torch.randn_like(y)
    fast = torch.autograd.grad(y, sources, cotangent)
    dense_y = _through_weight(model, layer, x)
    dense = torch.autograd.grad(dense_y, sources, cotangent)
    close(y, dense_y)
    for a, b in zip(fast, dense):
        close(a, b, 1e-8)


def _through_weight(model: nn.Module, layer: Grafted, x: Tensor) -> Tensor:
    if layer._views:
        return model(x)  # a view is the stated weight already
    weight = _fold_weight(layer.active("weight"), ops.canonical(layer, stored(layer, "weight")))
    return ops.apply(layer, x, ops.native(layer, weight), layer.bias)  # type: ignore[arg-type]


def _merge(case: _Case) -> None:
    for value in (1.0, 0.6):
        model = case.adapted(moved=True)
        strength(model, value)
        before = model(case.x).detach()
        assert not torch.equal(before, case.plain), "the adapter has no effect"
        merge(model)
        assert not any(isinstance(m, Grafted) for m in model.modules())
        close(model(case.x), before)
        bias_gained = set(model.state_dict()) - set(case.base.state_dict())
        assert all(k.endswith("bias") for k in bias_gained), f"new keys {bias_gained}"


def _restore(case: _Case) -> None:
    model = case.adapted(moved=True)
    before = model(case.x)
    with suppress(ValueError), merged(model):  # refusals are the business of "merge"
        pass
    assert torch.equal(model(case.x), before), "`merged` did not restore the adapters"
    strength(model, 0.0)
    assert torch.equal(model(case.x), case.plain), "strength 0 is not the base, bit for bit"
    remove(model)
    assert torch.equal(model(case.x), case.plain), "`remove` did not restore the base"
    assert [type(m) for m in model.modules()] == [type(m) for m in case.base.modules()]


def _save(case: _Case) -> None:
    model = case.adapted(moved=True)
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "adapter.safetensors")
        torch.manual_seed(7)
        again = load_native(case.fresh(), path, strict=True)
    assert torch.equal(again(case.x), model(case.x)), "the loaded adapter gives another output"


def _base_untouched(case: _Case) -> None:
    model = case.adapted()
    _train(model, case.x, steps=3, lr=0.05, optimizer=torch.optim.AdamW)
    assert not torch.equal(model(case.x), case.plain), "training had no effect"
    remove(model)
    for (name, a), b in zip(model.state_dict().items(), case.base.state_dict().values()):
        assert torch.equal(a, b), f"{name} changed"


def _copies(case: _Case) -> None:
    model = case.adapted(moved=True)
    y = model(case.x).detach()
    assert torch.equal(copy.deepcopy(model)(case.x), y), "deepcopy differs"
    assert torch.equal(pickle.loads(pickle.dumps(model))(case.x), y), "pickle differs"


def _autocast(case: _Case) -> None:
    model, x = case.adapted(moved=True).float(), case.x.float().requires_grad_()
    exact = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16, f"autocast gave {y.dtype}"
    close(y.float(), exact, 0.1)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} has no gradient"
            assert p.grad.isfinite().all(), f"the gradient of {name} is not finite"
            assert p.grad.dtype == p.dtype, f"the gradient of {name} is {p.grad.dtype}"


def _several(case: _Case) -> None:
    for first in (True, False):
        model = case.fresh()
        torch.manual_seed(1)
        if not first:
            adapt(model, _Probe(), case.host.target, "probe")
        adapt(model, case.method.clone(), case.host.target, "one", freeze=first)
        if first:
            adapt(model, _Probe(), case.host.target, "probe")
        move(model)
        both = model(case.x).detach()
        strength(model, one=0.0)
        assert not torch.equal(model(case.x), both), "the second adapter hides the first"
        strength(model, one=0.4)
        before = model(case.x).detach()
        close(merge(model)(case.x), before)


def _training(case: _Case) -> None:
    # Where a few values scale large components (LoLDU), the first step of the larger rate goes past the minimum.
    for lr in (0.02, 0.002):
        losses = _train(case.adapted(), case.x, steps=12, lr=lr, optimizer=torch.optim.AdamW)
        if losses[-1] < losses[0]:
            return
    raise AssertionError(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


def _train(model: nn.Module, x: Tensor, steps: int, lr: float, optimizer: type[torch.optim.Optimizer]) -> list[float]:
    torch.manual_seed(4)
    target = model(x).detach() + torch.randn_like(model(x))
    calibrate(model, ((model(x) - target).square().mean() for _ in range(1)))
    steps_of = optimizer(parameter_groups(model, lr, 0.1))  # type: ignore[call-arg]
    losses = []
    for step in range(steps):
        before_step(model, step, steps)
        loss = (model(x) - target).square().mean() + penalty(model)
        steps_of.zero_grad()
        loss.backward()
        after_backward(model)
        steps_of.step()
        after_step(model)
        losses.append(loss.item())
    return losses


PROPERTIES: dict[str, Callable[[_Case], None]] = {
    "identity at start": _identity,
    "effect after a step": _effect,
    "gradients and groups": _gradients,
    "fast form": _fast_form,
    "merge": _merge,
    "base restored": _restore,
    "save and load": _save,
    "base untouched": _base_untouched,
    "copy and pickle": _copies,
    "bf16 autocast": _autocast,
    "several adapters": _several,
    "training": _training,
}


def check(method: Adapter, host: str, prop: str) -> Cell:
    """One cell: pass, or refuse (a ValueError with its reason), or fail."""
    name = type(method).__name__
    try:
        PROPERTIES[prop](_Case(HOSTS[host], method))
    except ValueError as error:
        return Cell(name, host, prop, "refuse", str(error))
    except Exception as error:  # anything else is a failure to report, not to raise
        return Cell(name, host, prop, "fail", f"{type(error).__name__}: {error}")
    return Cell(name, host, prop, "pass")


def run(
    methods: Mapping[str, type[Adapter]] | Iterable[Adapter],
    hosts: Iterable[str] = HOSTS,
    props: Iterable[str] = PROPERTIES,
) -> Iterator[Cell]:
    """The grid, cell by cell; the state of the global random generator is kept.

    Args:
        methods: classes by name (with their defaults) or prototypes.
        hosts: names in `HOSTS`.
        props: names in `PROPERTIES`.
    """
    prototypes = [cls() for cls in methods.values()] if isinstance(methods, Mapping) else list(methods)
    hosts, props = list(hosts), list(props)
    for method in prototypes:
        for host in hosts:
            for prop in props:
                with torch.random.fork_rng():
                    cell = check(method, host, prop)
                yield cell
