"""Stops a run that cannot learn: adapters that no gradient reaches, a loss or a tensor that is not finite."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from visadapt.core.model import adapters


class CheckReached(L.Callback):
    """Checks the first gradients, every loss, and every ``every_n_steps`` steps all trained tensors.

    A bypassed layer (code that reads its weight or calls another copy of it) trains on silently otherwise,
    with a loss that falls thanks to the head. A loss is checked before its backward pass, so the weights are
    still good.

    Args:
        every_n_steps: Optimiser steps between two checks of the tensors; 0 leaves them out.
        unused: Names of sets that may have no gradient in the first step, because the task alternates sets.
    """

    def __init__(self, every_n_steps: int = 50, unused: tuple[str, ...] = ()) -> None:
        self.every_n_steps = every_n_steps
        self.unused = unused
        self._reached = False
        self._checked = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the first step of every run, resumed ones too."""
        self._reached, self._checked = False, trainer.global_step

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Check the loss.

        Raises:
            FloatingPointError: it is not finite.
        """
        if not torch.isfinite(loss.detach()).all():
            raise FloatingPointError(
                f"the loss is {loss.detach().mean().item()} at step {trainer.global_step}. Lower the "
                "learning rate, clip gradients (trainer.gradient_clip_val), or look for corrupt samples."
            )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Check that the first step has a gradient for every adapter tensor.

        Raises:
            RuntimeError: some have none; names their layers.
        """
        if self._reached:
            return
        self._reached = True
        unreached = [
            path
            for path, adapter in adapters(pl_module).items()
            if adapter.name not in self.unused and any(p.requires_grad and p.grad is None for p in adapter.parameters())
        ]
        if unreached:
            layers = [path.partition(".adapters.")[0].removeprefix("model.") for path in unreached]
            more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
            raise RuntimeError(
                f"no gradient reached the adapters of {', '.join(layers[:4])}{more}: the model does not call "
                "these layers in training. Choose other targets, exclude them, or target the weight that it "
                "reads instead (for instance 'attn.in_proj_weight')."
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the trained tensors now and then, before a checkpoint is written.

        Raises:
            FloatingPointError: one is not finite; names it.
        """
        step = trainer.global_step
        if step != self._checked and self.every_n_steps and (step % self.every_n_steps == 0 or step == 1):
            self._checked = step
            check_finite(pl_module, step)


def check_finite(module: torch.nn.Module, step: int) -> None:
    """Look at every trained tensor at the price of one norm each and a single transfer.

    Raises:
        FloatingPointError: one is not finite; names it.
    """
    named = [(name, _local(p.detach())) for name, p in module.named_parameters() if p.requires_grad]
    named = [(name, tensor) for name, tensor in named if tensor.numel()]  # a shard may be empty
    if not named:
        return
    norms = torch._foreach_norm([p for _, p in named], float("inf"))
    finite = torch.stack([torch.isfinite(n) for n in norms]).tolist()
    wrong = [name.removeprefix("model.") for (name, _), good in zip(named, finite) if not good]
    if wrong:
        raise FloatingPointError(
            f"{', '.join(wrong[:4])} {'is' if len(wrong) == 1 else 'are'} not finite after step {step} "
            f"({len(wrong)} of {len(named)} tensors). Lower the learning rate or clip gradients; "
            "resume from the last checkpoint."
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
