"""DiffoRA: a search by gradients for the layers that deserve an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.core.adapter import Moments, zeros
from visadapt.core.gated import Gated
from visadapt.core.site import Site
from visadapt.maths.seeded import generator


class DiffoRA(Gated):
    """ΔW = γ · s · B A,  γ = sigmoid(θ) while layers are searched, then 1 for the best of the set and 0 for the others.

    s = alpha / rank; A (rank, in, *kernel) and B (out, rank) start as LoRA's, θ (1,) at zero. During the search A and B
    learn from every other batch, θ from those between, so that it is judged on data that they have not just seen. Then
    the share `keep` of layers with the largest θ stays, and A, B and their moments start anew (averages of `ema_decay`
    do not). Layers that are chosen stay so in a later training. `visadapt truncate` leaves a single component of zeros
    where γ is 0.

    Jiang et al. 2025, arXiv 2502.08905; there is no official code. The paper's outline is known (a relaxed choice, made
    discrete, then weights that are shared), its equations are not: sigmoids for each layer, batches in turns and the
    shares are ours, and layers that are not chosen have no update at all instead of a shared one.

    Args:
        rank: number of components.
        alpha: numerator of the scale; None means `rank`.
        keep: share of the set's layers that stay.
        search: share of the steps for the search.
        seed: of the second start of A, which all processes draw alike.
    """

    no_decay = ("choice",)

    keep: float = 0.5
    search: float = 0.3
    seed: int = 0

    def build(self, layer: Site) -> None:
        """Create A, B and θ; γ is negative as long as it is open."""
        super().build(layer)
        self.choice: nn.Parameter = zeros(layer, 1)
        self.chosen: Tensor
        self.register_buffer("chosen", zeros(layer, 1).data - 1)
        self.now: tuple[int, int] | None = None
        self._open: bool | None = None
        self._still: list[tuple[Tensor, Tensor]] = []

    def refuse(self, layer: Site) -> str | None:
        """Shares that leave no layer or no time."""
        if not 0 < self.keep <= 1 or not 0 < self.search < 1:
            return f"keep={self.keep}, search={self.search}: above 0, up to 1 and below 1"
        return None

    def gates(self) -> Tensor:
        """The same γ for every component."""
        return torch.where(self.chosen < 0, torch.sigmoid(self.choice), self.chosen).expand(self.rank)

    def before_step(self, step: int, total: int | None) -> None:
        """Remember the step, and the last one of the search.

        Raises:
            ValueError: the number of steps is not known, or leaves none for the search.
        """
        if total is None:
            raise ValueError("DiffoRA: its search needs an end; set trainer.max_epochs or trainer.max_steps")
        if self._open is None or step == 0:
            self._open = bool(self.chosen < 0)
        last = round(self.search * total) - 1
        if self._open and last < 0 and total > 1:  # a single step is a trial
            raise ValueError(f"DiffoRA: search={self.search} of {total} steps is none; train for longer, or raise it")
        self.now = (step, last) if self._open else None

    @torch.no_grad()
    def after_backward(self) -> None:
        """In turns: what is not to learn has a gradient of zero, and its values are kept from momentum and decay."""
        if self.now is None or self.now[0] > self.now[1]:
            return
        for parameter in (self.down, self.up) if self.now[0] % 2 else (self.choice,):
            self._still.append((parameter, parameter.detach().clone()))
            if parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        """Put back what was not to learn."""
        for parameter, value in self._still:
            parameter.copy_(value)
        self._still.clear()

    @classmethod
    @torch.no_grad()
    def after_step_together(cls, members: Sequence[Any], moments: Moments) -> None:
        """With the last step of the search: choose, and start anew."""
        first = members[0]
        if first.now is None or first.now[0] != first.now[1]:
            return
        order = torch.cat([m.choice for m in members]).argsort(descending=True, stable=True)
        kept = set(order[: max(1, round(first.keep * len(members)))].tolist())
        for i, member in enumerate(members):
            member.chosen.fill_(float(i in kept))
            start = torch.empty(member.down.shape)
            nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator(first.seed, i))
            member.down.copy_(start)
            member.up.zero_()
            for state in (s for p in (member.down, member.up) for s in moments(p).values()):
                state.zero_()
