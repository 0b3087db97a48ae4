"""Motion fidelity of real clips: points carried along by optical flow, and how alike two sets of their paths are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def tracks(video: Tensor, grid: int = 8, side: int = 96) -> Tensor:
    """Paths of a grid of points through a clip.

    The points follow the dense flow between neighbouring frames, TV-L1 (Zach, Pock & Bischof 2007) by scikit-image, of
    the first principal component of all colours: a blue circle on purple has hardly a contrast in grey. They start in
    the middle frame and go both ways, as what moves is more likely to be seen there. A ground without texture has no
    flow of its own and takes that of what is near.

    Args:
        video: (F, 3, H, W) in 0 … 1.
        grid: Points along the longer side.
        side: Longer side that the frames are brought to: small clips have too few pixels for the flow's pyramid.

    Returns:
        (P, F, 2) float64: x and y as parts of the sides.

    Raises:
        ValueError: There are fewer than two frames.
    """
    if len(video) < 2:
        raise ValueError(f"a clip of {len(video)} frame(s) shows no motion; at least 2 are needed")
    grey = _contrast(video.detach().float().cpu())
    scale = side / max(grey.shape[-2:])
    size = [max(16, round(length * scale)) for length in grey.shape[-2:]]
    grey = F.interpolate(grey[:, None], size, mode="bicubic", antialias=True, align_corners=False)[:, 0]
    pages = list(grey.numpy())
    height, width = size
    middle = len(pages) // 2
    y, x = ((np.arange(max(1, round(grid * n / max(size)))) + 0.5) / max(1, round(grid * n / max(size))) for n in size)
    start = np.stack(np.meshgrid(x * width, y * height), axis=-1).reshape(-1, 2) - 0.5
    later, before = _carried(start, pages[middle:]), _carried(start, pages[middle::-1])
    paths = np.stack([*before[:0:-1], *later], axis=1)
    return torch.from_numpy((paths + 0.5) / [width, height])


def _contrast(video: Tensor) -> Tensor:
    """The first principal component of the colours (F, H, W), brought to 0 … 1; 0 for a clip of one colour."""
    colours = video.movedim(1, -1).flatten(0, 2)
    colours = colours - colours.mean(0)
    line = (colours @ torch.linalg.eigh(colours.T @ colours).eigenvectors[:, -1]).view(len(video), *video.shape[-2:])
    return (line - line.min()) / (line.max() - line.min()).clamp_min(1e-6)


def _carried(points: np.ndarray, pages: list[np.ndarray]) -> list[np.ndarray]:
    """Places (P, 2) in pixels of points in each page, from the first on."""
    from scipy.ndimage import map_coordinates
    from skimage.registration import optical_flow_tvl1

    found = [points]
    for page, following in pairwise(pages):
        down, right = optical_flow_tvl1(page, following)  # where what is here has gone
        at = found[-1][:, ::-1].T
        step = [map_coordinates(flow, at, order=1, mode="nearest") for flow in (right, down)]
        found.append(found[-1] + np.stack(step, axis=1))
    return found


def fidelity(found: Tensor, wanted: Tensor, least: float = 0.05) -> float:
    """Motion fidelity, ½ (mean over τ of max over ω of r(τ, ω) + mean over ω of max over τ of r(τ, ω)), in −1 … 1.

    τ are paths of the one clip, ω of the other, r the mean of cos(velocity of τ, velocity of ω) over the steps in which
    one of them moves. Neither the place of a path nor what moves along it counts, so clips of other subjects compare
    (Yatim et al. 2023, arXiv 2311.17009, section 5; code:
    github.com/diffusion-motion-transfer/diffusion-motion-transfer). Differs from the paper: the two means are halved,
    so that 1 is the best; only points that move count, as the still background of two clips agrees whatever happens in
    front of it; and paths come from optical flow instead of CoTracker. 0 if nothing moves in one clip.

    Args:
        found: (P, F, 2).
        wanted: (Q, F, 2).
        least: Length of the way, as a part of the side, from which a point counts as moving.

    Raises:
        ValueError: The numbers of frames differ.
    """
    if found.shape[1] != wanted.shape[1]:
        raise ValueError(f"clips of {found.shape[1]} and of {wanted.shape[1]} frames do not compare; take equally many")
    mine, other = (_velocities(paths, least) for paths in (found, wanted))
    if not len(mine) or not len(other):
        return 0.0
    moves = [paths.norm(dim=2) > 0 for paths in (mine, other)]
    steps = (moves[0][:, None] | moves[1][None]).sum(2)
    alike = torch.einsum("pfc,qfc->pq", mine, other) / steps
    return float((alike.amax(1).mean() + alike.amax(0).mean()) / 2)


def _velocities(paths: Tensor, least: float) -> Tensor:
    """Unit velocities (P, F−1, 2) of the points that move; zero where one rests."""
    steps = paths.double().diff(dim=1)
    length = steps.norm(dim=2, keepdim=True)
    moving = length.sum((1, 2)) >= least
    rests = length < 0.01 * least
    return torch.where(rests, 0.0, steps / length.clamp_min(1e-12))[moving]
