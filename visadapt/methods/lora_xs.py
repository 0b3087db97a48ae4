"""LoRA-XS: a small square matrix between the main singular vectors of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from visadapt.core.adapter import LowRank, zeros
from visadapt.core.site import Site
from visadapt.maths.svd import signed_svd


class LoRAXS(LowRank):
    """ΔW = s · B R A,  B = U_r, A = Σ_r V_rᵀ of W frozen, s = alpha / rank; only R (rank, rank) trains.

    R is zero at start. A convolution is the matrix (out, in · kernel). The rank is at most min(out, in · kernel).
    B and A are saved with R, as singular vectors of nearly equal singular values may come out otherwise elsewhere.

    Bałazy, Banaei, Aberer & Tabor 2024, arXiv 2405.17604, code: github.com/MohammadrezaBanaei/LoRA-XS.
    Differs from the code: it draws R ~ N(0, (10⁻⁵)²); zero is the identity exactly, and R has a gradient there too.

    Args:
        rank: side of R.
        alpha: numerator of the scale; None means `rank`.
    """

    alpha: float | None = None

    def build(self, layer: Site) -> None:
        """Decompose W, which must be the pre-trained one (else `rebuild`), and create R."""
        u, sigma, vt = (t.to(layer.device, layer.dtype) for t in signed_svd(layer.weight.flatten(1)))
        r = min(self.rank, len(sigma))
        self.down: Tensor
        self.up: Tensor
        self.register_buffer("down", (sigma[:r, None] * vt[:r]).view(r, *layer.in_shape))
        self.register_buffer("up", u[:, :r].contiguous())
        self.core = zeros(layer, r, r)

    def refuse(self, layer: Site) -> str | None:
        """A weight that cannot be decomposed."""
        if not bool(torch.isfinite(layer.weight).all()):
            return "its weight is not finite, so it has no singular values; load the base model first"
        return None

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and s·B R."""
        return self.down, self.up @ (self.core * self.scale)
