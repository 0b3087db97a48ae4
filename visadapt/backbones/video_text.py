"""Prompts → embeddings, as the stock video pipelines make them for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def encode_prompts(model: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Text conditions of a ``VideoModel``, one row for each clip; the gradient reaches its text encoder.

    Args:
        model: What ``VideoDiffusion.build`` made.
        prompts: B texts.

    Returns:
        ``embeddings`` (B, N, C) in at least float32, and ``mask`` (B, N) where a family does without the padding.
    """
    found: dict[str, Tensor] = model.spec.encode_text(model, list(prompts))
    return found


def null_text(model: Any) -> dict[str, Tensor]:
    """The condition (1, …) that inference takes for "no prompt", to drop captions by: the empty caption."""
    return encode_prompts(model, [""])
