"""Low-rank updates that grow with a sequence of tasks: the factors of finished tasks stay beside those that train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visadapt.core.adapter import LowRank, kaiming, zeros
from visadapt.core.site import Site


class TaskStack(LowRank):
    """ΔW = Σ_k<done up_k · down_k + up · down, as one low-rank update of rank Σ r_k.

    `down` (rank, in, *kernel) and `up` (out, rank) are the same two tensors in every task: `next_task` copies them to
    the buffers `past_down` and `past_up`, which have room for all tasks from the beginning, and starts them anew. So
    optimisers, processes and files see the same tensors throughout.

    Args:
        tasks: how many tasks the sequence has at most.
        done: how many of them are finished.
    """

    tasks: int = 10
    done: int = 0

    def build(self, layer: Site) -> None:
        """Create the factors that train, and room for those of the other tasks."""
        if not 0 <= self.done < self.tasks:
            raise ValueError(f"{type(self).__name__}: done={self.done} of tasks={self.tasks}; one task is under way")
        self.down: nn.Parameter = kaiming(layer, self.rank, *layer.in_shape)
        self.up: nn.Parameter = zeros(layer, layer.width, self.rank)
        past = (self.tasks - 1) * self.rank
        self.past_down: Tensor
        self.past_up: Tensor
        self.register_buffer("past_down", zeros(layer, past, *layer.in_shape).data)
        self.register_buffer("past_up", zeros(layer, layer.width, past).data)
        self.only: int | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """All tasks so far, or the one that `only` names."""
        pairs = [self.pair(k) for k in (range(self.done + 1) if self.only is None else [min(self.only, self.done)])]
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], 1)

    def pair(self, task: int) -> tuple[Tensor, Tensor]:
        """Down and up of a task, every scale folded in."""
        if task == self.done:
            return self.down, self.up
        part = slice(task * self.rank, (task + 1) * self.rank)
        return self.past_down[part], self.past_up[:, part]

    @torch.no_grad()
    def next_task(self) -> None:
        """Keep the factors of the task that ends; start those of the next, with an update of zero.

        Raises:
            ValueError: there is no room for another task.
        """
        if self.done + 1 >= self.tasks:
            raise ValueError(f"{type(self).__name__} has room for tasks={self.tasks}; give it more")
        self.store(*self.pair(self.done))
        self.done += 1
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.up.zero_()

    def store(self, down: Tensor, up: Tensor) -> None:
        """Write the factors of the present task to its place among the past ones; a smaller rank leaves zeros."""
        start = self.done * self.rank
        self.past_down[start : start + len(down)] = down
        self.past_up[:, start : start + len(down)] = up
