"""StructuredLoRA: a square matrix between the two factors, and starts that come from the weight."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from visadapt.core.adapter import LowRank, kaiming, zeros
from visadapt.core.site import Site


class StructuredLoRA(LowRank):
    """ΔW = s · B N A,  s = alpha / rank: SLoRA, NLoRA and IntTune by their start.

    `start="random"` (SLoRA): A (rank, in, *kernel) and N (rank, rank) kaiming-uniform, B (out, rank) zero.
    `start="weight"` (NLoRA): A the first rows of W, B its first columns, N the corner of both, copied and all trained;
    `start="intermediate"` (IntTune): the same with N alone trained. A convolution is the matrix (out, in · kernel).
    Blocks of W are not zero: `residual="subtract"` takes s · B₀ N₀ A₀ off, so that training starts at W; with "none",
    as in the code, it starts a few per cent of ‖W‖ away. The Nyström method has N = (corner)⁺, the code the corner.

    Guo et al. 2025, arXiv 2502.14482, code: github.com/TracyGuo2001/NLoRA.

    Args:
        rank: side of N.
        alpha: numerator of the scale; None means `rank`.
        start: what A, N and B are at start, and which train.
        residual: whether what they are at start is taken off.
    """

    alpha: float | None = None
    start: Literal["random", "weight", "intermediate"] = "random"
    residual: Literal["subtract", "none"] = "subtract"

    def refuse(self, layer: Site) -> str | None:
        """Unknown options, and blocks larger than W."""
        if self.start not in ("random", "weight", "intermediate"):
            return f"start={self.start!r}: use 'random', 'weight' or 'intermediate'"
        if self.residual not in ("subtract", "none"):
            return f"residual={self.residual!r}: use 'subtract' or 'none'"
        sizes = layer.width, math.prod(layer.in_shape)
        if self.start != "random" and self.rank > min(sizes):
            return f"rank={self.rank}: its weight ({sizes[0]}, {sizes[1]}) has no such corner; lower the rank"
        return None

    def build(self, layer: Site) -> None:
        """Create A, N and B, and keep their start where it is taken off."""
        r = self.rank
        if self.start == "random":
            self.down, self.mid = kaiming(layer, r, *layer.in_shape), kaiming(layer, r, r)
            self.up: Tensor = zeros(layer, layer.width, r)
            return
        weight = layer.weight.to(layer.dtype)
        blocks = {"down": weight[:r], "mid": weight[:r].flatten(1)[:, :r], "up": weight.flatten(1)[:, :r]}
        for name, block in blocks.items():
            value = block.detach().clone().contiguous()
            if self.start == "weight" or name == "mid":
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
            if self.residual == "subtract" and (self.start == "weight" or name == "mid"):
                self.register_buffer(f"{name}_start", value.clone())

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and s·B N, less their start."""
        start = dict(self.named_buffers())
        if "down_start" not in start:
            mid = self.mid - start["mid_start"] if "mid_start" in start else self.mid
            return self.down, self.up @ (mid * self.scale)
        up, down = self.up @ (self.mid * self.scale), start["down_start"]
        up_start = start["up_start"] @ (start["mid_start"] * -self.scale)
        return torch.cat([self.down, down]), torch.cat([up, up_start], 1)
