"""The frozen models that carry adapters in the benchmark: one linear layer, one convolution, ViT-B/16."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Host:
    """A frozen model and its input.

    Attributes:
        name: in tables and on the command line.
        suite: ``linear``, ``conv`` or ``vit``.
        shape: of the input; its first axis is the batch.
        build: makes the model; an argument of True asks for the small one of the float64 check.
        targets: patterns for ``visadapt.adapt``.
        pattern: the same layers as a regular expression over whole module names.
        source: parameter at the start of the model that takes a gradient, so that the gradient crosses all of
            it as it does in front of a trained stem; empty when the input itself takes one.
    """

    name: str
    suite: str
    shape: tuple[int, ...]
    build: Callable[[bool], nn.Module]
    targets: tuple[str, ...] = ("0",)
    pattern: str = "0"
    source: str = ""

    def input(self, dtype: torch.dtype, device: str, seed: int = 0, batch: int | None = None) -> Tensor:
        """Gaussian input; a leaf that takes a gradient unless a parameter (`source`) does."""
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(device, dtype).requires_grad_(not self.source)

    def open(self, model: nn.Module) -> nn.Module:
        """Let the gradient through to the start of ``model``, after an adapter library froze it."""
        if self.source:
            model.get_parameter(self.source).requires_grad_(True)
        return model

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers that get an adapter."""
        return {name: m for name, m in model.named_modules() if re.fullmatch(self.pattern, name)}


def share(model: nn.Module) -> nn.Module:
    """Copy the modules but not the weights: a dozen cases of one process use the same frozen tensors."""
    state = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in state})


def freeze(model: nn.Module) -> nn.Module:
    """Stop every gradient of the model's own parameters."""
    return model.requires_grad_(False)


def _linear(fan_in: int, fan_out: int) -> Callable[[bool], nn.Module]:
    return lambda small: nn.Sequential(nn.Linear(fan_in, fan_out))


def _conv(small: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(320, 320, 3, padding=1))


def vit(depth: int) -> Callable[[bool], nn.Module]:
    """ViT-B/16 of ``depth`` blocks with random weights and no head."""

    def build(small: bool) -> nn.Module:
        import timm

        return timm.create_model("vit_base_patch16_224", num_classes=0, depth=1 if small else depth)

    return build


def hosts(depth: int = 12) -> dict[str, Host]:
    """Every host by name; ``depth`` shortens the ViT for a quick look."""
    block_linears = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
    found = [
        Host("linear768", "linear", (8, 197, 768), _linear(768, 768)),
        Host("linear3072", "linear", (2, 2048, 768), _linear(768, 3072)),
        Host("conv320", "conv", (2, 320, 32, 32), _conv),
        Host(
            "vit_b16" if depth == 12 else f"vit_b16_depth{depth}",
            "vit",
            (4, 3, 224, 224),
            vit(depth),
            ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
            block_linears,
            "pos_embed",
        ),
    ]
    return {host.name: host for host in found}
