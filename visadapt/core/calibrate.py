"""The gradient of frozen weights, for methods that start from it: a few batches, one layer's gradient at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visadapt.core import ops
from visadapt.core.adapter import Adapter
from visadapt.core.layer import Grafted
from visadapt.core.model import adapters, grafted
from visadapt.core.site import Site, stored


def waiting(model: nn.Module) -> bool:
    """Whether an adapter waits for the gradient of its layer's weight."""
    return any(adapter.awaits_gradient for adapter in adapters(model).values())


def calibrate(model: nn.Module, losses: Iterable[Tensor]) -> None:
    """Give each adapter that waits for it ∂L/∂W of its site, summed over losses and processes.

        calibrate(model, (criterion(model(x), y) for x, y in first_batches))

    Where none waits, no loss is asked for. While they are computed the adapted weights alone have gradients. Each is
    added to a sum on the CPU, in float32 at least, and let go before backward comes to the next layer.

    Args:
        model: the adapted model, in the state in which it will train.
        losses: computed one after the other, when they are asked for (a generator, not a list).

    Raises:
        ValueError: no gradient reaches a layer, or one that is not finite; the model is sharded.
    """  # fmt: skip
    found: dict[nn.Parameter, list[tuple[str, Grafted, Adapter]]] = {}
    for path, layer in grafted(model):
        for adapter in layer.adapters.values():
            if adapter.awaits_gradient:  # type: ignore[union-attr]
                weight = stored(layer, adapter.param)  # type: ignore[arg-type]
                found.setdefault(weight, []).append((path, layer, adapter))  # type: ignore[arg-type]
    if not found:
        return
    with _sums(model, found) as sums:
        for loss in losses:
            if not loss.requires_grad:
                raise ValueError(
                    "calibrate: no gradient reaches the adapted layers from a loss; give a generator that computes "
                    "the losses with gradients, when they are asked for"
                )
            loss.backward()
    for weight, sites in found.items():
        total = _whole(sums.pop(weight, None), weight, sites[0][0])
        for _, layer, adapter in sites:
            canonical = ops.canonical(layer, total) if ops.is_linear_op(layer) else total
            adapter.calibrate(Site(layer, adapter.param, adapter.rows).cut(canonical))


@contextmanager
def _sums(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Sums of the gradients that the weights, and nothing else of the model, get inside."""
    sums: dict[nn.Parameter, Tensor] = {}

    def add(weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        gradient = gradient.detach().to("cpu", torch.promote_types(gradient.dtype, torch.float32))
        sums[weight] = sums[weight].add_(gradient) if weight in sums else gradient.clone()

    weights = list(weights)
    if any(hasattr(weight, "full_tensor") for weight in weights):
        raise ValueError("calibrate: the model is sharded over processes; use DDP, or calibrate and save before")
    before = [(p, p.requires_grad) for p in model.parameters()] + [(w, w.requires_grad) for w in weights]
    gradients = [(weight, weight.grad) for weight in weights]
    handles = []
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.grad = None
            handles.append(weight.requires_grad_(True).register_post_accumulate_grad_hook(add))
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for weight, held in gradients:
            weight.grad = held
        for parameter, trains in before:
            parameter.requires_grad_(trains)


def _whole(total: Tensor | None, weight: Tensor, path: str) -> Tensor:
    """The sum over all processes, on the layer's device."""
    total = torch.zeros_like(weight, device="cpu", dtype=torch.float32) if total is None else total
    total = total.to(weight.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    if not total.any() or not torch.isfinite(total).all():
        what = "is not finite" if total.any() else "is zero everywhere"
        raise ValueError(
            f"calibrate: the gradient of '{path}' {what}; choose layers that the loss depends on, and look for corrupt "
            "samples"
        )
    return total
