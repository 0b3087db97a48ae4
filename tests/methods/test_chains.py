"""RAC-LoRA and XGBLoRA: links against dense sums, what trains in them, and chains in a run."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, place, product
from tests.training import Crash, CrashAt, TinyTask, train, weights
from visadapt.callbacks.chain import Chain
from visadapt.core.train import after_backward, next_task


@pytest.mark.parametrize("host", HOSTS)
def test_a_link_is_the_dense_formula(host):
    up = place(host, va.RACLoRA(rank=3, alpha=6), moved=False)[1].up.clone()
    compare(host, va.RACLoRA(rank=3, alpha=6), lambda w, b, p: (w + 2 * product(up, p["down"]), b))
    down = place(host, va.RACLoRA(rank=3, alpha=6, sampled="down"), moved=False)[1].down.clone()
    compare(host, va.RACLoRA(rank=3, alpha=6, sampled="down"), lambda w, b, p: (w + 2 * product(p["up"], down), b))
    compare(host, va.XGBLoRA(alpha=2), lambda w, b, p: (w + 2 * product(p["up"], p["down"]), b))


@pytest.mark.parametrize(
    "method", [va.RACLoRA(rank=2, alpha=3), va.RACLoRA(rank=2, sampled="down"), va.XGBLoRA(alpha=2)], ids=repr
)
def test_a_chain_goes_on_where_it_stood_and_is_the_sum_of_its_links(method):
    model, adapter, x = place("linear", method)
    scale, dense = 1 if adapter.alpha is None else adapter.alpha / adapter.rank, 0
    for _ in range(3):
        dense = dense + scale * product(adapter.up, adapter.down).detach()
        before, tensors = model(x), [adapter.down, adapter.up]
        next_task(model)
        close(model(x), before)
        assert all(a is b for a, b in zip([adapter.down, adapter.up], tensors))
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    close(adapter.delta(), dense + scale * product(adapter.up, adapter.down))
    assert torch.linalg.matrix_rank(dense) == 3 * adapter.rank


def test_what_trains():
    _, adapter, _ = place("linear", va.RACLoRA(rank=2), moved=False)
    assert [n for n, _ in adapter.named_parameters()] == ["down"]
    assert (count(adapter), adapter.down.any()) == (2 * 7, False)
    _, adapter, _ = place("linear", va.RACLoRA(rank=2, sampled="down"), moved=False)
    assert [n for n, _ in adapter.named_parameters()] == ["up"]
    assert count(place("linear", va.XGBLoRA())[1]) == 7 + 10
    first = place("linear", va.RACLoRA(rank=2), moved=False)[1].up
    torch.manual_seed(99)
    model = va.adapt(nn.Sequential(nn.Linear(7, 10), nn.Linear(7, 10)).double(), va.RACLoRA(rank=2), "all")
    a, b = va.adapters(model).values()
    assert torch.equal(a.up, first), "drawn from the seed alone"
    assert not torch.equal(a.up, b.up), "for each layer"
    next_task(model)
    assert not torch.equal(a.up, first), "and for each link"


def test_with_a_square_basis_a_link_of_one_step_is_a_step_of_full_tuning():
    model, adapter, x = place("linear", va.RACLoRA(rank=10), moved=False)
    full = nn.Linear(7, 10).double()
    full.load_state_dict({"weight": model[0].weight.detach(), "bias": model[0].bias.detach()})
    full.bias.requires_grad_(False)
    target = torch.randn(2, 3, 10, dtype=torch.float64)
    for _ in range(3):
        with torch.no_grad():
            adapter.up.copy_(torch.linalg.qr(adapter.up)[0])
        for net, parameter in ((model, adapter.down), (full, full.weight)):
            parameter.grad = None
            (net(x.detach()) - target).square().mean().backward()
            with torch.no_grad():
                parameter.sub_(0.5 * parameter.grad)
        next_task(model)
        close(model[0].weight + adapter.delta(), full.weight)


def many(method):
    torch.manual_seed(0)
    return va.adapt(nn.Sequential(*[nn.Linear(5, 5) for _ in range(10)]).double(), method, "all")


def test_a_round_trains_some_layers_others_in_the_next():
    model, seen = many(va.XGBLoRA(layers=0.3, tasks=20)), []
    members = list(va.adapters(model).values())
    for _ in range(12):
        optimizer = torch.optim.AdamW(va.parameter_groups(model, 0.1, 0.1))
        model(torch.randn(4, 5, dtype=torch.float64)).square().mean().backward()
        after_backward(model)
        optimizer.step()
        moved = [bool(a.up.any()) for a in members]
        assert sum(moved) == 3
        assert moved == [a.learns for a in members]
        seen.append(moved)
        optimizer.zero_grad()
        next_task(model)
        assert not any(a.up.any() for a in members)
    assert all(map(any, zip(*seen))), "every layer had its turn"
    with pytest.raises(ValueError, match="layers=0"):
        many(va.XGBLoRA(layers=0))


def task(**fields):
    return TinyTask(dropout=0.0, adapters=[va.Adaptation(va.RACLoRA(rank=2, **fields), ["mlp.fc1"])])


class Watch(Chain):
    """A chain that writes down when links end and what the optimiser keeps then."""

    def __init__(self, every):
        super().__init__(every)
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        done = next(iter(va.adapters(pl_module).values())).done
        self.seen.append((trainer.global_step, done, bool(trainer.optimizers[0].state)))


def test_a_run_forms_a_chain_and_a_resumed_one_is_the_same(tmp_path):
    watch = Watch(5)
    whole = train(tmp_path / "a", watch, task=task(tasks=4))
    assert watch.seen == [(s, min((s // 5), 3), s % 5 != 0) for s in range(1, 19)]
    with pytest.raises(Crash):
        train(tmp_path / "b", Chain(5), CrashAt(13), task=task(tasks=4))
    resumed = train(tmp_path / "b", Chain(5), task=task(tasks=4), resume=str(tmp_path / "b" / "last.ckpt"))
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name


def test_chains_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"18 steps are 4 links of every=5.*room for tasks=3"):
        train(tmp_path, Chain(5), task=task(tasks=3))
    with pytest.raises(ValueError, match="RACLoRA, XGBLoRA"):
        train(tmp_path, Chain(5), task=TinyTask())
    with pytest.raises(ValueError, match="every=0"):
        Chain(0)


class Restless(L.Callback):
    """Draws from the global source, as the data or the network of one process may and those of another may not."""

    def on_train_batch_start(self, *args):
        torch.rand(3)


def test_links_start_alike_whatever_else_is_drawn(tmp_path):
    def run(name, *callbacks):
        adaptation = va.Adaptation(va.OLoRA(rank=2, tasks=4), ["mlp.fc1"])
        return weights(train(tmp_path / name, Chain(5), *callbacks, task=TinyTask(dropout=0.0, adapters=[adaptation])))

    one, other = run("a"), run("b", Restless())
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_averages_start_anew_with_each_link(tmp_path):
    live = {}

    class Live(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            live[trainer.global_step] = weights(module)

    task = TinyTask(dropout=0.0, ema_decay=0.9, adapters=[va.Adaptation(va.OLoRA(rank=2, tasks=4), ["mlp.fc1"])])
    whole = weights(train(tmp_path, Chain(8), Live(), task=task, max_epochs=1))
    assert max(live) == 9
    for name, tensor in whole.items():
        if name.endswith((".up", ".down")):
            torch.testing.assert_close(tensor, torch.lerp(live[8][name], live[9][name], 9 / 19))
