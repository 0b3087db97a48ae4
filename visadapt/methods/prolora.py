"""PRoLoRA: factors made of one chunk, rotated along the rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visadapt.core.adapter import LowRank, kaiming, zeros
from visadapt.core.site import Site


class PRoLoRA(LowRank):
    """ΔW = s · B A,  A = [A_u; A₀ | roll(A₀, p) | roll(A₀, 2p) | …],  B likewise along outputs,  s = alpha / rank.

    Of the rank, `unshared` rows A_u (unshared, in, *kernel) and columns B_u (out, unshared) are LoRA's own. The others
    repeat one chunk A₀ (q, ⌈in / chunks⌉, *kernel) and B₀ (⌈out / chunks⌉, q), q = rank − unshared; chunk k is rolled
    by k · p along the rank, p = max(⌊q / chunks⌋, 1). The last is cut where `chunks` does not divide. A_u and A₀ have
    the same bound U(±1/√(in · kernel)), B_u and B₀ are zero at start.

    Wang et al. 2024, arXiv 2402.16902; there is no official code.

    Args:
        rank: inner dimension.
        unshared: rows that are not shared.
        chunks: m = n, how many times a chunk is repeated.
        alpha: numerator of the scale; None means `rank`.
    """

    unshared: int = 1
    chunks: int = 7
    alpha: float | None = None

    def refuse(self, layer: Site) -> str | None:
        """Numbers without meaning."""
        if not 0 <= self.unshared <= self.rank or self.chunks < 1:
            return f"unshared={self.unshared} is from 0 to rank={self.rank}, and chunks={self.chunks} at least 1"
        return None

    def build(self, layer: Site) -> None:
        """Create the unshared parts and the chunks, where there are any."""
        self._sizes = layer.width, layer.in_shape[0]
        q, m = self.rank - self.unshared, self.chunks
        if self.unshared:
            self.down = kaiming(layer, self.unshared, *layer.in_shape)
            self.up = zeros(layer, layer.width, self.unshared)
        if q:
            first = kaiming(layer, q, *layer.in_shape)  # the bound is that of the whole row
            self.down_chunk = nn.Parameter(first.data[:, : -(-layer.in_shape[0] // m)].clone())
            self.up_chunk = zeros(layer, -(-layer.width // m), q)

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors written out."""
        downs: list[Tensor] = [self.down] if self.unshared else []
        ups: list[Tensor] = [self.up] if self.unshared else []
        if self.unshared < self.rank:
            step = max((self.rank - self.unshared) // self.chunks, 1)
            rows = [self.down_chunk.roll(k * step, 0) for k in range(self.chunks)]
            downs.append(torch.cat(rows, 1)[:, : self._sizes[1]])
            columns = [self.up_chunk.roll(k * step, 1) for k in range(self.chunks)]
            ups.append(torch.cat(columns)[: self._sizes[0]])
        return torch.cat(downs), torch.cat(ups, 1) * self.scale
