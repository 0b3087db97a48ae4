"""The sparse inverse cosine transform and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from visadapt.maths.cosine import cosine_table, sparse_idct

fft = pytest.importorskip("scipy.fft")


def made(count: int, out: int = 6, fan_in: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    values = torch.randn(count, dtype=torch.float64, requires_grad=True)
    places = torch.rand(2, count, dtype=torch.float64, requires_grad=True)
    return values, places, cosine_table(out), cosine_table(fan_in)


def test_the_table_is_that_of_scipy():
    want = fft.dct(np.eye(7), norm="ortho", axis=0)
    torch.testing.assert_close(cosine_table(7), torch.tensor(want))


@pytest.mark.parametrize("count", [4, 40])  # outer products; a dense grid, with places that meet
def test_equals_scipy(count):
    values, places, rows, columns = made(count)
    grid = np.zeros((6, 5))
    u, v = (places.detach().numpy() * np.array([[5], [4]])).round().astype(int)
    np.add.at(grid, (u, v), values.detach().numpy())
    torch.testing.assert_close(
        sparse_idct(values, places, rows, columns).detach(), torch.tensor(fft.idctn(grid, norm="ortho"))
    )


def test_gradient_of_values():
    values, places, rows, columns = made(4)
    torch.autograd.gradcheck(lambda a: sparse_idct(a, places.detach(), rows, columns), values)


def test_gradient_of_places_is_the_central_difference():
    """For a linear loss it is (loss(l + 1) − loss(l − 1)) / 2, times the number of steps that a share of 1 is."""
    values, _, rows, columns = made(1)
    cotangent = 0.1 * torch.randn(6, 5, dtype=torch.float64)

    def loss(u: float, v: float) -> torch.Tensor:
        places = torch.tensor([[u / 5], [v / 4]], dtype=torch.float64, requires_grad=True)
        total = (sparse_idct(values, places, rows, columns) * cotangent).sum()
        return total, places

    for u, v in ((2, 3), (0, 4), (5, 0)):
        total, places = loss(u, v)
        (found,) = torch.autograd.grad(total, places)
        down = (loss(min(u + 1, 5), v)[0] - loss(max(u - 1, 0), v)[0]) / 2
        right = (loss(u, min(v + 1, 4))[0] - loss(u, max(v - 1, 0))[0]) / 2
        torch.testing.assert_close(found[:, 0], torch.stack([5 * down, 4 * right]).detach())


def test_the_difference_is_cut():
    values, places, rows, columns = made(4)
    total = (1e6 * sparse_idct(values, places, rows, columns) * torch.randn(6, 5, dtype=torch.float64)).sum()
    (found,) = torch.autograd.grad(total, places)
    assert set(found.abs().flatten().tolist()) <= {0.0, 4.0, 5.0}
