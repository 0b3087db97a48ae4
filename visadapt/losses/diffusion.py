"""Diffusion as pure functions of tensors: noising, targets, times, weights and robust losses.

With alpha² + sigma² = 1, or alpha = 1 − sigma for rectified flow, a noisy sample is x_t = alpha · x + sigma · n. Times
are u in 0 … 1, where 1 is noise; all functions are elementwise over the batch and exact in float64.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Prediction = Literal["epsilon", "v_prediction", "flow"]
Sampling = Literal["uniform", "logit_normal", "cubic"]
Kind = Literal["mse", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "snr", "exponential"]


def draw_times(
    count: int,
    how: Sampling = "uniform",
    low: float = 0.0,
    high: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """Times u (count,) in low … high, below high, in float64 from a CPU generator.

    uniform: u = r. logit_normal: u = sigmoid(mean + std · n) (Esser et al. 2024, arXiv 2403.03206, section 3.1).
    cubic: u = 1 − r³, which favours noisy times (Mou et al. 2023, arXiv 2302.08453, section 3.4).

    Raises:
        ValueError: not 0 ≤ low < high ≤ 1.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"times from {low} to {high}: 0 ≤ t_min < t_max ≤ 1 is needed, 1 is pure noise")
    if how == "logit_normal":  # float64: float32 would round up to `high`
        u = torch.sigmoid(mean + std * torch.randn(count, generator=generator, dtype=torch.float64))
    else:
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        u = 1 - u**3 if how == "cubic" else u
    return (low + (high - low) * u).clamp(max=math.nextafter(high, 0))


def steps_of(times: Tensor, count: int) -> Tensor:
    """Steps 0 … count−1 of a discrete schedule that the times fall into."""
    return (times * count).long().clamp(0, count - 1)


def coefficients(times: Tensor, signal: Tensor | None) -> tuple[Tensor, Tensor]:
    """The alpha and sigma (B,) at the times.

    Args:
        times: u (B,).
        signal: The schedule's cumulative alphas (T,), alpha² of each step; None is rectified flow (Liu et al. 2022,
            arXiv 2209.03003), alpha = 1 − u and sigma = u.
    """
    if signal is None:
        return 1 - times, times
    kept = signal[steps_of(times, len(signal))]
    return kept.sqrt(), (1 - kept).sqrt()


def noised(x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Noisy samples alpha · x + sigma · n."""
    return _like(alpha, x) * x + _like(sigma, x) * noise


def target(prediction: Prediction, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network shall predict.

    epsilon: n (Ho et al. 2020, arXiv 2006.11239). v_prediction: alpha · n − sigma · x (Salimans & Ho 2022, arXiv
    2202.00512). flow: n − x, the velocity of rectified flow.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "flow":
        return noise - x
    return _like(alpha, x) * noise - _like(sigma, x) * x


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Signal-to-noise ratio (alpha / sigma)²."""
    return (alpha / sigma) ** 2


def min_snr(prediction: Prediction, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of the loss: min(SNR, γ) on the error of the implied clean sample.

    Hang et al. 2023, arXiv 2303.09556 (code: github.com/TiankaiHang/Min-SNR-Diffusion-Training), who state it for
    epsilon, min(SNR, γ) / SNR, and for v, min(SNR, γ) / (SNR + 1). Here both come from one rule, x = x_t / alpha −
    (sigma / alpha) · n = alpha · x_t − sigma · v; the same rule gives flow, where x = x_t − sigma · v.

    Raises:
        ValueError: γ is not positive.
    """
    if gamma <= 0:
        raise ValueError(f"snr_gamma: {gamma}; it must be positive (5 is usual), or null for none")
    share = sigma / alpha if prediction == "epsilon" else sigma
    ratio = snr(alpha, sigma)
    # At zero SNR epsilon's weight is 0 · ∞ = min(SNR, γ) / SNR = 1.
    return torch.where(ratio > 0, ratio.clamp(max=gamma) * share**2, (prediction == "epsilon") * torch.ones_like(ratio))


def huber_width(schedule: HuberSchedule, width: float, times: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Widths δ (B,) of a robust loss, from quadratic at early times to ``width`` at pure noise.

    constant: δ. exponential: δ^u, from 1 to δ. snr: (1 − δ) / (1 + sigma / alpha)² + δ. Khrapov et al. 2024, arXiv
    2403.16728; the snr form as kohya's sd-scripts has it (github.com/kohya-ss/sd-scripts, ``library/train_util.py``).

    Raises:
        ValueError: δ is not in 0 … 1, or not positive.
    """
    if not 0 < width <= 1:
        raise ValueError(f"huber width {width}: 0 < width ≤ 1")
    if schedule == "constant":
        return torch.full_like(alpha, width)
    if schedule == "exponential":
        return width ** times.to(alpha.dtype)
    return (1 - width) / (1 + sigma / alpha) ** 2 + width


def pointwise(kind: Kind, error: Tensor, width: Tensor | None = None) -> Tensor:
    """Losses of each element of an error (B, …).

    mse: e². huber: 2δ(√(e² + δ²) − δ), about e² where it is small. smooth_l1: 2(√(e² + δ²) − δ), about 2|e| where it
    is large (the pseudo-Huber forms of kohya's sd-scripts, after arXiv 2403.16728).
    """
    if kind == "mse" or width is None:
        return error**2
    delta = _like(width, error)
    root = 2 * ((error**2 + delta**2).sqrt() - delta)
    return delta * root if kind == "huber" else root


def per_sample(losses: Tensor, mask: Tensor | None = None) -> Tensor:
    """Means (B,) of losses (B, C, h, w), over the mask where there is one.

    Args:
        losses: Of each element.
        mask: Weights ≥ 0 (B, 1, H, W), averaged down to (h, w). A sample without any weight counts 0.
    """
    if mask is None:
        return losses.flatten(1).mean(1)
    weights = F.interpolate(mask.to(losses), losses.shape[-2:], mode="area")
    total = (losses.mean(1, keepdim=True) * weights).flatten(1).sum(1)
    return total / weights.flatten(1).sum(1).clamp_min(torch.finfo(losses.dtype).tiny)


def with_prior(losses: Tensor, prior: Tensor | None, weight: float) -> Tensor:
    """Mean over the instance samples plus ``weight`` times the mean over the class samples, a 0-d tensor.

    Ruiz et al. 2022 (DreamBooth), arXiv 2208.12242, equation 2.

    Args:
        losses: (B,).
        prior: Which samples are of the class (B,), or None.
        weight: λ.
    """
    if prior is None:
        return losses.mean()
    prior = prior.to(losses.device)
    own, other = (~prior).to(losses), prior.to(losses)
    return (losses * own).sum() / own.sum().clamp_min(1) + weight * (losses * other).sum() / other.sum().clamp_min(1)


def offset_noise(noise: Tensor, offset: float, generator: Generator | None = None) -> Tensor:
    """Noise (B, …, C, h, w) plus ``offset`` · one normal number per sample and channel: mean brightness becomes free.

    All frames of a clip share it. Guttenberg 2023, www.crosslabs.org/blog/diffusion-with-offset-noise.
    """
    if not offset:
        return noise
    shape = (len(noise), *[1] * (noise.dim() - 4), noise.shape[-3], 1, 1)
    extra = torch.randn(shape, generator=generator)
    return noise + offset * extra.to(noise)


def perturbed(noise: Tensor, strength: float, generator: Generator | None = None) -> Tensor:
    """Noise of the input alone, n + γ · n' (the target keeps n): Ning et al. 2023, arXiv 2301.11706."""
    if not strength:
        return noise
    return noise + strength * torch.randn(noise.shape, generator=generator).to(noise)


def strata(index: Tensor, count: int) -> Tensor:
    """Fixed times (B, count) for a validation loss: sample i has one in each of ``count`` equal strata.

    Within the strata the samples lie at the fractions of (i + ½) · golden ratio, so few samples cover the axis evenly
    and always alike.
    """
    inside = ((index.double() + 0.5) * (math.sqrt(5) - 1) / 2).frac()
    return (torch.arange(count).double() + inside[:, None]) / count


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x).view(-1, *[1] * (x.dim() - 1))
