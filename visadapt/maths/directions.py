"""Input directions that a memory of earlier ones does not hold yet."""

from __future__ import annotations

import torch
from torch import Tensor

NOISE = 1e-9  # of the energy: below it, eigenvectors are rounding errors and may lie in the memory


def beside(gram: Tensor, memory: Tensor) -> Tensor:
    """P G P, P = I − M.

    Args:
        gram: G = Σ x xᵀ of inputs (in, in).
        memory: Orthogonal projection M onto the directions that are known (in, in).
    """
    off = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - memory.to(gram)
    return off @ gram @ off


def missing(gram: Tensor, memory: Tensor, share: float) -> Tensor:
    """The fewest eigenvectors of P G P, as columns (in, n), with which the memory holds a share of the inputs' energy.

    There are none where it holds that share already: what would be found then are directions of no energy, which are
    arbitrary, not orthogonal to the memory, and would count twice in it.

    Args:
        gram: G = Σ x xᵀ of inputs (in, in).
        memory: Orthogonal projection M onto the directions that are known (in, in).
        share: Of the energy tr G, 0 … 1.
    """
    energy = gram.trace()
    values, vectors = torch.linalg.eigh(beside(gram, memory))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    known = (energy - values.sum()) / energy
    held = known + values.cumsum(0) / energy
    count = int((held < share - NOISE).sum()) + 1 if known < share - NOISE else 0
    return vectors[:, :count]
