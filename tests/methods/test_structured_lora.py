"""StructuredLoRA against the dense formula in its three starts."""

from __future__ import annotations

import pytest
import torch

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place


def changed(p: dict[str, torch.Tensor], shape: torch.Size, scale: float) -> torch.Tensor:
    return scale * (p["up"] @ p["mid"] @ p["down"].flatten(1)).view(shape)


def corner(weight: torch.Tensor, r: int) -> dict[str, torch.Tensor]:
    matrix = weight.detach().flatten(1)
    return {"down": matrix[:r], "mid": matrix[:r, :r], "up": matrix[:, :r]}


@pytest.mark.parametrize("host", HOSTS)
def test_random_start(host):
    compare(host, va.StructuredLoRA(rank=3, alpha=6), lambda w, b, p: (w + changed(p, w.shape, 2.0), b))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("residual", ["subtract", "none"])
@pytest.mark.parametrize("start", ["weight", "intermediate"])
def test_starts_from_the_weight(start, residual, host):
    def dense(w, b, p):
        old = corner(w, 3)
        base = changed(old, w.shape, 2.0) if residual == "subtract" else 0
        return w + changed({**old, **p}, w.shape, 2.0) - base, b

    compare(host, va.StructuredLoRA(rank=3, alpha=6, start=start, residual=residual), dense)


@pytest.mark.parametrize("residual", ["subtract", "none"])
def test_where_training_starts(residual):
    model, adapter, _ = place("linear", va.StructuredLoRA(rank=3, start="weight", residual=residual), moved=False)
    want = changed(corner(model[0].weight, 3), model[0].weight.shape, 1.0)
    close(adapter.delta().detach(), torch.zeros_like(want) if residual == "subtract" else want)
    with torch.no_grad():
        adapter.down.add_(1)
    assert not torch.equal(adapter.down, model[0].weight[:3]), "copies, not views"


def test_identity_core_is_lora():
    _, adapter, _ = place("linear", va.StructuredLoRA(rank=3))
    adapter.mid.data.copy_(torch.eye(3))
    close(adapter.delta(), adapter.up @ adapter.down)


def test_parameter_count():
    assert count(place("linear", va.StructuredLoRA(rank=3))[1]) == 3 * (7 + 10) + 9
    assert count(place("linear", va.StructuredLoRA(rank=3, start="weight"))[1]) == 3 * (7 + 10) + 9
    assert count(place("linear", va.StructuredLoRA(rank=3, start="intermediate"))[1]) == 9


def test_refusals():
    for options, words in (({"rank": 5, "start": "weight"}, "no such corner"), ({"start": "svd"}, "start='svd'"),
                           ({"residual": "add"}, "residual='add'")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            place("tall", va.StructuredLoRA(**options))
