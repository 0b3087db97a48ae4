"""Losses of clips as pure functions of the error e = prediction − target (B, F, C, h, w), exact in float64.

MotionDirector (Zhao et al. 2023, arXiv 2310.08465, section 4; official code: github.com/showlab/MotionDirector) states
its appearance-debiased loss by φ of noise and prediction. φ is linear, so φ of the error is all that is needed, in
whatever the network predicts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visadapt.losses.diffusion import per_sample


def frames_of(x: Tensor, index: Tensor) -> Tensor:
    """One frame (B, 1, C, h, w) of each clip (B, F, C, h, w), by its number (B,)."""
    return x[torch.arange(len(x), device=x.device), index.to(x.device)][:, None]


def debiased(error: Tensor, anchor: Tensor, beta: float = 1.0) -> Tensor:
    """φ(e) = √(β² + 1) · e − β · e_anchor, of the shape of e.

    What all frames share keeps √(β² + 1) − β of itself (0.41 for β = 1): it counts less, but is not taken out. For
    independent noise of variance 1, φ has variance 2β² + 1 in every frame but the anchor, and (√(β² + 1) − β)² there.

    Args:
        error: e (B, F, C, h, w).
        anchor: Number of the anchor frame of each clip (B,).
        beta: β ≥ 0; 0 changes nothing.

    Raises:
        ValueError: β is negative.
    """
    if beta < 0:
        raise ValueError(f"debias: {beta}; it must not be negative (1 is the paper's), or null for the plain loss")
    return (beta**2 + 1) ** 0.5 * error - beta * frames_of(error, anchor)


def temporal(
    error: Tensor, anchor: Tensor, beta: float = 1.0, pointwise: Callable[[Tensor], Tensor] = torch.square
) -> Tensor:
    """Losses (B,) of clips, mean e² + mean φ(e)²: the plain one plus the appearance-debiased one.

    Args:
        error: e (B, F, C, h, w).
        anchor: Number of the anchor frame of each clip (B,).
        beta: β of φ; 0 gives twice the plain loss.
        pointwise: Loss of each element, the square or a robust one.
    """
    return per_sample(pointwise(error)) + per_sample(pointwise(debiased(error, anchor, beta)))
