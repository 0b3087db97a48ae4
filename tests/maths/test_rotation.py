"""Rotations and reflections against dense matrices."""

from __future__ import annotations

import pytest
import torch

from visadapt.maths.rotation import cayley, reflections, rotate


def test_cayley_gives_rotations():
    turns = cayley(torch.randn(3, 6, dtype=torch.float64), 4)
    eye = torch.eye(4, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(turns @ turns.transpose(1, 2), eye)
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(3, dtype=torch.float64))
    assert torch.equal(cayley(torch.zeros(1, 6), 4)[0], torch.eye(4))


def test_a_small_angle_turns_that_way():
    """(I + Q)(I − Q)⁻¹ = I + 2Q + …, Q above the diagonal as given."""
    turns = cayley(torch.tensor([1e-4], dtype=torch.float64), 2)
    assert abs(turns[0, 1].item() - 2e-4) < 1e-10
    assert turns[1, 0] == -turns[0, 1]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_rotate_pairs_half_blocks_at_a_distance(level):
    blocks, side, half = 4, 4, 2
    turns = torch.randn(blocks, side, side, dtype=torch.float64)
    dense = torch.zeros(16, 16, dtype=torch.float64)
    distance, number = 1 << level, 0
    for first in range(blocks * 2):
        if (first >> level) & 1 == 0:  # the lower of the two half-blocks
            where = [first * half, first * half + 1, (first + distance) * half, (first + distance) * half + 1]
            for a in range(side):
                for b in range(side):
                    dense[where[a], where[b]] = turns[number, a, b]
            number += 1
    assert number == blocks
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, turns, level), x @ dense.t())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_reflections_are_their_product(count):
    vectors = torch.randn(count, 7, dtype=torch.float64)
    want = torch.eye(7, dtype=torch.float64)
    for v in vectors:
        want = want @ (torch.eye(7, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v))
    u, v = reflections(vectors)
    torch.testing.assert_close(torch.eye(7, dtype=torch.float64) - u.t() @ v, want)
