"""Noise that a sampler turns back into given latents, and mixtures of it with fresh noise."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def invert(model: Any, latents: Tensor, text: Mapping[str, Tensor], steps: int = 50, refine: int = 0) -> Tensor:
    """DDIM inversion: the sampler's steps backwards, from latents to noise (Song et al. 2020, arXiv 2010.02502).

    With x = α · x₀ + σ · n, a step of the sampler goes from x' at the noisier (α', σ') to x = a · x' + b · p(x') with
    the network's prediction p, so x' = (x − b · p(x')) / a. As x' is not known yet, DDIM inversion predicts at x, told
    the time of x'. The error falls with the number of steps. Each round of ``refine`` predicts at the x' found so far;
    its fixed point is the exact inverse (Pan et al. 2023, arXiv 2309.04907; Garibi et al. 2024, arXiv 2403.14602).

    Args:
        model: What ``VideoDiffusion.build`` made; without guidance, with whatever adapters are active.
        latents: Scaled latents (B, F, C, h, w).
        text: Conditions of the B clips; MotionDirector takes the empty caption.
        steps: Steps of the sampler that is inverted.
        refine: Further passes for each step, for callers from Python: no option of a run sets it. With enough of them
            the same steps of Euler, for flow matching, and of DDIM with the time spacings "leading" and "trailing" give
            the latents back but for rounding. With "linspace" they do not: diffusers' DDIM then steps from t to
            t − T / steps, which is not the next time of its list.

    Returns:
        Noise (B, F, C, h, w), to start a sampler from.
    """
    x, levels = latents, levels_of(model, steps)
    for (alpha, sigma, _), (higher, noisier, told) in pairwise(levels):
        times = torch.full((len(x),), told, device=x.device, dtype=torch.float32 if told % 1 else torch.long)
        a, b = _step(model.prediction, (higher, noisier), (alpha, sigma))
        found = x
        for _ in range(1 + refine):
            found = (x - b * model(found, times, text)) / a
        x = found
    return x


def levels_of(model: Any, steps: int) -> list[tuple[float, float, float]]:
    """The (α, σ, time told) of a sampler's steps, from clean to noise; the time of the first is never told.

    DDIM's steps for epsilon and v, those of the base's own sampler for flow matching, where α = 1 − σ.
    """
    if model.prediction == "flow":
        sampler = type(model.sampler).from_config(model.sampler.config)
        sampler.set_timesteps(steps)
        told = [*sampler.timesteps.tolist(), 0]
        return [(1 - s, s, t) for s, t in zip(sampler.sigmas.tolist()[::-1], told[::-1], strict=True)]
    from diffusers import DDIMScheduler

    sampler = DDIMScheduler.from_config(model.sampler.config)
    sampler.set_timesteps(steps)
    told = sampler.timesteps.tolist()[::-1]
    kept = [float(sampler.final_alpha_cumprod), *(float(sampler.alphas_cumprod[int(t)]) for t in told)]
    return [(a**0.5, (1 - a) ** 0.5, t) for a, t in zip(kept, [0, *told], strict=True)]


def _step(prediction: str, start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    """Factors (a, b) of a deterministic step x = a · x' + b · p from one (α', σ') to another."""
    (higher, noisier), (alpha, sigma) = start, end
    if prediction == "epsilon":
        return alpha / higher, sigma - alpha * noisier / higher
    turn = sigma * higher - alpha * noisier  # v = α' n − σ' x₀, and flow's n − x₀, are turned alike
    return (1.0 if prediction == "flow" else alpha * higher + sigma * noisier), turn


def mixed_noise(prior: Tensor, fresh: Tensor, share: float) -> Tensor:
    """√p · prior + √(1 − p) · fresh: unit variance stays (Zhao et al. 2023, arXiv 2310.08465, code).

    Args:
        prior: Such as what ``invert`` gives.
        fresh: Normal noise of the same shape.
        share: p in 0 … 1.

    Raises:
        ValueError: p is no share.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share} of the inverted noise: 0 … 1 is needed; 0.1 to 0.5 are usual")
    return prior * share**0.5 + fresh * (1 - share) ** 0.5
