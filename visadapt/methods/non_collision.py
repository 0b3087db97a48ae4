"""N-LoRA: sparse updates of tasks that do not collide."""

from __future__ import annotations

from math import prod
from typing import Literal

from torch import Tensor

from visadapt.core.site import Site
from visadapt.core.stack import TaskStack
from visadapt.maths.low_rank import absolute_sum


class NonCollisionLoRA(TaskStack):
    """ΔW = Σ_k<t B_k A_k + B A,  loss + sparsity · Σ |B A|.

    Updates that are zero nearly everywhere seldom change the same weight, so tasks disturb each other little. The sum
    is over all elements of the update. The released code penalises Σ |A B| instead, a matrix of rank × rank, which
    exists where a layer has as many inputs as outputs; its weights, 0.4 to 1.2, are for that.

    Non-collision LoRA: Yang et al. 2025 (COLING), arXiv 2410.10179, code: github.com/PKU-YuanGroup/N-LoRA.

    Args:
        rank: inner dimension of each task's update.
        tasks: how many tasks the sequence has at most.
        done: how many of them are finished.
        sparsity: weight of the penalty, summed over the layers.
        of: what is penalised: the update, or what the released code takes.
    """

    sparsity: float = 1e-4
    of: Literal["update", "released"] = "update"

    def refuse(self, layer: Site) -> str | None:
        """The released penalty needs as many inputs as outputs."""
        fan_in = prod(layer.in_shape)
        if self.of == "released" and fan_in != layer.width:
            return f"`of: released` multiplies A ({fan_in} inputs) by B ({layer.width} outputs); use of: update"
        return None

    def penalty(self) -> Tensor:
        """Sparsity · Σ |B A| of the task under way."""
        if self.of == "released":
            return self.sparsity * (self.down.flatten(1) @ self.up).abs().sum()
        return self.sparsity * absolute_sum(self.down, self.up)
