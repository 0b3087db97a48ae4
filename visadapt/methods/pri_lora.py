"""PRILoRA: more rank in deeper layers, and entries of A pruned by importance."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from visadapt.core.adapter import LowRank, kaiming, zeros
from visadapt.core.site import Site


class PRILoRA(LowRank):
    """ΔW = s · B A,  A_ij ← 0 for the least |A_ij| · n_j now and then,  of a rank that rises with depth.

    r = rank · (1 − spread) in the first block of the set, rank · (1 + spread) in the last, linear between;
    s = alpha / r.
    A (r, in, *kernel) and B (out, r) start as LoRA's. n (in,) is a running mean of the norms of the inputs, over the
    first batch of each step. Every `interval` steps the least important part of each row of A becomes zero; there is no
    mask, so that entries may grow again, and the optimiser keeps what it knows of them.

    Benedek & Wolf 2024, arXiv 2401.11316; the official code was not to be had. The numbers are the defaults that
    are known at second hand, and rows as the groups that are compared are our choice.

    Args:
        rank: components of a layer in the middle.
        spread: how far ranks go below and above that: 0.5 means 4 to 12 for 8.
        alpha: numerator of the scale; None means a scale of 1.
        prune: share of the entries of each row that become zero.
        interval: optimiser steps between two times.
        momentum: of the running mean.
    """

    training_state = ("norms",)

    spread: float = 0.5
    alpha: float | None = None
    prune: float = 0.5
    interval: int = 40
    momentum: float = 0.9

    def build(self, layer: Site) -> None:
        """Create A, B and n."""
        rank = max(1, round(self.rank * (1 + self.spread * (2 * self.depth - 1))))
        self.down = kaiming(layer, rank, *layer.in_shape)
        self.up = zeros(layer, layer.width, rank)
        self.norms: Tensor
        self.register_buffer("norms", zeros(layer, layer.in_shape[0]).data)
        self._measures = False
        self._prunes = False

    def refuse(self, layer: Site) -> str | None:
        """Options without meaning, and parameters that are read: their inputs are not seen."""
        if not 0 <= self.spread <= 1 or not 0 <= self.prune < 1 or self.interval < 1:
            return (
                f"spread={self.spread}, prune={self.prune}, interval={self.interval}: 0 to 1, 0 to below 1, at least 1"
            )
        if self.view and self.prune:
            return "its inputs are not seen where a weight is read; set prune=0, or target a layer that is called"
        return None

    @property
    def fusable(self) -> bool:
        """In training the inputs have to be seen."""
        return not (self.training and self.prune > 0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and s · B."""
        return self.down, self.up if self.alpha is None else self.up * (self.alpha / len(self.down))

    def side(self, x: Tensor, layer: Site) -> Tensor:
        """S · B A x; the first time in a step the inputs are measured."""
        if self._measures and self.training:
            self._measures = False
            self.norms.lerp_(layer.input_norms(x).to(self.norms), 1 - self.momentum)
        return layer.low_rank(x, *self.factors())

    def before_step(self, step: int, total: int | None) -> None:
        """Whether this step measures and prunes."""
        self._measures = self.prune > 0
        self._prunes = self.prune > 0 and (step + 1) % self.interval == 0

    @torch.no_grad()
    def after_step(self) -> None:
        """Prune, alike in all processes."""
        self._measures = False
        if not self._prunes:
            return
        self._prunes = False
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.norms)
            self.norms /= dist.get_world_size()
        weights = self.norms if bool(self.norms.any()) else torch.ones_like(self.norms)
        importance = self.down.abs() * weights.view(-1, *[1] * (self.down.dim() - 2))
        rows = self.down.flatten(1)
        least = importance.flatten(1).argsort(dim=1, stable=True)[:, : int(self.prune * rows.shape[1])]
        self.down.copy_(rows.scatter(1, least, 0.0).view_as(self.down))
