"""What goes on where it was interrupted: a training loop (cosine schedule, averaged weights), files made once."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KEEP = 250  # steps between two states on disk


@dataclass(frozen=True)
class Plan:
    """How a stage is trained.

    Attributes:
        name: Names the state, ``<name>.pt``.
        steps: Steps in all.
        rate: Largest learning rate of a cosine that starts with 100 steps of warm-up and ends at 2 %.
        average: Largest decay of the averaged weights.
    """

    name: str
    steps: int
    rate: float
    average: float = 0.999

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)


def quick() -> torch.autocast:
    """Autocast to bfloat16 where the processor has it; AVX2 alone emulates it, ten times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability() != "AVX2")


def once(file: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; made and written if there is none."""
    if not file.exists():
        torch.save(make(), file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)
    return torch.load(file, weights_only=True)


def train(
    plan: Plan,
    folder: Path,
    network: nn.Module,
    loss: Callable[[int], Tensor],
    watch: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Train all steps, or those that are left.

    Args:
        plan: Steps and rates.
        folder: Where the state is kept, replaced every 250 steps.
        network: What is trained, in place.
        loss: Number of the step → loss. Its random numbers must depend on that number alone; torch's are seeded here.
        watch: Is called with the step and the averaged network every 1,000 steps.

    Returns:
        The network with averaged weights, for evaluation.
    """
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.99))
    averaged = copy.deepcopy(network)
    state, start = folder / f"{plan.name}.pt", 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        network.load_state_dict(kept["network"]), averaged.load_state_dict(kept["averaged"])
        optimizer.load_state_dict(kept["optimizer"])
        start = kept["step"]
    began, seen = time.perf_counter(), 0.0
    for step in range(start, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step)
        torch.manual_seed(step)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        _follow(averaged, network, min(plan.average, (step + 1) / (step + 20)))
        seen = value.item() if step == start else 0.98 * seen + 0.02 * value.item()
        if step % 50 == 0 or step == plan.steps - 1:
            speed = (step - start + 1) / (time.perf_counter() - began)
            print(f"{plan.name}: step {step} of {plan.steps}, loss {seen:.4f}, {speed:.2f} it/s", flush=True)
        if step % KEEP == KEEP - 1 or step == plan.steps - 1:
            kept = {"network": network.state_dict(), "averaged": averaged.state_dict(), "step": step + 1}
            torch.save(kept | {"optimizer": optimizer.state_dict()}, state.with_suffix(".tmp"))
            os.replace(state.with_suffix(".tmp"), state)
        if watch is not None and (step % 1000 == 999 or step == plan.steps - 1):
            watch(step + 1, averaged)
    return averaged.eval().requires_grad_(False)


@torch.no_grad()
def _follow(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    for mean, tensor in zip(averaged.state_dict().values(), network.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(tensor, 1 - decay)
        else:
            mean.copy_(tensor)
