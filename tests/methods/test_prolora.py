"""PRoLoRA against hand-written expansions."""

from __future__ import annotations

import pytest
import torch

import visadapt as va
from tests.methods.reference import HOSTS, compare, count, place, product


def roll_rows(chunk: torch.Tensor, by: int) -> torch.Tensor:
    return torch.stack([chunk[(i - by) % len(chunk)] for i in range(len(chunk))])


def expand(p: dict[str, torch.Tensor], out: int, fan_in: int, q: int, share: int) -> tuple[torch.Tensor, torch.Tensor]:
    step = max(q // share, 1)
    down = torch.cat([roll_rows(p["down_chunk"], k * step) for k in range(share)], 1)[:, :fan_in]
    up = torch.cat([roll_rows(p["up_chunk"].t(), k * step).t() for k in range(share)])[:out]
    if "down" in p:
        down, up = torch.cat([p["down"], down]), torch.cat([p["up"], up], 1)
    return down, up


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("unshared", "share"), [(1, 2), (0, 3), (2, 4)])
def test_equals_the_dense_formula(unshared, share, host):
    def dense(w, b, p):
        down, up = expand(p, w.shape[0], w.shape[1], 5 - unshared, share)
        return w + 2.0 * product(up, down), b

    compare(host, va.PRoLoRA(rank=5, unshared=unshared, chunks=share, alpha=10), dense)


def test_a_worked_example():
    """Rank 4 with one row of its own, two chunks: the second has its three rows one place further down."""
    _, adapter, _ = place("linear", va.PRoLoRA(rank=4, chunks=2))
    down, _ = adapter.factors()
    first, second = down[1:, :4], down[1:, 4:]
    assert torch.equal(second, first[[2, 0, 1]][:, :3])


def test_without_sharing_it_is_lora():
    _, adapter, _ = place("linear", va.PRoLoRA(rank=3, unshared=3))
    assert {n for n, _ in adapter.named_parameters()} == {"down", "up"}
    assert count(adapter) == 3 * (7 + 10)
    assert count(place("linear", va.PRoLoRA(rank=3, unshared=0, chunks=1))[1]) == 3 * (7 + 10)


def test_parameter_count_and_bounds():
    _, adapter, _ = place("linear", va.PRoLoRA(rank=64, unshared=8, chunks=2), moved=False)
    assert count(adapter) == 8 * (7 + 10) + 56 * (4 + 5)
    for part in (adapter.down, adapter.down_chunk):
        assert 0.9 / 7**0.5 < part.abs().max() <= 1 / 7**0.5
    assert not adapter.up_chunk.any()


def test_refusals():
    with pytest.raises(ValueError, match="unshared=9"):
        place("linear", va.PRoLoRA(unshared=9))
