"""CoDyRA: the rank of each task's update is chosen while it trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visadapt.core.adapter import normal
from visadapt.core.site import Site
from visadapt.core.stack import TaskStack


class CoDyRA(TaskStack):
    """ΔW = Σ_k<t B_k diag(w_k) A_k + B diag(w) A,  w ← sign(w) · max(|w| − κ, 0) after each step.

    Components whose importance w falls to zero are gone: the rank left is what a layer needs for a task. κ is 0 for the
    first part of the steps, then rises to its largest value in equal steps. w ~ N(0, 1) at start, A as in LoRA, B zero.

    Lu, Zhao, Xue et al. 2024, arXiv 2412.01004, code: github.com/Artificer-AI-Lab/CoDyRA. The released code sets to
    zero whatever is below κ after κ has been subtracted, so components up to 2 κ vanish (`released`).

    Args:
        rank: components of each task's update.
        tasks: how many tasks the sequence has at most.
        done: how many of them are finished.
        threshold: largest κ.
        dense: share of a task's steps in which κ is 0.
        levels: number of equal steps in which κ rises afterwards.
        released: the released code's operator.
    """

    no_decay = ("importance",)

    rank: int = 16
    threshold: float = 0.005
    dense: float = 0.5
    levels: int = 50
    released: bool = False

    def build(self, layer: Site) -> None:
        """Create B, A and w."""
        super().build(layer)
        self.importance: nn.Parameter = normal(layer, self.rank)
        self.kappa = 0.0

    def pair(self, task: int) -> tuple[Tensor, Tensor]:
        """A and B diag(w); those of earlier tasks are stored so."""
        down, up = super().pair(task)
        return (down, up * self.importance) if task == self.done else (down, up)

    def before_step(self, step: int, total: int | None) -> None:
        """The threshold of this step.

        Raises:
            ValueError: the number of steps is not known.
        """
        if total is None:
            raise ValueError("CoDyRA: its threshold needs an end; set trainer.max_epochs or trainer.max_steps")
        begins = round(self.dense * total)
        each = max(1, (total - begins) // self.levels)
        level = min(self.levels - 1, (step - begins) // each) if step >= begins else 0
        self.kappa = self.threshold * level / max(1, self.levels - 1)

    @torch.no_grad()
    def after_step(self) -> None:
        """The proximal step on w."""
        left = (self.importance.abs() - self.kappa).clamp_min(0)
        if self.released:
            left = left * (left >= self.kappa)
        self.importance.copy_(self.importance.sign() * left)

    def next_task(self) -> None:
        """As every stack, with fresh importances."""
        super().next_task()
        nn.init.normal_(self.importance)
