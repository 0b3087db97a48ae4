"""What a method is: one of four contracts, stated once. Everything else is derived.

    Adapter                 hyper-parameters = annotated fields; build(layer)
     ├─ FeatureMap          y' = f(x, y)       states forward(x, y, layer)
     └─ WeightMap           W' = f(W)          states new_weight(weight)
         └─ Delta           W' = W + ΔW        states delta()
             └─ LowRank     ΔW = up · down     states factors()

A method never sees the kind of its layer. It sees a `Site` (core/site.py): a linear map from
`in_shape` to `width` outputs with a canonical weight (width, *in_shape), which may be a whole
Linear, Conv1d/2d/3d or ConvTranspose, or some rows of one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, dataclass_transform, get_type_hints
from weakref import ref

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from visadapt.core.site import Site

Shared = TypeVar("Shared", bound=Tensor)
# The state of one value per element that an optimiser keeps of a parameter, as views by name; empty before a step.
Moments = Callable[[nn.Parameter], dict[str, Tensor]]


class _Moved:
    """What the last call of `.to` and the like, known by the function that it applies, has made of buffers."""

    by: ClassVar[Any] = None
    made: ClassVar[dict[int, tuple[ref[Tensor], ref[Tensor]]]] = {}  # id → before, after


@dataclass_transform(eq_default=False, kw_only_default=True)
class Adapter(nn.Module):
    """A change of one layer, with hyper-parameters as annotated fields.

    `Method(rank=8)` is a prototype: plain data, no tensors. Grafting clones it for each layer
    and calls `build(site)`, which creates the tensors. Subclasses become dataclasses by
    themselves; annotate hyper-parameters only (they must be plain data), never tensors.

    Class attributes that a method may set:
        no_decay: names of its tensors that weight decay would harm (magnitudes, gains, biases).
        first_token: `begin_task` and `end_task` look at the first token of each sample alone.
        training_state: names of buffers that a run needs to go on, and an adapter file does not.
        exact_base: its tensors mean something beside the very values of W alone, not beside those of a bf16 copy.
        takes_turns: `before_step` says which of its tensors train, so that some have no gradient; DDP has to know.

    Attributes set by the host, unknown to the mathematics:
        name: the set that the adapter belongs to.
        param: the parameter of the host that it adapts.
        view: whether it acts where that parameter is read, not where the host is called.
        rows: the output rows it owns, or None for all.
        strength: 0 leaves the base, 1 applies the method; the host interpolates.
        depth: from 0 in the first block of its set to 1 in the last one.
    """

    no_decay: ClassVar[tuple[str, ...]] = ()
    first_token: ClassVar[bool] = False
    training_state: ClassVar[tuple[str, ...]] = ()
    exact_base: ClassVar[bool] = False
    takes_turns: ClassVar[bool] = False

    # Annotations of this class are not fields: only subclasses become dataclasses.
    _pool: dict[str, Tensor]
    name: str
    param: str
    view: bool
    rows: tuple[int, int] | None
    strength: float
    depth: float

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(eq=False, repr=False, kw_only=True)(cls)
        # Configurations are checked against the types of the constructor; as strings they pass unread.
        hints = get_type_hints(cls.__init__, vars(sys.modules[cls.__module__]))
        for f in fields(cls):  # type: ignore[arg-type]
            f.type = cls.__init__.__annotations__[f.name] = hints[f.name]

    def __new__(cls, *args: Any, **kwargs: Any) -> Adapter:  # noqa: D102
        # nn.Module must be ready before the generated __init__ assigns the first field.
        self = object.__new__(cls)
        nn.Module.__init__(self)
        self.name = "default"
        self.param = "weight"
        self.view = False
        self.rows = None
        self.strength = 1.0
        self.depth = 0.5
        return self

    # --- stated by methods -------------------------------------------------------------
    def build(self, layer: Site) -> None:
        """Create the tensors for one site. Reads `layer.weight` if the method starts from it."""

    def refuse(self, layer: Site) -> str | None:
        """Why this method cannot adapt that site, and what to do instead; None if it can."""
        return None

    def refuse_merge(self, layer: Site) -> str | None:
        """Why the adapted site has no plain weight; None if it has one."""
        return None

    def before_step(self, step: int, total: int | None) -> None:
        """Called before the forward passes of an optimiser step (from 0) of so many; None if the end is not known."""

    def after_backward(self) -> None:
        """Called when all gradients of a step are there, before the optimiser uses them."""

    def after_step(self) -> None:
        """Called after the optimiser has stepped."""

    @classmethod
    def after_step_together(cls, members: Sequence[Any], moments: Moments) -> None:
        """Called after `after_step`, once for all adapters of a set: what they decide in common, as a budget of ranks.

        Args:
            members: the adapters of the set that are of this class, in model order.
            moments: gives what the optimiser keeps of a parameter.
        """

    def draw(self, number: int | None) -> None:
        """Take the random form of that number, for an ensemble in evaluation; None for the mean of them."""

    def penalty(self) -> Tensor | None:
        """A scalar to add to the loss, or None."""
        return None

    def next_task(self) -> None:
        """Called between two tasks of a sequence: keep what was learned, make room for the next."""

    @property
    def awaits_gradient(self) -> bool:
        """Whether `calibrate` is still to come; what it makes may have been loaded instead."""
        return False

    def calibrate(self, gradient: Tensor) -> None:
        """Called before the first step, while `awaits_gradient`, with ∂L/∂W (width, *in_shape) over some batches."""

    def begin_task(self, gram: Tensor) -> None:
        """Called before a task trains, if overridden, with Σ x xᵀ of its inputs to the layer."""

    def end_task(self, gram: Tensor) -> None:
        """Called after a task has trained, if overridden, with Σ x xᵀ of its inputs to the layer as they are now."""

    # --- derived -----------------------------------------------------------------------
    def share(self, key: str, make: Callable[[], Shared]) -> Shared:
        """One tensor for all sites of a set: made by the first `build`, taken by the others; only within `build`."""
        if key not in self._pool:
            self._pool[key] = make()
        return self._pool[key]  # type: ignore[return-value]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Torch moves parameters in place, but makes a new tensor of a buffer for each module that has it: buffers that
        # the sites of a set share would part on the way to a GPU, and a model with 48 of them hold 48 copies.
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        if _Moved.by is not fn:
            _Moved.by, _Moved.made = fn, {}
        for name, buffer in before.items():
            known, after = _Moved.made.get(id(buffer), (None, None))
            if known and after and known() is buffer and after() is not None:
                self._buffers[name] = after()
            else:
                _Moved.made[id(buffer)] = ref(buffer), ref(self._buffers[name])  # type: ignore[arg-type]
        return self

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of the hyper-parameters, in order."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]

    def hparams(self) -> dict[str, Any]:
        """The hyper-parameters as plain data; `type(m)(**m.hparams())` is a fresh prototype."""
        return {name: getattr(self, name) for name in self.field_names()}

    def clone(self, **overrides: Any) -> Adapter:
        """A fresh prototype with some hyper-parameters replaced.

        Raises:
            TypeError: an override is not a hyper-parameter of the method.
        """
        unknown = sorted(set(overrides) - set(self.field_names()))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no hyper-parameter {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(self.field_names()) or 'none'}"
            )
        return type(self)(**{**self.hparams(), **overrides})

    def extra_repr(self) -> str:
        """The hyper-parameters, for `print(model)`."""
        return ", ".join(f"{k}={v!r}" for k, v in self.hparams().items())


class FeatureMap(Adapter):
    """y' = f(x, y): a function of the layer's input and output, states `forward`.

    `affine = True` promises that f is affine in (x, y) jointly and acts on each position alone,
    so that a merged weight can be derived: f is applied to the layer seen as a matrix.
    """

    affine: ClassVar[bool] = False

    def forward(self, x: Tensor, y: Tensor, layer: Site) -> Tensor:
        """The new output, from the layer's input x and its output y so far."""
        raise NotImplementedError(f"{type(self).__name__} must state forward(x, y, layer)")

    def refuse_merge(self, layer: Site) -> str | None:
        """Only affine maps have a weight."""
        if self.affine:
            return None
        return f"{type(self).__name__} is not affine, so no weight equals it; keep it as an adapter"


class WeightMap(Adapter):
    """W' = f(W): a function of the canonical weight (width, fan_in, *kernel), states `new_weight`.

    Where W' = gain ⊙ (W + up · down), a method may state `scaled_factors` beside it: the same
    weight, applied without forming it. The contract grid compares the two.
    """

    def new_weight(self, weight: Tensor) -> Tensor:
        """The new weight, same shape as the old one."""
        raise NotImplementedError(f"{type(self).__name__} must state new_weight(weight)")

    def scaled_factors(self, layer: Site) -> tuple[Tensor, Tensor, Tensor] | None:
        """Down (r, fan_in, *kernel), up (width, r) and gain (width,), or None if there is no such form."""
        return None

    def turn(self, x: Tensor, layer: Site) -> Tensor | None:
        """The input x' with W' x = W x', where that is cheaper than forming W'; None, the rule, means it is not."""
        return None


class Delta(WeightMap):
    """W' = W + ΔW, states `delta`."""

    def delta(self) -> Tensor:
        """ΔW (width, fan_in, *kernel)."""
        raise NotImplementedError(f"{type(self).__name__} must state delta()")

    def new_weight(self, weight: Tensor) -> Tensor:
        """W + ΔW."""
        return weight + self.delta().to(weight.dtype)


class LowRank(Delta):
    """ΔW = up · down, states `factors`.

    The forward pass is y + up·(down ∗ x): ΔW is never formed (core/linear_op.py).

    Args:
        rank: inner dimension of the update.
    """

    rank: int = 8

    @property
    def fusable(self) -> bool:
        """Whether `side` is nothing but the two factors, so that the fused operation may do it."""
        return type(self).side is LowRank.side

    def factors(self) -> tuple[Tensor, Tensor]:
        """Down (r, fan_in, *kernel) and up (width, r), every scale folded in."""
        raise NotImplementedError(f"{type(self).__name__} must state factors()")

    def chain(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The same ΔW as inner (q, fan_in), kernel (r, q, *kernel) and up (width, r), where three steps are cheaper.

        None, the rule, means `factors`; stated by Tucker cores on convolutions.
        """
        return None

    def side(self, x: Tensor, layer: Site) -> Tensor:
        """ΔW ∗ x. Overridden only where neither factors nor a chain give it (dropout, large ranks)."""
        chain = self.chain()
        if chain is None:
            return layer.low_rank(x, *self.factors())
        inner, kernel, up = chain
        return layer.pointwise(layer.op(layer.pointwise(x, inner), kernel), up)

    def components(self, rank: int | None) -> tuple[Tensor, Tensor]:
        """Down and up of the `rank` components that matter most; None leaves out only those that do nothing.

        Raises:
            ValueError: the components of the method have no order.
        """
        raise ValueError(
            f"{type(self).__name__} does not order its components; use `visadapt export --rank` or `visadapt compose "
            "--how svd --rank`, which take the nearest update of a rank"
        )

    def onto(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """W x + b + strength · ΔW x of a frozen Linear in one operation; None, the rule, means that `side` is added."""
        return None

    def delta(self) -> Tensor:
        """Up · down, as a dense tensor (merge and weight views only)."""
        down, up = self.factors()
        return (up @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


# --- initial values: fp32 on the layer's device, so that adapters train in fp32 on any base ----
def zeros(layer: Site, *shape: int) -> nn.Parameter:
    """A trainable tensor of zeros."""
    return nn.Parameter(torch.zeros(shape, device=layer.device, dtype=layer.dtype))


def ones(layer: Site, *shape: int) -> nn.Parameter:
    """A trainable tensor of ones."""
    return nn.Parameter(torch.ones(shape, device=layer.device, dtype=layer.dtype))


def kaiming(layer: Site, *shape: int, a: float = 5**0.5) -> nn.Parameter:
    """U(±√(6 / ((1 + a²)·fan_in))), fan_in = prod(shape[1:]); a = √5 gives LoRA's U(±1/√fan_in)."""
    empty = torch.empty(shape, device=layer.device, dtype=layer.dtype)
    return nn.Parameter(nn.init.kaiming_uniform_(empty, a=a))


def normal(layer: Site, *shape: int, std: float = 1.0) -> nn.Parameter:
    """N(0, std²)."""
    return nn.Parameter(torch.randn(shape, device=layer.device, dtype=layer.dtype) * std)
