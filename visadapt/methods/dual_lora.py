"""DualLoRA: an orthogonal and a residual adapter for each task."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from visadapt.core.adapter import FeatureMap, kaiming, zeros
from visadapt.core.site import Site
from visadapt.maths.directions import missing


class DualLoRA(FeatureMap):
    """y' = y + Σ_k≤t B_k A_k x + Σ_k≤t w_k(h) C_k Ψ_kᵀ x,  w_k(h) = ‖Ψ_kᵀ h‖² / ‖h‖², A_t M = 0.

    The columns of Ψ_t are the main directions of a task's class tokens h (the first of a sample's tokens; the mean of
    those of a map or window, which has none) that no earlier task has; C_t is trained on
    them alone, and acts on a sample as far as its class token lies in them. The orthogonal part B A is kept off M, the
    space of all earlier Ψ, after every step. Both are zero at start.

    Chen et al. 2024, arXiv 2411.00623; no official code is known. Its exact equations were not at hand: this follows
    its description, and leaves out the calibration of scores by a predicted task. Without a sequence that tells it
    inputs, Ψ is random. It depends on the sample, so no weight equals it.

    Args:
        rank: inner dimension of the orthogonal part of each task.
        bases: columns of Ψ at most.
        tasks: how many tasks the sequence has at most.
        done: how many of them are finished.
        first: share of the energy of the class tokens that M and Ψ hold in the first task.
        last: in the last one; in between it rises evenly.
    """

    first_token: ClassVar[bool] = True
    training_state = ("memory",)

    rank: int = 8
    bases: int = 16
    tasks: int = 10
    done: int = 0
    first: float = 0.95
    last: float = 0.99

    def refuse(self, layer: Site) -> str | None:
        """Inputs are vectors, one of them a class token."""
        if not isinstance(layer.layer, nn.Linear):
            return "its directions are those of token vectors, which convolutions do not have; use Linear layers"
        return None

    def build(self, layer: Site) -> None:
        """Create both parts, and room for those of all tasks."""
        (fan_in,), past, width = layer.in_shape, self.tasks - 1, layer.width
        count = min(self.bases, fan_in)
        self.down: nn.Parameter = kaiming(layer, self.rank, fan_in)
        self.up: nn.Parameter = zeros(layer, width, self.rank)
        self.up_residual: nn.Parameter = zeros(layer, width, count)
        self.past_down: Tensor
        self.past_up: Tensor
        self.past_residual: Tensor
        self.basis: Tensor
        self.memory: Tensor
        self.register_buffer("past_down", zeros(layer, past * self.rank, fan_in).data)
        self.register_buffer("past_up", zeros(layer, width, past * self.rank).data)
        self.register_buffer("past_residual", zeros(layer, width, past * count).data)
        self.register_buffer("basis", zeros(layer, fan_in, self.tasks * count).data)
        self.register_buffer("memory", zeros(layer, fan_in, fan_in).data)
        self.basis[:, :count] = torch.linalg.qr(torch.randn(fan_in, count))[0].to(self.basis)

    def forward(self, x: Tensor, y: Tensor, layer: Site) -> Tensor:
        """The output with both parts."""
        past, count = self.done * self.rank, self.up_residual.shape[1]
        down = torch.cat([self.past_down[:past], self.down])
        up = torch.cat([self.past_up[:, :past], self.up], 1)
        y = y + layer.low_rank(x, down, up)
        residual = torch.cat([self.past_residual[:, : self.done * count], self.up_residual], 1)
        found = x @ self.basis[:, : (self.done + 1) * count].to(x.dtype)
        with torch.no_grad():
            token, z = (_token(tensor) for tensor in (x, found))
            exact = torch.promote_types(x.dtype, torch.float32)
            size = token.to(exact).square().sum(-1, keepdim=True).clamp_min(1e-12)
            weight = z.to(exact).square().unflatten(-1, (-1, count)).sum(-1) / size
            weight = weight.repeat_interleave(count, -1).to(x.dtype).view(len(x), *[1] * (x.dim() - 2), -1)
        return y + layer.pointwise(found * weight, residual)

    @torch.no_grad()
    def begin_task(self, gram: Tensor) -> None:
        """Ψ of the task: what its class tokens have beside M, as much as the share asks for."""
        count, place = self.up_residual.shape[1], self.done * self.up_residual.shape[1]
        share = self.first + (self.last - self.first) * self.done / max(1, self.tasks - 1)
        found = missing(gram, self.memory, share)[:, :count]
        self.basis[:, place : place + count] = 0
        self.basis[:, place : place + found.shape[1]] = found.to(self.basis)
        self.after_step()

    @torch.no_grad()
    def after_step(self) -> None:
        """A off M."""
        self.down.sub_(self.down @ self.memory)

    @torch.no_grad()
    def next_task(self) -> None:
        """Keep both parts, add Ψ to M, and start the next task's at zero."""
        if self.done + 1 >= self.tasks:
            raise ValueError(f"DualLoRA has room for tasks={self.tasks}; give it more")
        rows, count = slice(self.done * self.rank, (self.done + 1) * self.rank), self.up_residual.shape[1]
        self.past_down[rows], self.past_up[:, rows] = self.down, self.up
        columns = slice(self.done * count, (self.done + 1) * count)
        self.past_residual[:, columns] = self.up_residual
        self.memory += self.basis[:, columns] @ self.basis[:, columns].t()
        self.done += 1
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        for tensor in (self.up, self.up_residual):
            tensor.zero_()


def _token(x: Tensor) -> Tensor:
    """What stands for a sample (B, C): itself, its first token, or the mean of a map."""
    return x if x.dim() < 3 else x[:, 0] if x.dim() == 3 else x.flatten(1, -2).mean(1)
