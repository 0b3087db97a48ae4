"""Accuracies over a sequence of tasks: after each task, on each task, and what is read from that matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class TaskAccuracy(Metric):
    """Share of right predictions on the samples of each task.

    Args:
        tasks: Number of tasks.
    """

    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(tasks, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(tasks, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, found: Tensor, target: Tensor, task: Tensor) -> None:
        """Add predicted classes (B,), true ones (B,) and the task (B,) that each sample belongs to."""
        self.right += torch.bincount(task[found == target], minlength=len(self.right))
        self.total += torch.bincount(task, minlength=len(self.total))

    def compute(self) -> Tensor:
        """Accuracies (tasks,) in 0 … 1; NaN for a task without samples."""
        return self.right / self.total


def summary(matrix: Tensor) -> dict[str, float]:
    """Figures of a matrix A (T, T), where A_ij is the accuracy on task j after task i, NaN for j > i.

    With T the last task that has a row:

    - "last accuracy": mean_j A_Tj;
    - "average accuracy": mean_i of mean_j≤i A_ij, that is over the whole way (also called anytime average accuracy);
    - "forgetting": mean_j<T of max_i<T A_ij − A_Tj (Chaudhry et al. 2018, arXiv:1801.10112);
    - "backward transfer": mean_j<T of A_Tj − A_jj (Lopez-Paz & Ranzato 2017, arXiv:1706.08840).

    The last two need two tasks at least.
    """
    done = int((~matrix.isnan()).any(1).sum())
    if not done:
        return {}
    rows = matrix[:done, :done].double()
    found = {"last accuracy": rows[-1].mean(), "average accuracy": rows.nanmean(1).mean()}
    if done > 1:
        earlier, last, then = rows[:-1, :-1], rows[-1, :-1], rows.diag()[:-1]
        best = earlier.nan_to_num(-1.0).max(0).values
        found |= {"forgetting": (best - last).mean(), "backward transfer": (last - then).mean()}
    return {name: float(value) for name, value in found.items()}
