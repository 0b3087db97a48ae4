"""O-LoRA: each task learns in a row space orthogonal to those of the earlier ones."""

from __future__ import annotations

from torch import Tensor

from visadapt.core.stack import TaskStack


class OLoRA(TaskStack):
    """ΔW = Σ_k<t B_k A_k + B A,  loss + orthogonality · Σ_k<t ‖A A_kᵀ‖².

    Rows of A span the inputs that a task's update reacts to; the penalty keeps them off those of the earlier tasks. The
    released code takes Σ |A A_kᵀ| instead of squares.

    Wang, Chen, Ge et al. 2023 (Findings of EMNLP), arXiv 2310.14152, code: github.com/cmnfriend/O-LoRA.

    Args:
        rank: inner dimension of each task's update.
        tasks: how many tasks the sequence has at most.
        done: how many of them are finished.
        orthogonality: weight of the penalty, summed over the layers.
        absolute: absolute values instead of squares, as the released code does.
    """

    orthogonality: float = 0.5
    absolute: bool = False

    def penalty(self) -> Tensor | None:
        """Orthogonality · Σ_k ‖A A_kᵀ‖²; None in the first task."""
        if not self.done:
            return None
        overlap = self.down.flatten(1) @ self.past_down[: self.done * self.rank].flatten(1).t()
        return self.orthogonality * (overlap.abs() if self.absolute else overlap.square()).sum()
