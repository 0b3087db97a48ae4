"""BeamLoRA: components compete; the weak ones are replaced by earlier copies of the strong ones."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.core.adapter import Moments, zeros
from visadapt.core.gated import Gated
from visadapt.core.site import Site
from visadapt.maths.seeded import generator


class BeamLoRA(Gated):
    """ΔW = s · B diag(g) A,  g = rank · softmax(e / τ),  s = alpha / rank: every so many steps small g make room.

    A (rank, in, *kernel) as in LoRA, B (out, rank) and e (rank,) zero at start, so that it starts as a LoRA. At an
    event all g of the set are sorted; those beyond a share p(t) of their sum are pruned, at most half of a layer. p
    rises from `keep` to 1, where nothing is pruned, on half a cosine. A pruned component becomes a copy, with its
    moments, of one of the best of its layer as that was half an interval earlier; both get the mean of their two e,
    and the moments of all e of the layer start anew. The update changes at an event.

    Gu et al. 2025, arXiv 2502.13604, code: github.com/gccnlp/BeamLoRA. At most half of a layer is our bound.

    Args:
        rank: number of components.
        alpha: numerator of the scale; None means `rank`.
        temperature: τ; the code has 0.05, and 0.03 with learning rates below 0.0001.
        keep: p at the start.
        interval: share of all steps between two events; the code has 3,000 of about 37,000.
        until: share of the steps after which there are no events.
        seed: of the pairing of pruned and copied components.
    """

    no_decay = ("score",)
    training_state = ("old_down", "old_up", "old_down_moments", "old_up_moments")

    temperature: float = 0.05
    keep: float = 0.95
    interval: float = 0.08
    until: float = 0.67
    seed: int = 0

    def build(self, layer: Site) -> None:
        """Create A, B and e, and room for what A and B were and for two moments of each."""
        super().build(layer)
        self.score: nn.Parameter = zeros(layer, self.rank)
        for name in ("down", "up"):
            now = self.get_parameter(name).data
            self.register_buffer(f"old_{name}", torch.zeros_like(now))
            self.register_buffer(f"old_{name}_moments", now.new_zeros(2, *now.shape))
        self.now: tuple[int, int] | None = None

    def gates(self) -> Tensor:
        """The values g, one on average."""
        return self.rank * torch.softmax(self.score / self.temperature, 0)

    def before_step(self, step: int, total: int | None) -> None:
        """Remember how many steps will be done.

        Raises:
            ValueError: the number of steps is not known.
        """
        if total is None:
            raise ValueError("BeamLoRA: its events need an end; set trainer.max_epochs or trainer.max_steps")
        self.now = (step + 1, total)

    @classmethod
    @torch.no_grad()
    def after_step_together(cls, members: Sequence[Any], moments: Moments) -> None:
        """Keep copies half an interval before an event; hold the event."""
        first = members[0]
        if first.now is None:
            return
        (done, total), every = first.now, max(2, round(first.interval * first.now[1]))
        if done % every == every // 2:
            for member in members:
                member.keep_copies(moments)
        end = first.until * total
        if done % every or done > end:
            return
        share = 1 - (1 - first.keep) * (1 + cos(pi * done / end)) / 2
        gates = torch.cat([m.gates() for m in members])
        ordered, order = gates.sort(descending=True, stable=True)
        ahead = ordered.cumsum(0) - ordered  # what comes before each
        weak = torch.zeros(len(gates), dtype=torch.bool, device=gates.device)
        weak[order] = ahead >= share * gates.sum()
        for i, (member, mask) in enumerate(zip(members, weak.split([m.rank for m in members]))):
            member.replace(mask, moments, generator(first.seed, i, done))

    def keep_copies(self, moments: Moments) -> None:
        """Copy A, B and their moments."""
        for name in ("down", "up"):
            self.get_buffer(f"old_{name}").copy_(self.get_parameter(name))
            for held, now in zip(self.get_buffer(f"old_{name}_moments"), moments(self.get_parameter(name)).values()):
                held.copy_(now)

    def replace(self, weak: Tensor, moments: Moments, drawn: torch.Generator) -> None:
        """Overwrite weak components with earlier copies of the best."""
        order = self.gates().argsort(descending=True, stable=True)
        pruned = order[weak[order]].flip(0)[: self.rank // 2]
        best = order[: len(pruned)][torch.randperm(len(pruned), generator=drawn).to(order.device)]
        for name, axis in (("down", 0), ("up", 1)):
            pairs = [(self.get_parameter(name).data, self.get_buffer(f"old_{name}"))]
            pairs += zip(moments(self.get_parameter(name)).values(), self.get_buffer(f"old_{name}_moments"))
            for now, old in pairs:
                now.index_copy_(axis, pruned, old.index_select(axis, best))
        if len(pruned):
            mean = (self.score[best] + self.score[pruned]) / 2
            self.score[best] = self.score[pruned] = mean
            for state in moments(self.score).values():
                state.zero_()
