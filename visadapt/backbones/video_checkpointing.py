"""Gradient checkpointing of the video UNets, layer by layer.

diffusers recomputes the residual blocks of AnimateDiff's UNet alone, and nothing of ``UNet3DConditionModel``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_LAYERS = (
    "ResnetBlock2D",
    "TemporalConvLayer",
    "Transformer2DModel",
    "TransformerTemporalModel",
    "AnimateDiffTransformer3D",
)


def recompute_layers(network: nn.Module) -> None:
    """Let residual blocks and transformers keep their inputs alone and compute the rest again in backward, in place.

    Names, outputs and gradients stay the same, dropout included; frozen inputs still give gradients.
    """
    for module in network.modules():
        kind: Any = type(module)
        if kind.__name__ in _LAYERS:
            module.__class__ = _recomputing(kind)


@cache
def _recomputing(kind: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)
        return checkpoint(kind.forward, self, *args, use_reentrant=False, **kwargs)

    return type(f"Recomputing{kind.__name__}", (kind,), {"forward": forward, "__doc__": kind.__doc__})
