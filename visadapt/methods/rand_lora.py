"""RandLoRA: a full-rank update from frozen random bases with trained diagonals."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from visadapt.core.adapter import Delta, zeros
from visadapt.core.site import Site
from visadapt.maths.seeded import generator


class RandLoRA(Delta):
    """ΔW = s · Σ_j B_j diag(λ_j) A diag(γ_j),  s = alpha / rank,  j = 1 … n = ⌈min / rank⌉.

    With max and min of (out, in · kernel): B_j (max, rank) and A (rank, min) are random, frozen, of standard deviation
    1 and the same in all layers of a shape; λ (n, rank) is zero, γ (n, min) 1 / max(n, min) at start. Where out < in
    the sum is transposed. A convolution is the matrix (out, in · kernel). The rank of ΔW is min(out, in · kernel)
    whatever `rank` is, and the count of parameters, n · (rank + min), falls with it. The bases are not saved: `seed`
    and the shape give them again. ΔW is formed, as the n · rank inner dimensions are no fewer than min.

    Albert, Zhang, Rodriguez-Opazo et al. 2025, arXiv 2502.00987, code: github.com/PaulAlbert31/RandLoRA.
    Differs from the code and PEFT: column k of B_j meets row k of A, as in the paper; theirs pairs them otherwise,
    which is the same in distribution. λ and γ start as in PEFT.

    Args:
        rank: columns of each basis.
        alpha: numerator of the scale; the code for images has 1.
        bases: "uniform"; "sparse" with 2/3 zeros and signs elsewhere; "very_sparse" with 1 − 2/√max zeros. A zero
            column of A, one in (2/3)^rank, leaves its input without an update: use sparse bases with a large rank.
        seed: of the bases.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("gamma",)

    rank: int = 8
    alpha: float = 1.0
    bases: Literal["uniform", "sparse", "very_sparse"] = "uniform"
    seed: int = 0

    def refuse(self, layer: Site) -> str | None:
        """An unknown option."""
        known = self.bases in ("uniform", "sparse", "very_sparse")
        return None if known else f"bases={self.bases!r}: use 'uniform', 'sparse' or 'very_sparse'"

    def build(self, layer: Site) -> None:
        """Take A and B from the set, or draw them, and create λ and γ."""
        self._shape = layer.in_shape
        sizes = layer.width, math.prod(layer.in_shape)
        self._turned, large, small = sizes[0] < sizes[1], max(sizes), min(sizes)
        rank = min(self.rank, small)
        count = -(-small // rank)
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("left", self._drawn(layer, "B", large, large, count, rank), persistent=False)
        self.register_buffer("right", self._drawn(layer, "A", large, rank, small), persistent=False)
        self.lamda = zeros(layer, count, rank)
        self.gamma = nn.Parameter(torch.full_like(zeros(layer, count, small), 1 / max(count, small)))

    def _drawn(self, layer: Site, role: str, large: int, *shape: int) -> Tensor:
        def make() -> Tensor:
            drawn = torch.rand(shape, generator=generator(self.seed, role, shape)) * 2 - 1
            if self.bases == "uniform":
                return (drawn * 3**0.5).to(layer.device, layer.dtype)
            share = 1 / 3 if self.bases == "sparse" else min(1.0, 2 / large**0.5)  # of entries that are not zero
            signs = drawn.sign() * (drawn.abs() < share) / share**0.5
            return signs.to(layer.device, layer.dtype)

        return self.share(f"{role} {shape} {large} {self.bases} {self.seed} {layer.device} {layer.dtype}", make)

    def delta(self) -> Tensor:
        """One product of the bases side by side with their scaled rows below each other."""
        scales = (self.lamda * (self.alpha / self.lamda.shape[1]))[:, :, None] * self.gamma[:, None]
        rows = scales * self.right  # in this order backward keeps no product
        change = self.left.flatten(1) @ rows.flatten(0, 1)
        return (change.t() if self._turned else change).reshape(-1, *self._shape)
