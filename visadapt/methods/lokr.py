"""LoKr: a Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from visadapt.core.adapter import LowRank, kaiming, zeros
from visadapt.core.site import Site
from visadapt.maths.kronecker import beside_identity, kron, kron_apply, split


class LoKr(LowRank):
    """ΔW = s · L ⊗ (B A),  s = alpha / rank.

    L (o1, i1), B (o2, rank), A (rank, i2, *kernel) with o1 · o2 = out, i1 · i2 = in. R = B A is one tensor where
    rank ≥ max(o2, i2) / 2, and s = 1 where L and R are whole. L and B kaiming-uniform, A (or R) zero at start.
    It acts in thin steps, R within blocks of i2 inputs and L across them; as a LoRA it has rank min(o1, i1) · rank.

    Yeh et al. 2024 (LyCORIS), arXiv 2309.14859, code: github.com/KohakuBlueleaf/LyCORIS (4.1.3), whose splits,
    scale and start these are; Kronecker adapters before it: Edalati et al. 2022, arXiv 2212.10650.

    Differs from LyCORIS: ΔW is not formed, a merge applies the scale once, transposed convolutions work, no dropout.

    Args:
        rank: inner dimension of what is factored.
        alpha: numerator of the scale; None means `rank`, a scale of 1.
        factor: a factor of out and in where it divides them, else a bound on o1 and i1; -1 splits nearest to the root;
            two numbers are o1 and i1.
        decompose_both: factor L as well, where rank < max(o1, i1) / 2.
        full: keep L and R whole whatever the rank.
        tucker: on kernels larger than 1 R = T ×₁ B ×₂ A with T (rank, rank, *kernel) and A (rank, i2).
    """

    alpha: float | None = None
    factor: int | list[int] = -1
    decompose_both: bool = False
    full: bool = False
    tucker: bool = False
    fusable: ClassVar[bool] = False  # type: ignore[misc]  # thin steps are cheaper than the factors of a LoRA

    def _sizes(self, layer: Site) -> tuple[int, int, int, int]:
        sizes = layer.width, layer.in_shape[0]
        o1, i1 = (split(n, self.factor)[0] for n in sizes) if isinstance(self.factor, int) else self.factor
        return o1, i1, sizes[0] // o1, sizes[1] // i1

    def refuse(self, layer: Site) -> str | None:
        """Splits that do not divide the layer."""
        out, fan_in = layer.width, layer.in_shape[0]
        if isinstance(self.factor, int):
            return None if self.factor else "factor=0: give -1, a positive number, or the two sizes of L"
        if len(self.factor) == 2 and min(self.factor) > 0 and not (out % self.factor[0] or fan_in % self.factor[1]):
            return None
        return f"factor={self.factor}: give two divisors, of {out} outputs and of {fan_in} inputs, or one number"

    def build(self, layer: Site) -> None:
        """Create L and R, each whole or as factors."""
        (o1, i1, o2, i2), kernel, r = self._sizes(layer), layer.in_shape[1:], self.rank
        if self.decompose_both and r < max(o1, i1) / 2 and not self.full:
            self.left_up, self.left_down = kaiming(layer, o1, r), kaiming(layer, r, i1)
        else:
            self.left = kaiming(layer, o1, i1)
        if self.full or r >= max(o2, i2) / 2:
            self.right = zeros(layer, o2, i2, *kernel)
            return
        core = self.tucker and any(k != 1 for k in kernel)
        self.right_up = kaiming(layer, o2, r)
        self.right_down = zeros(layer, r, i2) if core else zeros(layer, r, i2, *kernel)
        if core:
            self.right_core = kaiming(layer, r, r, *kernel)

    @property
    def scale(self) -> float:
        """The factor s."""
        whole = hasattr(self, "left") and hasattr(self, "right")
        return 1.0 if self.alpha is None or whole else self.alpha / self.rank

    def _left(self) -> Tensor:
        return self.left_up @ self.left_down if hasattr(self, "left_up") else self.left

    def _right(self) -> tuple[Tensor, Tensor | None]:
        """A with T in it (or R, whole), and s · B (or nothing)."""
        if hasattr(self, "right"):
            return self.right * self.scale if self.scale != 1 else self.right, None
        up, core = self.right_up * self.scale if self.scale != 1 else self.right_up, hasattr(self, "right_core")
        return torch.einsum("pq...,qi->pi...", self.right_core, self.right_down) if core else self.right_down, up

    def delta(self) -> Tensor:
        """The formula itself."""
        right, up = self._right()
        return kron(self._left(), right if up is None else torch.einsum("qr,r...->q...", up, right))

    def factors(self) -> tuple[Tensor, Tensor]:
        """L₂ ⊗ A and L₁ ⊗ B, where L = L₁ L₂ and R = B A; what is whole has an identity on its shorter side."""
        down, up = self._right()
        up, down = beside_identity(down) if up is None else (up, down)
        first, second = (self.left_up, self.left_down) if hasattr(self, "left_up") else beside_identity(self.left)
        return kron(second, down), kron(first, up)

    def onto(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """W x + b + ΔW x in one operation."""
        return kron_apply(x, self._left() * self.strength, *self._right(), weight, bias)

    def side(self, x: Tensor, layer: Site) -> Tensor:
        """ΔW ∗ x: R within blocks of i2 channels, L across them; dense where a convolution has groups."""
        if layer.groups > 1:
            return layer.op(x, self.delta())
        left, (down, up) = self._left(), self._right()
        if down.dim() == 2:
            return kron_apply(x, left, down, up)
        places = x.dim() - (down.dim() - 2)
        blocks = x.reshape(-1, down.shape[1], *x.shape[places:])
        core = getattr(self, "right_core", None)
        z = layer.op(blocks, down) if core is None else layer.op(layer.pointwise(blocks, self.right_down), core)
        m = left.to(z.dtype) @ z.reshape(-1, left.shape[1], z[0].numel())
        m = m.reshape(*x.shape[: places - 1], -1, *z.shape[2:])
        return m if up is None else layer.pointwise(m, up)
