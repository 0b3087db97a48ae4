"""LoRA: low-rank adaptation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from visadapt.core.adapter import LowRank, kaiming, zeros
from visadapt.core.site import Site


class LoRA(LowRank):
    """ΔW = s · B A,  s = alpha / rank (alpha / √rank if `rslora`).

    A (rank, in, *kernel) is kaiming-uniform, B (out, rank) zero at start. On a convolution A is a
    convolution of the layer's kernel and stride, B is 1×1.

    Hu et al. 2021, arXiv 2106.09685, code: github.com/microsoft/LoRA. rsLoRA: Kalajdzievski 2023,
    arXiv 2312.03732. LoRA-FA: Zhang et al. 2023, arXiv 2308.03303.

    Args:
        rank: inner dimension.
        alpha: numerator of the scale; None means `rank`, a scale of 1.
        rslora: divide by √rank, which keeps the size of the update stable for large ranks.
        freeze_down: train B only (LoRA-FA); the layer's input need not be kept for backward.
        dropout: probability of dropping an element of the update's input, in training.
    """

    alpha: float | None = None
    rslora: bool = False
    freeze_down: bool = False
    dropout: float = 0.0

    def build(self, layer: Site) -> None:
        """Create A and B."""
        down = kaiming(layer, self.rank, *layer.in_shape)
        if self.freeze_down:
            self.register_buffer("down", down.data)
        else:
            self.down = down
        self.up: nn.Parameter = zeros(layer, layer.width, self.rank)

    def refuse(self, layer: Site) -> str | None:
        """Dropout without inputs."""
        if self.view and self.dropout > 0:
            return "dropout acts on inputs, which are not seen where a weight is read; use dropout=0"
        return None

    @property
    def scale(self) -> float:
        """The factor s."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def fusable(self) -> bool:
        """Dropout needs an input of its own."""
        return not (self.training and self.dropout > 0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and s·B: the scale goes to the smaller tensor, not to the output."""
        return self.down, self.up * self.scale if self.scale != 1 else self.up

    def side(self, x: Tensor, layer: Site) -> Tensor:
        """S · B A dropout(x)."""
        return layer.low_rank(F.dropout(x, self.dropout, self.training), *self.factors())
