"""Figures of rendered pictures from the features (N, D) of a stated extractor (`visadapt.metrics.features`)."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUBSETS = 50


class _Known(nn.Identity):
    """Stands for the extractor where features are at hand already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def kid(found: Tensor, real: Tensor) -> float:
    """Kernel inception distance, MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y) with k(x, y) = (x·y / D + 1)³.

    The estimate is unbiased at any number of pictures (Bińkowski et al. 2018, arXiv 1801.01401, code:
    github.com/mbinkowski/MMD-GAN), so small sets may be compared; with few it is noisy and can be negative. It has
    the unit of the features to the sixth, so only figures of one extractor compare. Sets of unequal size: the mean over
    50 random subsets of the larger, drawn from a fixed seed.

    Args:
        found: Features (N, D) of renders.
        real: Features (M, D) of real pictures.

    Raises:
        ValueError: fewer than two pictures on a side.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = _least(found, real)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps the features, which are at hand here
        metric = KernelInceptionDistance(_Known(found.shape[1]), 1 if len(found) == len(real) else SUBSETS, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        metric.update(real.double(), real=True)
        metric.update(found.double(), real=False)
        return float(metric.compute()[0])


def fid(found: Tensor, real: Tensor) -> float:
    """Fréchet inception distance, ‖μ − ν‖² + tr(Σ + Τ − 2 (Σ Τ)^½), of two normal laws fitted to the features.

    Heusel et al. 2017, arXiv 1706.08500 (code: github.com/bioinf-jku/TTUR). In squared units of the features. Biased:
    the fewer pictures, the larger, and with fewer than features the covariances are singular. Compare only equal
    numbers of pictures, thousands of them; `kid` has no bias.

    Args:
        found: Features (N, D) of renders.
        real: Features (M, D) of real pictures.

    Raises:
        ValueError: fewer than two pictures on a side.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _least(found, real)
    metric = FrechetInceptionDistance(_Known(found.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(found.double(), real=False)
    return float(metric.compute())


def similarity(found: Tensor, real: Tensor) -> float:
    """Mean cosine over all pairs of a render and a real picture, in −1 … 1.

    DreamBooth's subject fidelity (Ruiz et al. 2023, arXiv 2208.12242, section 4.2; no official code), there with DINO
    and CLIP. Its scale depends on the extractor: read it between the base's value and that `among` the real pictures. A
    mean over pairs has no bias; with few pictures it depends on which.
    """
    return float((_unit(found) @ _unit(real).T).mean())


def among(real: Tensor) -> float:
    """Mean cosine over all pairs of two different pictures: how alike real ones are, the ceiling of `similarity`.

    Raises:
        ValueError: fewer than two pictures.
    """
    count = _least(real)
    cosines = _unit(real) @ _unit(real).T
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def diversity(found: Tensor) -> float:
    """Mean 1 − cosine over pairs of renders of one prompt, then over prompts, in 0 … 2; 0: the seed changes nothing.

    Args:
        found: Features (prompts, seeds, D).

    Raises:
        ValueError: fewer than two seeds.
    """
    return 1 - sum(among(one) for one in found) / len(found)


def drift(found: Tensor, before: Tensor) -> float:
    """Mean 1 − cosine between renders of the same prompts and seeds by two models, in 0 … 2; 0: nothing changed.

    Args:
        found: Features (N, D) of one model's renders.
        before: Features (N, D) of the other's.
    """
    return float(1 - (_unit(found) * _unit(before)).sum(1).mean())


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.double(), dim=1)


def _least(*sets: Tensor) -> int:
    size = min(map(len, sets))
    if size < 2:
        raise ValueError(f"model.measures: {size} picture(s) in a set; figures of features need at least two")
    return size
