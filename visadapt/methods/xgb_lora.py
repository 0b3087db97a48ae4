"""XGBLoRA: gradient boosting with rank-1 updates of a few layers at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visadapt.core.site import Site
from visadapt.core.stack import TaskStack
from visadapt.maths.seeded import generator


class XGBLoRA(TaskStack):
    """ΔW = s · (Σ_k<t B_k A_k + B A),  B A of rank 1 and in a random part of the layers only, anew in each round.

    A round starts where the last one ended: the function stays the same, A (rank, in, *kernel) is kaiming-uniform and B
    (out, rank) zero again, and the layers that learn are drawn anew; in the others gradients are zero, B stays zero.
    `visadapt.callbacks.chain.Chain` begins rounds in a run and resets the optimiser with them. Pairs of finished rounds
    stay apart, so that the base is untouched, bf16 weights swallow no small boosters, and the file has tasks · rank
    components.

    Zhang et al. 2024, arXiv 2410.19694; there is no official code. Its L2 term on A and B is the weight decay here.

    Args:
        rank: components of each booster.
        tasks: how many rounds there are at most.
        done: how many of them are finished.
        alpha: numerator of the scale s = alpha / rank; None means `rank`.
        layers: share of the set's layers that learn in a round; the paper's best is 11 of 32.
        seed: of the layers and of A, which all processes draw alike.
    """

    rank: int = 1
    alpha: float | None = None
    layers: float = 0.35
    seed: int = 0

    def build(self, layer: Site) -> None:
        """Create the factors, room for those of finished rounds, and the layer's number in its set."""
        super().build(layer)
        self._count = self.share("layers", lambda: torch.zeros(1, dtype=torch.long))
        self._index = int(self._count)
        self._count += 1  # the same tensor in all layers: how many there are, once all are built

    def refuse(self, layer: Site) -> str | None:
        """A share of nothing."""
        return None if 0 < self.layers <= 1 else f"layers={self.layers}: a share above 0, up to 1"

    @property
    def learns(self) -> bool:
        """Whether this layer is among those of the round."""
        count = int(self._count)
        order = torch.randperm(count, generator=generator(self.seed, "layers", self.done))
        return self._index in order[: max(1, round(self.layers * count))].tolist()

    def pair(self, task: int) -> tuple[Tensor, Tensor]:
        """A and B of a round; the scale is in B, of finished rounds in what is stored."""
        down, up = super().pair(task)
        same = self.alpha is None or task != self.done
        return (down, up) if same else (down, up * (self.alpha / self.rank))  # type: ignore[operator]

    @torch.no_grad()
    def after_backward(self) -> None:
        """Layers of other rounds learn nothing."""
        if not self.learns:
            for parameter in (self.down, self.up):
                if parameter.grad is not None:
                    parameter.grad.zero_()

    @torch.no_grad()
    def next_task(self) -> None:
        """Begin the next round."""
        super().next_task()
        start = nn.init.kaiming_uniform_(
            torch.empty(self.down.shape), a=5**0.5, generator=generator(self.seed, self._index, self.done)
        )
        self.down.copy_(start)
