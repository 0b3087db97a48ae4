"""DoRA: magnitude and direction of a weight, adapted apart."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from visadapt.core.adapter import WeightMap, kaiming, ones, zeros
from visadapt.core.site import Site


class DoRA(WeightMap):
    """W' = m ⊙ V / ‖V‖,  V = W + s · B A,  s = alpha / rank.

    ‖V‖ is the norm of each output row (`axis="out"`, m (out,)) or of each input channel
    (`axis="in"`, m (in,)); m starts at ‖W‖, A (rank, in, *kernel) kaiming-uniform, B (out, rank)
    zero. The bias is not scaled. Rows of W that are zero stay so.

    Liu et al. 2024, arXiv 2402.09353, code: github.com/NVlabs/DoRA (7e2f10a). The paper writes the
    norm over columns; its code and PEFT take rows. MapSAM (Xia et al. 2024, arXiv 2411.06971) takes
    inputs and lets gradients through the norm.

    The row norm is never computed from V: ‖V‖² = ‖W‖² + 2s Σ B∘(WAᵀ) + s² Σ B∘(B AAᵀ).

    Args:
        rank: inner dimension of the direction's update.
        alpha: numerator of the scale; None means `rank`.
        axis: which norms m replaces.
        detach_norm: treat ‖V‖ as a constant in backward (the paper's section 4.3).
    """

    no_decay: ClassVar[tuple[str, ...]] = ("magnitude",)

    rank: int = 8
    alpha: float | None = None
    axis: Literal["out", "in"] = "out"
    detach_norm: bool = True

    def build(self, layer: Site) -> None:
        """Create A, B and m = ‖W‖, which must be the pre-trained W (else `rebuild`)."""
        self.down = kaiming(layer, self.rank, *layer.in_shape)
        self.up = zeros(layer, layer.width, self.rank)
        self.magnitude = ones(layer, layer.width if self.axis == "out" else layer.in_shape[0])
        with torch.no_grad():
            self.magnitude.copy_(_norm(layer.weight.to(self.up.dtype), self.axis))

    def refuse(self, layer: Site) -> str | None:
        """Input channels of a grouped convolution have no common norm, a weight of zeros has no direction."""
        if self.axis == "in" and layer.groups > 1:
            return "axis='in' has no meaning on a grouped convolution; use axis='out'"
        if not layer.weight.is_meta and not bool(layer.weight.any()):
            return "its weight is zero, which has no direction and could not learn; use LoRA there"
        return None

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def new_weight(self, weight: Tensor) -> Tensor:
        """M ⊙ V / ‖V‖, the formula itself."""
        exact = torch.promote_types(weight.dtype, self.up.dtype)
        v = weight.to(exact) + self.scale * (self.up @ self.down.flatten(1)).view_as(weight)
        norm = _norm(v.detach() if self.detach_norm else v, self.axis)
        gain = self.magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        shape = (-1, *[1] * (weight.dim() - 1)) if self.axis == "out" else (1, -1, *[1] * (weight.dim() - 2))
        return (v * gain.view(shape)).to(weight.dtype)

    def scaled_factors(self, layer: Site) -> tuple[Tensor, Tensor, Tensor] | None:
        """A, s·B and m / ‖V‖ with the norm from r-sized products, in fp32 under autocast too."""
        if self.axis == "in":
            return None
        keep = torch.is_grad_enabled() and not self.detach_norm
        with torch.autocast(self.up.device.type, enabled=False), torch.set_grad_enabled(keep):
            w, a, b = layer.weight.flatten(1).to(self.up.dtype), self.down.flatten(1), self.up * self.scale
            square = torch.linalg.vector_norm(w, dim=1).square() + ((2 * (w @ a.t()) + b @ (a @ a.t())) * b).sum(1)
            norm = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
        return self.down, self.up * self.scale, self.magnitude / norm


def _norm(weight: Tensor, axis: str) -> Tensor:
    return weight.flatten(1).norm(dim=1) if axis == "out" else weight.transpose(0, 1).flatten(1).norm(dim=1)
