"""Torch's fused transformer layers read the weights of their Linear layers and never call them: not with adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from visadapt.core.layer import Grafted


def leave(model: nn.Module) -> None:
    """Let `nn.TransformerEncoderLayer` call its layers in evaluation, too, where one of them has adapters.

    Torch does so where a forward hook is there; a hook that does nothing is put on. It stays when adapters go.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            if not any(isinstance(part, Grafted) for part in module.modules()):
                continue
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # which only the fused layer understands
            elif _nothing not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_nothing)


def _nothing(*_: Any) -> None:
    """Its presence is all."""
