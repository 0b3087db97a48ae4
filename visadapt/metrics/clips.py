"""Figures of generated clips from what a stated extractor or the judge sees in their frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visadapt.metrics.adherence import NAMED, Judge, adherence, judged
from visadapt.metrics.renders import similarity


def frame_features(describe: Callable[[Tensor], Tensor], videos: Tensor, chunk: int = 64) -> Tensor:
    """Features (B, F, D) of the frames of clips (B, F, 3, H, W) in 0 … 1; see `visadapt.metrics.features`."""
    found = torch.cat([describe(part) for part in videos.flatten(0, 1).split(chunk)])
    return found.unflatten(0, videos.shape[:2])


def consistency(features: Tensor) -> float:
    """Temporal consistency: the mean cosine of neighbouring frames' features (B, F, D), in −1 … 1.

    The measure of Wu et al. 2023 (Tune-A-Video, arXiv 2212.11565, section 5; code: github.com/showlab/Tune-A-Video),
    who take CLIP's features. A clip that stands still has 1: read it beside a figure of motion and that of real clips.

    Raises:
        ValueError: Clips of a single frame.
    """
    if features.shape[1] < 2:
        raise ValueError("clips of one frame have no neighbours; at least 2 frames are needed")
    units = F.normalize(features.double(), dim=2)
    return float((units[:, 1:] * units[:, :-1]).sum(2).mean())


def leakage(found: Tensor, reference: Tensor, base: Tensor) -> dict[str, float]:
    """Appearance that leaks from the clip that a motion was learned from into clips of other things.

    Args:
        found: Features (B, F, D) of clips by the adapted model, for prompts that ask for another appearance.
        reference: Features (N, F, D) of the clips that it learned from.
        base: Features (B, F, D) of clips by the base, for the same prompts and seeds.

    Returns:
        Mean cosines over all pairs of frames: "adapted" to the reference, "base" to the reference, and their
        difference, the "leak": 0 if the adapted model's frames are no nearer to the reference than the base's.
    """
    seen = reference.flatten(0, 1)
    adapted, before = (similarity(clips.flatten(0, 1), seen) for clips in (found, base))
    return {"adapted": adapted, "base": before, "leak": adapted - before}


def leaked_traits(
    videos: Tensor, asked: Mapping[str, Sequence[int]], reference: Mapping[str, int], network: Judge | None = None
) -> dict[str, float]:
    """Share of frames that show the reference's shape, colour or background, though another was asked for.

    Args:
        videos: (B, F, 3, H, W) in 0 … 1.
        asked: Class numbers (B,) of each that was asked for, -1 for nothing, as `visadapt.data.scenes` gives them.
        reference: Class numbers of the clip that the motion was learned from.
        network: The judge; None takes the shipped one.

    Returns:
        "shape", "colour" and "background", of the clips that asked for another one than the reference's; those for
        which there are no such clips are left out.
    """
    found = judged(videos.flatten(0, 1) * 2 - 1, network)
    figures = {}
    for name in NAMED:
        wanted = torch.as_tensor(asked[name]).repeat_interleave(videos.shape[1])
        other = (wanted >= 0) & (wanted != reference[name]) & (reference[name] >= 0)
        if other.any():
            figures[name] = float((found[name][other] == reference[name]).float().mean())
    return figures


def frame_adherence(
    videos: Tensor, labels: Mapping[str, Sequence[int]], network: Judge | None = None
) -> dict[str, float]:
    """Prompt adherence of single frames by the judge; see `visadapt.metrics.adherence.adherence`.

    Args:
        videos: (B, F, 3, H, W) in 0 … 1.
        labels: What was asked for, one number for each clip; only names that the judge knows count.
        network: The judge; None takes the shipped one.
    """
    each = {name: torch.as_tensor(labels[name]).repeat_interleave(videos.shape[1]) for name in NAMED if name in labels}
    return adherence(videos.flatten(0, 1) * 2 - 1, each, network)
