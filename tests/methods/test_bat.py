"""Bat against the block formula, its rank, and how it is undone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import compare, count, place


def block_affine(weight: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    matrix, side = weight.flatten(1), block.shape[1]
    new = matrix.clone()
    for i in range(len(matrix) // side):
        for j in range(matrix.shape[1] // side):
            rows, columns = slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side)
            new[rows, columns] = matrix[rows, columns] + matrix[rows, columns] @ block[i] + block[i]
    return new.view_as(weight)


@pytest.mark.parametrize(("host", "rank"), [("linear", None), ("tall", 1), ("conv", 2), ("conv", None)])
def test_equals_the_dense_formula(host, rank):
    compare(host, va.Bat(rank=rank), lambda w, b, p: (block_affine(w, p["block"]), b))


@pytest.mark.parametrize(("out", "fan_in", "side"), [(8, 12, 4), (768, 768, 64), (768, 3072, 64), (6, 4, 2), (9, 6, 3)])
def test_default_side(out, fan_in, side):
    model = va.adapt(nn.Sequential(nn.Linear(fan_in, out)), va.Bat(), "0")
    (adapter,) = va.adapters(model).values()
    assert adapter.block.shape == (out // side, side, side)
    assert count(adapter) == out * side


def test_full_rank_and_exactly_undone():
    torch.manual_seed(0)
    model = va.adapt(nn.Sequential(nn.Linear(12, 8)).double(), va.Bat(rank=4), "0")
    (adapter,) = va.adapters(model).values()
    nn.init.normal_(adapter.block, std=0.1)
    weight = model[0].weight.detach()
    new = adapter.new_weight(weight).detach()
    assert torch.linalg.matrix_rank(new - weight) == 8
    eye = torch.eye(4, dtype=torch.float64)
    back = torch.cat(
        [torch.cat([(new[i : i + 4, j : j + 4] - b) @ torch.linalg.inv(eye + b) for j in (0, 4, 8)], 1)
         for i, b in zip((0, 4), adapter.block.detach())]
    )  # fmt: skip
    torch.testing.assert_close(back, weight)


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rank=5 does not divide the weight \(10, 7\)"):
        place("linear", va.Bat(rank=5))
    assert math.gcd(10, 7) == 1
