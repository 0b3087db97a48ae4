"""DyLoRA: one adapter for a range of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from visadapt.core.adapter import LowRank, kaiming, zeros
from visadapt.core.site import Site
from visadapt.maths.seeded import generator


class DyLoRA(LowRank):
    """ΔW = alpha / b · B[:, :b] A[:b],  b drawn anew for each step: the first b components work alone, for any b.

    A (rank, in, *kernel) and B (out, rank) start as LoRA's. b is uniform from `smallest` to `rank`, the same in all
    layers and processes. Outside of training b is `use`; `visadapt truncate --rank b` cuts a file to any b.

    Valipour et al. 2023, arXiv 2210.07558, code: github.com/huawei-noah/KD-NLP (DyLoRA). A component that a
    step leaves out has a gradient of zero: the momentum of an optimiser still moves it, as in the code; there is no
    weight decay here, which would shrink the last components, trained in the fewest steps, most.

    Args:
        rank: the largest b.
        alpha: numerator of the scale; None means `rank`, so that all components together have a scale of 1.
        smallest: the smallest b.
        use: b in evaluation, merging and export; None means `rank`.
        last_only: a step trains component b alone, the ones before it stay (the code's `frozen`).
        seed: of the draws.
    """

    no_decay = ("down", "up")

    alpha: float | None = None
    smallest: int = 1
    use: int | None = None
    last_only: bool = False
    seed: int = 0

    def build(self, layer: Site) -> None:
        """Create A and B."""
        self.down = kaiming(layer, self.rank, *layer.in_shape)
        self.up = zeros(layer, layer.width, self.rank)
        self.rank_now: int | None = None

    def refuse(self, layer: Site) -> str | None:
        """Ranks that it does not have."""
        if not 1 <= self.smallest <= self.rank:
            return f"smallest={self.smallest}: choose from 1 to rank={self.rank}"
        if self.use is not None and not 1 <= self.use <= self.rank:
            return f"use={self.use}: choose from 1 to rank={self.rank}"
        return None

    def before_step(self, step: int, total: int | None) -> None:
        """Draw b, which holds until the step is done."""
        drawn = torch.randint(self.smallest, self.rank + 1, (), generator=generator(self.seed, step))
        self.rank_now = int(drawn)

    def after_step(self) -> None:
        """What comes between steps (merging, saving) sees the rank of evaluation."""
        self.rank_now = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """The first b components, scaled for b."""
        now = self.rank_now if self.training else None
        if now is None:
            return self.components(self.use)
        if not self.last_only:
            return self.components(now)
        down, up = self.components(now)
        still = slice(now - 1)
        return torch.cat([down[still].detach(), down[now - 1 :]]), torch.cat(
            [up[:, still].detach(), up[:, now - 1 :]], 1
        )

    def components(self, rank: int | None) -> tuple[Tensor, Tensor]:
        """The first `rank` components; None means as many as in evaluation.

        Raises:
            ValueError: there are not so many.
        """
        b = rank or self.use or self.rank
        if b > self.rank:
            raise ValueError(f"DyLoRA of rank {self.rank} has no rank {b}")
        return self.down[:b], self.up[:, :b] * ((self.rank if self.alpha is None else self.alpha) / b)
