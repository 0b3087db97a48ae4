"""MiSS (first called Bone): one shard shared by all groups of inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visadapt.core.adapter import LowRank, zeros
from visadapt.core.site import Site


class MiSS(LowRank):
    """ΔW[o, c] = D[o, c mod rank]:  ΔW = D · [I I I …],  the same shard D for every group of `rank` inputs.

    D (out, rank, *kernel) is zero at start; where rank does not divide the inputs, the last group is cut. It is a LoRA
    whose down-projection only sums inputs, so nothing of the size of x is kept for backward.

    Kang & Yin 2024, arXiv 2409.15371 (versions: Bone, DiSHA, MiSS), code: github.com/JL-er/MiSS. Convolutions are ours:
    each tap of the kernel has a shard.

    Args:
        rank: number of inputs in a group; ΔW has rank up to that (times the kernel).
        mini: outputs of D, which is repeated for the others; None is all of them. It must divide the outputs.
    """

    rank: int = 64
    mini: int | None = None

    def refuse(self, layer: Site) -> str | None:
        """A `mini` that does not divide the outputs."""
        if self.mini is not None and (self.mini < 1 or layer.width % self.mini):
            return f"mini={self.mini} does not divide its {layer.width} outputs"
        return None

    def build(self, layer: Site) -> None:
        """Create D and the sum over groups."""
        rank, fan_in = min(self.rank, layer.in_shape[0]), layer.in_shape[0]
        self.shard = zeros(layer, self.mini or layer.width, rank, *layer.in_shape[1:])
        self._repeat = layer.width // len(self.shard)
        eye = torch.eye(rank, device=layer.device, dtype=layer.dtype)
        self.groups: Tensor
        self.register_buffer("groups", eye.repeat(1, -(-fan_in // rank))[:, :fan_in].contiguous(), persistent=False)

    @property
    def fusable(self) -> bool:
        """Kernels of one tap are two factors; for the others the sum comes first."""
        return math.prod(self.shard.shape[2:]) == 1

    def _shards(self) -> Tensor:
        return self.shard.repeat(self._repeat, *[1] * (self.shard.dim() - 1)) if self._repeat > 1 else self.shard

    def factors(self) -> tuple[Tensor, Tensor]:
        """The sums at each tap of the kernel, and D."""
        kernel = self.shard.shape[2:]
        if not kernel:
            return self.groups, self._shards()
        taps = torch.eye(math.prod(kernel), dtype=self.groups.dtype, device=self.groups.device).view(-1, *kernel)
        down = torch.einsum("ri,t...->rti...", self.groups, taps).flatten(0, 1)
        return down, self._shards().flatten(1)

    def delta(self) -> Tensor:
        """The formula itself."""
        return torch.einsum("or...,ri->oi...", self._shards(), self.groups)

    def side(self, x: Tensor, layer: Site) -> Tensor:
        """D ∗ (sums of x); densely where groups of channels do not share D's inputs."""
        if layer.groups > 1:
            return layer.op(x, self.delta())
        return layer.op(layer.pointwise(x, self.groups), self._shards())
