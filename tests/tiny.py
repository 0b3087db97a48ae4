"""Tiny models that tests share."""

from __future__ import annotations

import timm
import torch
from torch import nn

import visadapt as va

# A method of each kind of low-rank form; that what a method states is its update is a property of the grid.
FORMS = ["LoRA", "FLoRA", "WaRA", "LoHa", "LoKr", "B4M", "SDLoRA"]


def tiny_vit(num_classes: int = 10, seed: int = 0) -> nn.Module:
    """A ViT of 33 k parameters: 32×32 images, 16 tokens, two blocks."""
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=num_classes
    )


def images(n: int = 2) -> torch.Tensor:
    """N random images."""
    torch.manual_seed(5)
    return torch.randn(n, 3, 32, 32)


def moved(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """The model with every adapter tensor away from its start."""
    torch.manual_seed(6)
    with torch.no_grad():
        for adapter in va.adapters(model).values():
            for parameter in adapter.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
    return model
