"""How deep layers are, by their names."""

from __future__ import annotations

import pytest
from torch import nn

import visadapt as va
from visadapt.core.depth import depths


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.10.attn.qkv"], [0, 0, 0.5, 1]),
        (["conv", "down.0.attentions.1.to_q", "down.0.resnets.0", "down.1.attentions.0.to_q"], [0, 0.5, 0.5, 1]),
        (["0", "1", "2"], [0, 0.5, 1]),
        (["head"], [0.5]),
        ([], []),
    ],
)
def test_blocks_in_order(names, want):
    assert depths(names) == want


def test_adapters_know_their_depth_whatever_the_order_of_the_targets():
    for targets in (["2", "0", "1"], ["0", "1", "2"]):
        model = va.adapt(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)), va.LoRA(rank=1), targets)
        assert [a.depth for a in va.adapters(model).values()] == [0, 0.5, 1]
