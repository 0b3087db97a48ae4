"""A classifier by angles: no class wins by the length of its vector, as later ones do in a sequence of tasks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Linear):
    """Scores s · cos(f, w_c) of features f (B, d) with class vectors w_c (Hou et al. 2019, CVPR, section 3.2).

    Args:
        features: Width d.
        classes: Number of classes.

    Attributes:
        weight: The class vectors (classes, d), of any length.
        scale: The learned factor s, at first 16.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes, bias=False)
        self.scale = nn.Parameter(torch.tensor(16.0))

    def forward(self, input: Tensor) -> Tensor:
        """Scores (B, classes)."""
        return self.scale * F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1).to(input.dtype))


def replace_classifier(model: Any, head: nn.Module) -> None:
    """Put another classifier where ``model.get_classifier()`` finds its own.

    Raises:
        ValueError: The classifier is no single layer.
    """
    old = model.get_classifier()
    path = next((name for name, module in model.named_modules() if module is old), None)
    if path is None or not isinstance(old, nn.Linear):
        raise ValueError(f"model.head: {type(model).__name__} has no single linear classifier; use head: linear")
    model.set_submodule(path, head)
