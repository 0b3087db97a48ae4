"""An exponential average of the trained tensors, evaluated and saved in place of the last step's."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

LIVE = "live_weights"


class AdapterEMA(L.Callback):
    """avg ← d·avg + (1 − d)·θ for all trained tensors θ, after each optimiser step.

    d = min(decay, (1 + t) / (10 + t)), where t counts steps from 1; the growing d keeps the starting values
    from dominating a short run. The frozen base is neither copied nor averaged. Validation sees the averages,
    the checkpoint's ``state_dict`` holds them (so test, predict and export need not know), ``live_weights``
    beside it lets training go on bit for bit, and the averages stay in the model when training ends.

    Args:
        decay: Limit of d; 0.999 averages over about the last 1,000 steps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay: 0 ≤ decay < 1, not {decay}")
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] | None = None  # the last step's, while averages are in the model
        self._trained: dict[str, nn.Parameter] = {}
        self._stepped = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from the weights at hand, unless a checkpoint brought averages."""
        self._stepped = trainer.global_step
        trained = self._trained = _trained(pl_module)
        if self._average.keys() != trained.keys():
            self._average = {name: p.detach().clone() for name, p in trained.items()}
        self._average = {name: average.to(trained[name].device) for name, average in self._average.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average once per optimiser step."""
        step = trainer.global_step
        if step == self._stepped:
            return
        self._stepped = step
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [_local(average) for average in self._average.values()]
        torch._foreach_lerp_(averages, [_local(self._trained[name]) for name in self._average], 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin the averages anew with the weights at hand, which are no longer those that they are of."""
        for name, average in self._average.items():
            average.copy_(self._trained[name])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the averages (within ``fit`` only: a loaded checkpoint has them already)."""
        if trainer.state.fn == "fit" and self._average:
            self._swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train on from the live weights."""
        self._swap_out(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the averages in the model."""
        self._swap_in(pl_module)
        self._live, self._average, self._trained = None, {}, {}

    @torch.no_grad()
    def _swap_in(self, pl_module: L.LightningModule) -> None:
        trained = _trained(pl_module)
        self._live = {name: p.detach().clone() for name, p in trained.items()}
        for name, average in self._average.items():
            trained[name].copy_(average)

    @torch.no_grad()
    def _swap_out(self, pl_module: L.LightningModule) -> None:
        if self._live is not None:
            trained = _trained(pl_module)
            for name, live in self._live.items():
                trained[name].copy_(live)
            self._live = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the averages in ``state_dict`` and the live weights beside it, also while they are swapped."""
        if not self._average:
            return
        live = self._live or {name: p.detach() for name, p in _trained(pl_module).items()}
        checkpoint[LIVE] = {name: _whole(tensor) for name, tensor in live.items()}
        state = checkpoint["state_dict"]
        averages = {name: _whole(average) for name, average in self._average.items()}
        state.update({name: tensor for name, tensor in averages.items() if name in state})

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """To train on, put the live weights into the model and keep the averages; to evaluate, do nothing."""
        if trainer.state.fn != "fit" or LIVE not in checkpoint:
            return
        live = checkpoint[LIVE]
        trained = _trained(pl_module)
        if live.keys() != trained.keys():
            raise ValueError(
                "the averaged weights in the checkpoint belong to other adapters or targets; "
                "use the config.yaml of the run that wrote it"
            )
        for name, parameter in trained.items():
            self._average[name] = parameter.detach().clone()  # restored from state_dict before callbacks are
            parameter.copy_(_like(live[name], parameter))


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # a forward pass alone leaves gathered parameters behind, and writes to those are lost
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _local(tensor: Tensor) -> Tensor:
    """This process' shard, or the whole of an ordinary tensor; shares memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _whole(tensor: Tensor) -> Tensor:
    """A copy of all of a possibly sharded tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor
