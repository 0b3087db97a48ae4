"""Several processes: FSDP2 for any backbone, one shard group per repeated block; DDP where tensors rest."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost repeated blocks: two or more of one class, with parameters, in a list or sequence."""
    for child in model.children():
        parts = list(child.children())
        repeated = (
            isinstance(child, nn.ModuleList | nn.Sequential)
            and len(parts) > 1
            and len({type(p) for p in parts}) == 1
            and all(next(p.parameters(), None) is not None for p in parts)
        )
        if repeated:
            yield from parts
        else:
            yield from blocks(child)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard ``model`` in place; frozen and trained parameters may share a group."""
    from torch.distributed.fsdp import fully_shard

    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def allow_rest(strategy: Strategy) -> None:
    """Let trained tensors have no gradient in some steps: DDP waits for each, unless it looks for those in use."""
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs["find_unused_parameters"] = True
