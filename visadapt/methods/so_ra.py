"""SoRA: sparse low-rank adaptation, a gate for each component that a proximal step closes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visadapt.core.adapter import normal
from visadapt.core.gated import Gated
from visadapt.core.site import Site


class SoRA(Gated):
    """ΔW = s · B diag(g) A,  g ← sign(g) · max(|g| − ξ, 0) after each step,  s = alpha / rank.

    A (rank, in, *kernel) as in LoRA, B (out, rank) zero, g (rank,) ~ N(0, 1) at start. A gate at zero still has a
    gradient and may open again; a component is final once `visadapt truncate` writes what is left as a LoRA.

    Ding et al. 2023, arXiv 2311.11696, code: github.com/TsinghuaC3I/SoRA. The paper shrinks by learning rate times λ;
    its code by the same ξ in every step, as here, with two peculiarities: gates left below ξ are set to zero as well,
    so that all up to 2 ξ vanish (`released`), and the loss gets a multiple of the mean |g| besides (not here: it pulls
    the same way).

    Args:
        rank: components to start from.
        alpha: numerator of the scale; None means `rank`.
        threshold: ξ; the code has 0.0003 at a learning rate of 0.001, where runs have thousands of steps.
        released: the released code's operator.
    """

    no_decay = ("gate",)

    threshold: float = 3e-4
    released: bool = False

    def build(self, layer: Site) -> None:
        """Create A, B and g."""
        super().build(layer)
        self.gate: nn.Parameter = normal(layer, self.rank)

    def gates(self) -> Tensor:
        """The gates g themselves."""
        return self.gate

    @torch.no_grad()
    def after_step(self) -> None:
        """The proximal step of ξ · |g|."""
        left = (self.gate.abs() - self.threshold).clamp_min(0)
        if self.released:
            left = left * (left >= self.threshold)
        self.gate.copy_(self.gate.sign() * left)
