"""Where something moves in a clip, and whether it moves as asked: figures of trajectories.

`centres` follows the one thing that stands out from the background, as in the clips of `visadapt.data.moving`; for
anything else there is optical flow (`visadapt.metrics.flow`). Trajectories (B, F, 2) are x and y as parts of the
side; a frame in which nothing stands out has nan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_GRAIN = 0.04  # deviation of a colour, in 0 … 1, below which nothing stands out
_LEAST = 4.0  # and how many deviations of the background do


@torch.no_grad()
def centres(videos: Tensor) -> Tensor:
    """Centre of what differs from the background, frame by frame.

    The background is the normal law of the colours along the border, without the quarter that is farthest from their
    median (the thing may touch the border), and what differs has a Mahalanobis distance from it beyond the middle
    between the border's and the greatest. Frames are blurred a little first, so that textures average out. On drawn
    clips of `visadapt.data.moving` the result correlates with the truth by 0.99 and more on plain backgrounds.

    Args:
        videos: (B, F, 3, H, W) in 0 … 1.

    Returns:
        (B, F, 2) float64.
    """
    frames = _blurred(videos.detach().double().cpu().flatten(0, 1))
    away = _distances(frames)
    ring = _ring(away)
    highest = away.flatten(1).amax(1)
    level = (ring.quantile(0.95, dim=1) + highest) / 2
    weight = (away >= level[:, None, None]).double()
    height, width = away.shape[1:]
    x, y = ((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in (width, height))
    mass = weight.sum((1, 2))
    found = torch.stack([(weight.sum(1) * x).sum(1), (weight.sum(2) * y).sum(1)], 1) / mass[:, None]
    found[highest < _LEAST] = torch.nan
    return found.unflatten(0, videos.shape[:2])


def _blurred(frames: Tensor) -> Tensor:
    """Means of squares of about an eighth of the side, twice."""
    reach = max(1, frames.shape[-1] // 24)
    for _ in range(2):
        frames = F.avg_pool2d(F.pad(frames, (reach,) * 4, mode="replicate"), 2 * reach + 1, 1)
    return frames


def _ring(maps: Tensor) -> Tensor:
    """Values (N, …, P) of maps (N, …, H, W) along the border, a sixteenth of the side wide."""
    wide = max(1, maps.shape[-1] // 16)
    inner = torch.zeros(maps.shape[-2:], dtype=torch.bool)
    inner[wide:-wide, wide:-wide] = True
    return maps[..., ~inner]


def _distances(frames: Tensor) -> Tensor:
    """Mahalanobis distance (N, H, W) of every pixel from the colours of the border."""
    border = _ring(frames).transpose(1, 2)  # (N, P, 3)
    away = (border - border.median(1, keepdim=True).values).norm(dim=2)
    near = away.argsort(1)[:, : away.shape[1] * 3 // 4]
    border = border.gather(1, near[..., None].expand(-1, -1, 3))
    mean = border.mean(1)
    spread = (border - mean[:, None]).transpose(1, 2) @ (border - mean[:, None]) / border.shape[1]
    factor = torch.linalg.cholesky(spread + _GRAIN**2 * torch.eye(3, dtype=spread.dtype))
    off = frames.flatten(2) - mean[..., None]
    return torch.linalg.solve_triangular(factor, off, upper=False).norm(dim=1).unflatten(1, frames.shape[-2:])


# --- figures ---------------------------------------------------------------------------
def correlation(found: Tensor, wanted: Tensor) -> Tensor:
    """Correlation r (B,) of trajectories, ⟨a, b⟩ / (‖a‖ ‖b‖) of both without their means, in −1 … 1.

    Place and extent of the path do not count, its course in time does. It is 0 for what stands still, and where
    nothing was found in any frame.

    Args:
        found: (B, F, 2).
        wanted: (B, F, 2), or (F, 2) for all.
    """
    a, b = _centred(found, wanted)
    size = a.norm(dim=(1, 2)) * b.norm(dim=(1, 2))
    return torch.where(size > 1e-9, (a * b).sum((1, 2)) / size.clamp_min(1e-9), 0.0)


def deviation(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean distance (B,) between trajectories laid upon each other by their means, as a part of the side.

    Frames in which nothing was found do not count; nan if there is no other.

    Args:
        found: (B, F, 2).
        wanted: (B, F, 2), or (F, 2) for all.
    """
    a, b = _centred(found, wanted)
    seen = found.isfinite().all(-1)
    return ((a - b).norm(dim=2) * seen).sum(1) / seen.sum(1)


def drift(found: Tensor) -> Tensor:
    """How far a trajectory goes in all (B, 2): the least-squares velocity times the duration.

    Frames in which nothing was found do not count; nan if fewer than two are left.
    """
    seen = found.isfinite().all(-1)
    time = torch.linspace(0, 1, found.shape[1], dtype=found.dtype).expand(len(found), -1)
    share = seen / seen.sum(1, keepdim=True)
    time = (time - (time * share).sum(1, keepdim=True)) * seen
    return (time[..., None] * found.nan_to_num()).sum(1) / (time * time).sum(1, keepdim=True)


def directed(found: Tensor, wanted: Tensor, least: float = 0.1) -> Tensor:
    """Whether trajectories go where they should (B,), booleans; their mean is the direction accuracy.

    They do if their `drift` along the wanted direction is at least ``least`` and larger than that across it. Chance is
    a quarter for something that moves, and 0 for what stands still.

    Args:
        found: (B, F, 2).
        wanted: Unit vectors (B, 2), right and down.
        least: Shortest way that counts as moving, as a part of the side.
    """
    way, wanted = drift(found), wanted.to(found)
    along = (way * wanted).sum(1)
    across = (way - along[:, None] * wanted).norm(dim=1)
    return (along >= least) & (along > across)  # nan is neither


def _centred(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Both without their means over the frames in which something was found, zero in the others."""
    wanted = wanted.to(found).expand_as(found)
    seen = found.isfinite().all(-1, keepdim=True)
    count = seen.sum(1, keepdim=True).clamp_min(1)

    def centred(points: Tensor) -> Tensor:
        points = torch.where(seen, points, 0.0)
        return torch.where(seen, points - points.sum(1, keepdim=True) / count, 0.0)

    return centred(found), centred(wanted)
