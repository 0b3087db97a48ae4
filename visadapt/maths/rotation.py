"""Rotations of vectors: in blocks of coordinates, in butterflies of blocks, and as products of reflections."""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(angles: Tensor, side: int) -> Tensor:
    """Rotations (I + Q)(I − Q)⁻¹ of skew-symmetric Q, in fp32 or fp64.

    Args:
        angles: (…, side · (side − 1) / 2), the entries of Q above its diagonal, row by row.
        side: of the matrices.

    Returns:
        (…, side, side), orthogonal with determinant 1.
    """
    with torch.autocast(angles.device.type, enabled=False):
        rows, columns = torch.triu_indices(side, side, 1, device=angles.device)
        upper = angles.new_zeros(*angles.shape[:-1], side * side).index_copy(-1, rows * side + columns, angles)
        upper = upper.unflatten(-1, (side, side))
        q = upper - upper.transpose(-1, -2)
        eye = torch.eye(side, dtype=q.dtype, device=q.device)
        return torch.linalg.solve(eye - q, eye + q)


def rotate(x: Tensor, turns: Tensor, level: int = 0) -> Tensor:
    """Each block of coordinates times its matrix.

    At level j a block is two half-blocks at a distance of 2ʲ half-blocks, as in a fast Fourier transform; at level 0
    they are neighbours.

    Args:
        x: (…, blocks · side).
        turns: (blocks, side, side), y = turns[i] x for the vector x of block i.
        level: j; blocks is a multiple of 2ʲ.
    """
    blocks, side, _ = turns.shape
    if level == 0:
        return _apply(x.reshape(-1, blocks, side), turns).reshape(x.shape)
    pairs = x.reshape(-1, blocks >> level, 2, 1 << level, side // 2).transpose(2, 3)
    turned = _apply(pairs.reshape(-1, blocks, side), turns)
    return turned.view(-1, blocks >> level, 1 << level, 2, side // 2).transpose(2, 3).reshape(x.shape)


def butterfly(turns: Tensor) -> Tensor:
    """The product B_0 B_1 … of the factors that `rotate` applies at level 0, 1, …, as the blocks of one rotation.

    Args:
        turns: (levels, blocks, side, side).

    Returns:
        (n, size, size) with size = side · 2^(levels − 1) and n · size = blocks · side.
    """
    levels, blocks, side, _ = turns.shape
    if levels == 1:
        return turns[0]
    size = side << (levels - 1)
    columns = torch.eye(size, dtype=turns.dtype, device=turns.device).repeat(1, blocks * side // size)
    with torch.autocast(turns.device.type, enabled=False):
        for level in reversed(range(levels)):
            columns = rotate(columns, turns[level], level)
    return columns.view(size, -1, size).permute(1, 2, 0)


def _apply(x: Tensor, turns: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), turns.transpose(1, 2)).transpose(0, 1)


def reflections(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """U and V (r, n) with (I − 2 u_1 u_1ᵀ) … (I − 2 u_r u_rᵀ) = I − Uᵀ V, for the rows u of `vectors` at length 1.

    The compact form of a product of Householder reflections: V = T U, T⁻¹ = striu(U Uᵀ) + I / 2.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        u = vectors / vectors.norm(dim=1, keepdim=True)
        inverse = torch.triu(u @ u.t(), 1) + 0.5 * torch.eye(len(u), dtype=u.dtype, device=u.device)
        return u, torch.linalg.solve_triangular(inverse, u, upper=True)
