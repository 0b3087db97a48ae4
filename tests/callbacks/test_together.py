"""Adapters that decide together, in a run: events happen, and a run that was killed goes on to the same bits."""

from __future__ import annotations

import pytest
import torch

import visadapt as va
from tests.training import Crash, CrashAt, TinyTask, train, weights

TARGETS = ["attn.proj", "mlp.fc1", "mlp.fc2"]


def zeroed(adapter):
    return int((adapter.gain == 0).sum())


METHODS = {
    "AdaLoRA": (lambda: va.AdaLoRA(rank=3, interval=2), lambda found: sum(map(zeroed, found)) == 6),
    "BeamLoRA": (
        lambda: va.BeamLoRA(rank=4, keep=0.6, interval=0.25),
        lambda found: any(a.old_up.any() for a in found),
    ),
    "PRILoRA": (lambda: va.PRILoRA(rank=4, interval=9), lambda found: all((a.down == 0).any() for a in found)),
    "DiffoRA": (lambda: va.DiffoRA(rank=2, search=0.4), lambda found: sum(int(a.chosen) for a in found) == 3),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_to_the_same_bits(name, tmp_path):
    method, happened = METHODS[name]

    def task():
        return TinyTask(dropout=0.0, adapters=[va.Adaptation(method(), TARGETS)])

    whole = train(tmp_path / "a", task=task())
    assert happened(list(va.adapters(whole).values()))
    with pytest.raises(Crash):
        train(tmp_path / "b", CrashAt(7), task=task())
    resumed = train(tmp_path / "b", task=task(), resume=str(tmp_path / "b" / "last.ckpt"))
    for key, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[key], tensor), key
