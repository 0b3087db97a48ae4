"""Figures of generated clips from what a stated extractor or the judge sees in their frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visadapt.metrics.adherence import NAMED, Judge, adherence, judged
from visadapt.metrics.clip import clip_score


def frame_features(describe: Callable[[Tensor], Tensor], videos: Tensor, chunk: int = 64) -> Tensor:
    """Features (B, F, D) of the frames of clips (B, F, 3, H, W) in 0 … 1; see `visadapt.metrics.features`."""
    found = torch.cat([describe(part) for part in videos.flatten(0, 1).split(chunk)])
    return found.unflatten(0, videos.shape[:2])


def frame_clip_score(videos: Tensor, prompts: Sequence[str], folder: str, chunk: int = 64) -> float:
    """CLIP score of clips: the mean over all frames, each against the prompt of its clip; see `clip_score`.

    Args:
        videos: (B, F, 3, H, W) in 0 … 1.
        prompts: B texts.
        folder: A CLIP model in transformers' layout.
        chunk: Frames at a time.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no CLIP.
    """
    said = [prompt for prompt in prompts for _ in range(videos.shape[1])]
    parts = enumerate(videos.flatten(0, 1).split(chunk))
    return float(torch.cat([clip_score(part, said[i * chunk :][:chunk], folder) for i, part in parts]).mean())


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
