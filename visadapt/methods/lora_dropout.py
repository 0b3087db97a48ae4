"""LoRA Dropout: whole inputs and outputs of the update are left out, the same ones for all samples of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from visadapt.core.adapter import LowRank, kaiming, zeros
from visadapt.core.site import Site
from visadapt.maths.seeded import generator


class LoRADropout(LowRank):
    """ΔW = s · diag(m_B) B A diag(m_A),  m_A and m_B zero with probability p,  s = alpha / rank.

    A (rank, in, *kernel) and B (out, rank) start as LoRA's. m_A (in,) and m_B (out,) are drawn for each layer and each
    step from a generator of their own, so that all processes and a recomputation see the same; an entry of ΔW is zero
    with probability 2p − p². Between steps, in evaluation and in files there are no masks: the mean of them all.

    Lin et al. 2024, arXiv 2404.09610; there is no official code. Differs from the paper: a step trains with one pair
    of masks, not with the mean loss of four, and what stays is divided by 1 − p as in any dropout, which the equations
    do not print (`rescale`). Its ensemble at test time is `visadapt.callbacks.ensemble.Ensemble`
    (``--trainer.callbacks+=Ensemble``).

    Args:
        rank: inner dimension.
        alpha: numerator of the scale; None means `rank`.
        p: probability with which an input and an output is left out.
        rescale: divide what stays by 1 − p, for each mask.
        seed: of the masks.
    """

    alpha: float | None = None
    p: float = 0.5
    rescale: bool = True
    seed: int = 0

    def build(self, layer: Site) -> None:
        """Create A and B, and the layer's number in its set."""
        self.down = kaiming(layer, self.rank, *layer.in_shape)
        self.up = zeros(layer, layer.width, self.rank)
        count = self.share("layers", lambda: torch.zeros(1, dtype=torch.long))
        self._index = int(count)
        count += 1
        self._masks: tuple[Tensor, Tensor] | None = None
        self._of_step = False

    def refuse(self, layer: Site) -> str | None:
        """Probabilities that leave nothing."""
        return None if 0 <= self.p < 1 else f"p={self.p}: a probability from 0 to below 1"

    def before_step(self, step: int, total: int | None) -> None:
        """Draw the masks of the step."""
        self.draw(step)
        self._of_step = True

    def after_step(self) -> None:
        """Back to the mean."""
        self.draw(None)

    def draw(self, number: int | None) -> None:
        """Take the masks of that number; None takes them off."""
        self._of_step = False
        if number is None or self.p == 0:
            self._masks = None
            return
        drawn = generator(self.seed, self._index, number)
        weight = 1 / (1 - self.p) if self.rescale else 1.0
        self._masks = tuple(  # type: ignore[assignment]
            (torch.rand(n, generator=drawn) >= self.p).to(self.up) * weight for n in (self.down.shape[1], len(self.up))
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and s · B, masked where masks are drawn: two small products and no copy of the input."""
        up = self.up if self.alpha is None else self.up * (self.alpha / self.rank)
        if self._masks is None or (self._of_step and not self.training):  # a validation in the middle of a step
            return self.down, up
        inputs, outputs = self._masks
        return self.down * inputs.view(-1, *[1] * (self.down.dim() - 2)), up * outputs[:, None]
