"""LoRA-SB: a small square matrix between the singular vectors of the first step of full fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visadapt.core.adapter import LowRank, zeros
from visadapt.core.site import Site
from visadapt.maths.svd import signed_svd


class LoRASB(LowRank):
    """ΔW = s · B R A,  B Σ A = −sign(Σ_i ∂L_i/∂W) cut to rank r,  s = alpha / rank; only R trains, from step · Σ / s.

    B (out, rank) and A (rank, in, *kernel) are singular vectors, frozen; Σ are the singular values. So the network
    starts at the best approximation, among those of the rank, of what AdamW's first step with the learning rate `step`
    would make of W, and the gradient of R is that of W seen through B and A. `visadapt fit` takes the gradients from
    its first batches before it trains (callbacks.calibrate.Calibrate); in a loop of your own, call
    `visadapt.core.calibrate.calibrate`. Until then B and A are random, R is zero. B and A are saved with R.

    Ponkshe, Singhal et al. 2024, arXiv 2411.19557, code: github.com/RaghavSinghal10/lora-sb. Differs from the code: the
    decomposition is exact, not randomised and rounded to bf16, and the step is a field where it takes the learning
    rate of its first warm-up step.

    Args:
        rank: side of R, at most min(out, in · kernel).
        alpha: numerator of the scale; None means `rank`, as in the code.
        step: size of the first step; 0 starts at W.
    """

    alpha: float | None = None
    step: float = 1e-5

    def build(self, layer: Site) -> None:
        """Create B, A and R, and a mark that they wait for a gradient."""
        inputs = layer.weight[0].numel()
        r = min(self.rank, layer.width, inputs)
        self.down: Tensor
        self.up: Tensor
        self.calibrated: Tensor
        self.register_buffer("down", nn.init.orthogonal_(zeros(layer, r, inputs).data).view(r, *layer.in_shape))
        self.register_buffer("up", nn.init.orthogonal_(zeros(layer, layer.width, r).data))
        self.register_buffer("calibrated", zeros(layer, 1).data)
        self.core = zeros(layer, r, r)

    def refuse(self, layer: Site) -> str | None:
        """Packed weights, which have no gradient."""
        if not layer.weight.is_floating_point():
            return f"its weight is packed ({layer.weight.dtype}) and has no gradient; use LoRA"
        return None

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def awaits_gradient(self) -> bool:
        """Until B, A and R were made from one, or loaded."""
        return not bool(self.calibrated)

    @torch.no_grad()
    def calibrate(self, gradient: Tensor) -> None:
        """B, A and R from the first step that AdamW would take."""
        u, sigma, vt = signed_svd(-gradient.flatten(1).sign())
        r = len(self.core)
        self.up.copy_(u[:, :r])
        self.down.copy_(vt[:r].reshape(self.down.shape))
        self.core.copy_(torch.diag(sigma[:r] * (self.step / self.scale)))
        self.calibrated.fill_(1)

    def before_step(self, step: int, total: int | None) -> None:
        """Refuse to train random bases.

        Raises:
            ValueError: no gradient was seen.
        """
        if self.awaits_gradient:
            raise ValueError(
                "LoRASB has seen no gradient to start from; a run does that with callbacks.calibrate.Calibrate, a "
                "loop of your own with visadapt.core.calibrate.calibrate(model, losses)"
            )

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and s · B R."""
        return self.down, self.up @ (self.core * self.scale)
