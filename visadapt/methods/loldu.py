"""LoLDU: the diagonal between the triangular factors of the weight."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from visadapt.core.adapter import LowRank, zeros
from visadapt.core.site import Site


class LoLDU(LowRank):
    """ΔW = s · P L_r diag(z − z₀) U_r,  W = P L diag(D) U,  s = alpha / rank; only z (rank,) trains.

    P L (out, k) and U (k, in · kernel), with ones on the diagonals of L and U and k = min(out, in · kernel), come from
    an LU decomposition with row pivots in fp64 on the CPU; the first `rank` of its components are kept, which are not
    the largest. z is zero at start. A convolution is the matrix (out, in · kernel). L and U are not saved: the same W
    gives them again.

    Shi et al. 2024, arXiv 2410.13618, code: github.com/SKDDJ/LoLDU. It trains D_r + z and takes s · P L_r diag(D_r) U_r
    out of W: the same function, where its other starts than D do not move the network away from W.

    Args:
        rank: number of components, at most k.
        alpha: numerator of the scale; None means `rank`.
    """

    exact_base: ClassVar[bool] = True

    rank: int = 768
    alpha: float | None = None

    def refuse(self, layer: Site) -> str | None:
        """Weights without a decomposition."""
        if not bool(torch.isfinite(layer.weight).all()):
            return "its weight is not finite, so it has no decomposition; load the base model first"
        if bool((_triangles(layer)[1] == 0).any()):
            return "its weight is not of full rank, so the diagonal of its decomposition has zeros; use LoRA"
        return None

    def build(self, layer: Site) -> None:
        """Decompose W, which must be the pre-trained one (else `rebuild`), and create z."""
        left, _, right = (t.to(layer.device, layer.dtype) for t in _triangles(layer))
        r = min(self.rank, len(right))
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("left", left[:, :r].contiguous(), persistent=False)
        self.register_buffer("right", right[:r].reshape(r, *layer.in_shape), persistent=False)
        self.diagonal = zeros(layer, r)
        inputs = self.right[0].numel()
        self._thin = r * (inputs + layer.width) <= inputs * layer.width

    @property
    def fusable(self) -> bool:
        """Whether two thin products cost less than a dense ΔW."""
        return self._thin

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """U_r and s · P L_r diag(z)."""
        return self.right, self.left * (self.diagonal * self.scale)

    def onto(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """One product with the sum of both weights, where the rank is large."""
        return None if self._thin else F.linear(x, weight + self.strength * self.delta(), bias)

    def side(self, x: Tensor, layer: Site) -> Tensor:
        """ΔW ∗ x, dense where the rank is large."""
        return super().side(x, layer) if self._thin else layer.op(x, self.delta())


def _triangles(layer: Site) -> tuple[Tensor, Tensor, Tensor]:
    """P L, D and U."""
    p, lower, upper = torch.linalg.lu(layer.weight.detach().flatten(1).to("cpu", torch.float64))
    diagonal = upper.diagonal().clone()
    return p @ lower, diagonal, upper / diagonal[:, None]
