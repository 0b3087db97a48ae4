"""SALT: singular values, the large ones scaled and shifted, the small ones mixed by a low rank."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from visadapt.core.adapter import Delta, kaiming, ones, zeros
from visadapt.core.site import Site
from visadapt.maths.svd import signed_svd


class SALT(Delta):
    """W' = U · (diag(relu(α ⊙ σ_top + β)) ⊕ (diag(σ_rest) + X Y)) · Vᵀ,  W = U diag(σ) Vᵀ.

    α (t,) one and β (t,) zero act on the t largest of the n = min(out, in · kernel) singular values;
    X (n − t, rank) kaiming-uniform and Y (rank, n − t) zero mix the others. A convolution is the
    matrix (out, in · kernel). The decomposition is taken on the CPU in float64 with fixed signs and is
    not saved: the same W gives it again, up to rotations among equal singular values.

    Elsayed et al. 2025, arXiv 2503.16055, code: github.com/BioMedIA-MBZUAI/SALT (7314877).

    Differs from the code: it applies the relu to every entry of the core (`relu="full"`), which drops
    the negative entries of X Y and gives Y no gradient off the diagonal at the start, so that first
    steps need not lower the loss; here the relu keeps
    singular values from turning negative, and no more. Its SAM 1 layers draw X and Y from
    0.01 · N(0, 1), which is not the identity at start; its SAM 2 layers start as here.

    Args:
        rank: inner dimension of X Y.
        top: how many singular values are scaled and shifted: a share of n up to 1, a count above 1.
        relu: "diag" for the scaled values alone, "full" for the whole core as in the code.
        regularizer: weight of ‖α ⊙ σ_top + β − σ_top‖ + ‖X Y‖ in `penalty()`.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("scale", "shift")
    exact_base: ClassVar[bool] = True

    rank: int = 8
    top: float = 0.1
    relu: Literal["diag", "full"] = "diag"
    regularizer: float = 0.0

    def build(self, layer: Site) -> None:
        """Decompose W, which must be the pre-trained one (else `rebuild`), and create α, β, X and Y."""
        u, sigma, vt = (t.to(layer.device, layer.dtype) for t in signed_svd(layer.weight.flatten(1)))
        self.register_buffer("u", u, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)
        self.register_buffer("vt", vt, persistent=False)
        self._shape, n = layer.in_shape, len(sigma)
        t = self._count(n)
        self.scale, self.shift = ones(layer, t), zeros(layer, t)
        if t < n:
            # The code asks for the relu gain, which makes torch ignore the slope it gives: a = 0.
            self.mix_left = kaiming(layer, n - t, self.rank, a=0.0)
            self.mix_right = zeros(layer, self.rank, n - t)

    def _count(self, n: int) -> int:
        return min(n, int(self.top) if self.top > 1 else max(1, int(self.top * n)) if self.top > 0 else 0)

    def refuse(self, layer: Site) -> str | None:
        """Options without meaning, and a weight that cannot be decomposed."""
        if self.relu not in ("diag", "full"):
            return f"relu={self.relu!r}: use 'diag' or 'full'"
        if self.top < 0 or (self.top > 1 and self.top != int(self.top)):
            return f"top={self.top}: give a share of the singular values up to 1, or a whole number above 1"
        if not bool(torch.isfinite(layer.weight).all()):
            return "its weight is not finite, so it has no singular values; load the base model first"
        return None

    @property
    def _basis(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u, self.sigma, self.vt  # type: ignore[return-value]

    def delta(self) -> Tensor:
        """U (Σ' − Σ) Vᵀ, from the top block and the rest apart."""
        (u, sigma, vt), t = self._basis, len(self.scale)
        with torch.autocast(u.device.type, enabled=False):  # ΔW is rounded once, where it is used
            gain = F.relu(self.scale * sigma[:t] + self.shift) - sigma[:t]
            change = (u[:, :t] * gain) @ vt[:t]
            if t < len(sigma):
                change = torch.addmm(change, *self._rest(u[:, t:], sigma[t:], vt[t:]))
        return change.view(-1, *self._shape)

    def _rest(self, u: Tensor, sigma: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors of U_rest · change · V_restᵀ."""
        if self.relu == "diag":
            return u @ self.mix_left, self.mix_right @ vt
        rest = torch.diag(sigma)
        return u @ (F.relu(rest + self.mix_left @ self.mix_right) - rest), vt

    def penalty(self) -> Tensor | None:
        """The term regularizer · (‖(α − 1) ⊙ σ_top + β‖ + ‖X Y‖), zero at start."""
        if self.regularizer == 0:
            return None
        _, sigma, _ = self._basis
        top = sigma[: len(self.scale)]
        term = (self.scale * top + self.shift - top).norm()
        if len(top) < len(sigma):
            term = term + (self.mix_left @ self.mix_right).norm()
        return self.regularizer * term
