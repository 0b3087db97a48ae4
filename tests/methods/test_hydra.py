"""Hydra against its merged formula, with biases, and what each branch sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, hydra, operate, place


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"sequential_rank": 3}, {"sequential_rank": 0}, {"rank": 0, "sequential_rank": 2}],
)
def test_equals_the_dense_formula(host, options):
    method = va.Hydra(**{"rank": 2, "scale": 0.7, **options})
    compare(host, method, lambda w, b, p: hydra(w, b, p, 0.7))


def test_branches_in_the_order_of_the_formula():
    # Written step by step: the sequential branch sees f with its bias, not f + parallel, not x.
    model, a, x = place("linear", va.Hydra(rank=2, scale=0.5))
    f = nn.functional.linear(x, model[0].weight, model[0].bias)
    parallel = (x @ a.down.t() + a.down_bias) @ a.up.t() + a.up_bias
    sequential = (f @ a.seq_down.t() + a.seq_down_bias) @ a.seq_up.t() + a.seq_up_bias
    close(model(x), f + 0.5 * parallel + 0.5 * sequential)


@pytest.mark.parametrize("host", ["linear", "conv"])
def test_without_the_parallel_branch_it_is_a_matrix_behind_the_layer(host):
    model, a, x = place(host, va.Hydra(rank=2, bias=False, scale=0.5))
    nn.init.zeros_(a.up)
    f = operate(model[0], x, model[0].weight, model[0].bias)
    lift = torch.eye(f.shape[-1 if host == "linear" else 1], dtype=torch.float64) + 0.5 * a.seq_up @ a.seq_down
    channels = "...o->...p" if host == "linear" else "bo...->bp..."
    close(model(x), torch.einsum(f"po,{channels}", lift, f))


def test_without_the_sequential_branch_it_is_lora():
    model, a, x = place("linear", va.Hydra(rank=2, bias=False))
    nn.init.zeros_(a.seq_up)
    close(model(x), nn.functional.linear(x, model[0].weight + a.up @ a.down, model[0].bias))


def test_parameter_count():
    # r_p (in + out) + 2 · out · r_s, and the biases r_p + r_s + 2 · out
    assert count(place("linear", va.Hydra(rank=2, sequential_rank=3, bias=False))[1]) == 2 * 17 + 2 * 10 * 3
    assert count(place("linear", va.Hydra(rank=2, sequential_rank=3))[1]) == 2 * 17 + 2 * 10 * 3 + 2 + 3 + 20
    # the VTAB runs: attn.proj and mlp.fc2 of 12 blocks of ViT-B, rank 2: 239,712
    layers = nn.ModuleList([nn.Linear(768, 768), nn.Linear(3072, 768)])
    va.adapt(layers, va.Hydra(rank=2), ["0", "1"])
    assert 12 * sum(map(count, va.adapters(layers).values())) == 239_712


def test_merge_gives_a_bias_to_a_layer_without_one():
    model, _, x = place("tall", va.Hydra(rank=2))
    want = model(x)
    va.merge(model)
    assert model[0].bias is not None
    close(model(x), want)


def test_start_and_decay():
    model, a, x = place("linear", va.Hydra(rank=2), moved=False)
    close(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
    assert 0 < a.down.abs().max() <= (6 / (7 + 2)) ** 0.5  # Xavier
    assert 0 < a.seq_down.abs().max() <= (6 / (10 + 2)) ** 0.5
    assert set(a.no_decay) == {n for n, _ in a.named_parameters() if n.endswith("bias")}


def test_grouped_convolutions_adapt_but_do_not_merge():
    model = va.adapt(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), va.Hydra(rank=2), "0")
    with pytest.raises(ValueError, match="mixes channels across the groups"):
        va.merge(model)
    va.remove(model)
    va.adapt(model, va.Hydra(rank=2, sequential_rank=0), "0")
    va.merge(model)


def test_refuses_to_train_nothing():
    with pytest.raises(ValueError, match="at least 1"):
        va.adapt(nn.Sequential(nn.Linear(4, 4)), va.Hydra(rank=0), "0")
