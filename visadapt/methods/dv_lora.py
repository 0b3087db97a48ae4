"""DV-LoRA: a LoRA whose rows get gains, trained after its factors."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from visadapt.core.adapter import LowRank, kaiming, ones, zeros
from visadapt.core.site import Site


class DVLoRA(LowRank):
    """ΔW = s · diag(v) B diag(u) A,  s = alpha / rank: B and A train first, then u and v alone.

    A (rank, in, *kernel) is kaiming-uniform, B (out, rank) zero, u (rank,) and v (out,) are one at start. From step
    `warmup` of training on, A and B stay as they are and u, v train.

    Cui et al. 2024 (EndoDAC), arXiv 2405.08672, code: github.com/BeileiCui/EndoDAC (22ec911). Differs from the code:
    it draws u, v ~ U(−1, 1) (`start="uniform"`), which starts some rows near zero, and its optimiser does not know u
    and v, so that they never move.

    Args:
        rank: inner dimension.
        alpha: numerator of the scale; None means `rank`.
        warmup: optimiser steps in which A and B train; the code has 20000. None trains all four throughout.
        start: what u and v are at start.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("inner", "outer")
    takes_turns: ClassVar[bool] = True

    alpha: float | None = None
    warmup: int | None = 20000
    start: Literal["ones", "uniform"] = "ones"

    def refuse(self, layer: Site) -> str | None:
        """Options without meaning."""
        if self.start not in ("ones", "uniform"):
            return f"start={self.start!r}: use 'ones' or 'uniform'"
        if self.warmup is not None and self.warmup < 1:
            return f"warmup={self.warmup}: B is zero until it has trained; give at least one step"
        return None

    def build(self, layer: Site) -> None:
        """Create A, B, u and v."""
        self.down, self.up = kaiming(layer, self.rank, *layer.in_shape), zeros(layer, layer.width, self.rank)
        self.inner, self.outer = ones(layer, self.rank), ones(layer, layer.width)
        if self.start == "uniform":
            nn.init.uniform_(self.inner, -1, 1)
            nn.init.uniform_(self.outer, -1, 1)

    def before_step(self, step: int, total: int | None) -> None:
        """Say which tensors train in this step; an optimiser leaves the others, which have no gradient."""
        if self.warmup is None:
            return
        first = step < self.warmup
        for tensor, trains in ((self.down, first), (self.up, first), (self.inner, not first), (self.outer, not first)):
            if tensor.requires_grad != trains:
                tensor.requires_grad_(trains).grad = None

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and s · diag(v) B diag(u): the gains go to the smaller tensor."""
        return self.down, torch.outer(self.outer, self.inner * self.scale) * self.up
