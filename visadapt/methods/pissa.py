"""PiSSA: a LoRA that starts at the main singular values of the weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visadapt.core.adapter import LowRank
from visadapt.core.site import Site
from visadapt.maths.svd import signed_svd


class PiSSA(LowRank):
    """ΔW = s · (B A − B₀ A₀),  B₀ = U_r √(Σ_r / s), A₀ = √(Σ_r / s) V_rᵀ of W,  s = alpha / rank.

    B (out, rank) and A (rank, in, *kernel) start at B₀ and A₀. The authors train s · B A on the residual
    W − s · B₀ A₀; that is the same function, but here W stays, so that an adapter at strength 0 leaves the base. A file
    holds B₀ and A₀ too, which makes it a LoRA of rank 2 · rank. A convolution is the matrix (out, in · kernel).

    Meng, Wang & Zhang 2024, arXiv 2404.02948, code: github.com/GraphPKU/PiSSA.

    Args:
        rank: how many singular values train, at most min(out, in · kernel).
        alpha: numerator of the scale; None means `rank`.
    """

    alpha: float | None = None

    def build(self, layer: Site) -> None:
        """Decompose W, which must be the pre-trained one (else `rebuild`)."""
        u, sigma, vt = (t.to(layer.device, layer.dtype) for t in signed_svd(layer.weight.flatten(1)))
        r = min(self.rank, len(sigma))
        root = (sigma[:r] / self.scale).sqrt()
        up, down = u[:, :r] * root, (root[:, None] * vt[:r]).view(r, *layer.in_shape)
        self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(up.clone())
        self.down_start: Tensor
        self.up_start: Tensor
        self.register_buffer("down_start", down)
        self.register_buffer("up_start", up.contiguous())

    def refuse(self, layer: Site) -> str | None:
        """A scale without a root, and a weight that cannot be decomposed."""
        if self.scale <= 0:
            return f"alpha={self.alpha}: PiSSA divides by the scale; give a positive one"
        if not bool(torch.isfinite(layer.weight).all()):
            return "its weight is not finite, so it has no singular values; load the base model first"
        return None

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """A above A₀, and s · [B, −B₀]."""
        return torch.cat([self.down, self.down_start]), torch.cat([self.up, -self.up_start], 1) * self.scale
