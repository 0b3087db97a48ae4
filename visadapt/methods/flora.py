"""FLoRA: a low-rank core in the weight's own dimensions."""

from __future__ import annotations

import math

from torch import Tensor, nn

from visadapt.core.adapter import LowRank, normal, zeros
from visadapt.core.site import Site
from visadapt.maths.tucker import tucker


class FLoRA(LowRank):
    """ΔW = s · G ×₁ U ×₂ V ×₃ P ×₄ Q …  (Tucker): a core as many-dimensional as the weight.

    G (r_out, r_in, k_1, k_2, …) zero at start; U (out, r_out), V (in, r_in) and one matrix
    (kernel size, k_i) per kernel axis, all normal with variance 1 / (2 · columns) as in the code
    (kaiming_normal, a = √3). On a Linear ΔW = s · U G Vᵀ. r_out = r_in = rank, k_i = kernel_rank,
    each at most the size of its mode. The first step moves G alone: the others have zero gradient.

    Si et al. 2024, arXiv 2405.14739, code: github.com/SJTU-DeepVisionLab/FLoRA (d424560).

    Differs from the code: modes are in torch's order (out, in, kernel), the code has (in, out, …);
    ΔW is not formed in the forward pass, but applied as 1×1 → kernel → 1×1 where that is cheaper;
    grouped convolutions work; no dropout.

    Args:
        rank: size of the core along outputs and inputs.
        kernel_rank: size of the core along each kernel axis.
        scale: plain multiplier s, not divided by the rank (4 in the official example).
    """

    kernel_rank: int = 2
    scale: float = 4.0

    def build(self, layer: Site) -> None:
        """Create G, U, V and the kernel matrices."""
        fan_in, *kernel = layer.in_shape
        r_out, r_in = min(self.rank, layer.width), min(self.rank, fan_in)
        ranks = [min(self.kernel_rank, k) for k in kernel]
        self.core = zeros(layer, r_out, r_in, *ranks)
        self.up = _factor(layer, layer.width, r_out)
        self.inner = _factor(layer, fan_in, r_in)
        self.axes = nn.ParameterList(_factor(layer, k, r) for k, r in zip(kernel, ranks))
        # Multiplications per application of the kernel: `down` at once, or 1×1 and a small kernel.
        taps = math.prod(kernel)
        two = fan_in * r_out * taps
        three = fan_in * r_in * layer.stride + r_in * r_out * taps
        self._chain = layer.groups == 1 and three < two

    @property
    def fusable(self) -> bool:
        """Whether two factors are as cheap as three."""
        return not self._chain

    def factors(self) -> tuple[Tensor, Tensor]:
        """Core, V and the kernel matrices as one down-projection; s·U."""
        return tucker(self.core, None, self.inner, *self.axes), self.up * self.scale

    def chain(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Vᵀ to r_in channels, the core with its kernel axes at full size, s·U to the outputs."""
        if not self._chain:
            return None
        return self.inner.t(), tucker(self.core, None, None, *self.axes), self.up * self.scale


def _factor(layer: Site, size: int, rank: int) -> nn.Parameter:
    return normal(layer, size, rank, std=(2 * rank) ** -0.5)
