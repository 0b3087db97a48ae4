"""SSF: scaling and shifting features."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from visadapt.core.adapter import FeatureMap, ones, zeros
from visadapt.core.site import Site


class SSF(FeatureMap):
    """y' = γ ⊙ y + β, per output channel.

    γ (out,) is one and β (out,) zero at start; merged: W' = diag(γ) W, b' = γ ⊙ b + β.

    Lian et al. 2022, arXiv 2210.08823, code: github.com/dongzelian/SSF (e94e0e7).

    Differs from the paper: it draws γ ~ N(1, 0.02²) and β ~ N(0, 0.02²), which is not the identity
    at start (`init="normal"`); it also puts a pair behind every normalisation, here only behind
    linear layers and convolutions.

    Args:
        init: "identity", or "normal" as in the paper.
    """

    affine: ClassVar[bool] = True
    no_decay: ClassVar[tuple[str, ...]] = ("scale", "shift")

    init: Literal["identity", "normal"] = "identity"

    def build(self, layer: Site) -> None:
        """Create γ and β."""
        self.scale, self.shift = ones(layer, layer.width), zeros(layer, layer.width)
        if self.init == "normal":
            nn.init.normal_(self.scale, mean=1.0, std=0.02)
            nn.init.normal_(self.shift, std=0.02)

    def refuse(self, layer: Site) -> str | None:
        """An unknown option."""
        known = self.init in ("identity", "normal")
        return None if known else f"init={self.init!r}: use 'identity' or 'normal'"

    def forward(self, x: Tensor, y: Tensor, layer: Site) -> Tensor:
        """γ ⊙ y + β in y's precision."""
        scale, shift = (layer.per_channel(v).to(y.dtype) for v in (self.scale, self.shift))
        return torch.addcmul(shift, y, scale)
