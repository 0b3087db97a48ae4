"""RAC-LoRA: a chain of low-rank updates, each with one random factor."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from visadapt.core.site import Site
from visadapt.core.stack import TaskStack
from visadapt.maths.seeded import generator


class RACLoRA(TaskStack):
    """ΔW = s · (Σ_k<t B_k A_k + B A),  of B and A one is random and frozen, the other trains from zero.

    s = alpha / rank. A link of the chain starts where the last one ended: the function stays the same, the random
    factor is drawn anew, the other is zero again. `visadapt.callbacks.chain.Chain` begins links in a run and resets the
    optimiser with them. B (out, rank) ~ N(0, 1/rank), or A (rank, in, *kernel) ~ N(0, 1/in). Pairs of finished links
    stay apart, so that the base is untouched and the file has tasks · rank components.

    Malinovsky et al. 2024, arXiv 2410.08305; there is no official code. The variances are ours: the analysis needs
    none but the span. With a square orthonormal B a link of one step of gradient descent is a step of full fine-tuning.

    Args:
        rank: components of each link.
        tasks: how many links the chain has at most.
        done: how many of them are finished.
        alpha: numerator of the scale; None means `rank`.
        sampled: the random factor; "down" keeps no layer inputs for backward.
        seed: of the random factors, which all processes draw alike.
    """

    rank: int = 2
    alpha: float | None = None
    sampled: Literal["up", "down"] = "up"
    seed: int = 0

    def build(self, layer: Site) -> None:
        """Create the factors, and room for those of finished links."""
        super().build(layer)
        drawn = self.up if self.sampled == "up" else self.down
        delattr(self, self.sampled)
        self.register_buffer(self.sampled, drawn.data)
        count = self.share("layers", lambda: torch.zeros(1, dtype=torch.long))
        self._index = int(count)
        count += 1
        self._begin()

    def pair(self, task: int) -> tuple[Tensor, Tensor]:
        """A and B of a link; the scale is in B, of finished links in what is stored."""
        down, up = super().pair(task)
        same = self.alpha is None or task != self.done
        return (down, up) if same else (down, up * (self.alpha / self.rank))  # type: ignore[operator]

    def next_task(self) -> None:
        """Begin the next link."""
        super().next_task()
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Draw one factor; the other is zero."""
        drawn, trained = (self.up, self.down) if self.sampled == "up" else (self.down, self.up)
        normal = torch.randn(drawn.shape, generator=generator(self.seed, self._index, self.done))
        drawn.copy_(normal / drawn[0].numel() ** 0.5)
        trained.zero_()
