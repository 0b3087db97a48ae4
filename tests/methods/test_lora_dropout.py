"""LoRA Dropout against masked factors; its masks; the mean; the ensemble in a run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.methods.reference import HOSTS, close, compare, count, operate, place, product
from tests.training import NoisyData, TinyTask, train
from visadapt.callbacks.ensemble import Ensemble
from visadapt.core.train import after_step, before_step, ensemble


@pytest.mark.parametrize("host", HOSTS)
def test_between_steps_it_is_lora(host):
    compare(host, va.LoRADropout(rank=3, alpha=6), lambda w, b, p: (w + 2 * product(p["up"], p["down"]), b))
    assert count(place("linear", va.LoRADropout(rank=3))[1]) == 3 * (7 + 10)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("rescale", [True, False])
def test_a_step_masks_inputs_and_outputs(host, rescale):
    model, adapter, x = place(host, va.LoRADropout(rank=3, p=0.4, rescale=rescale))
    mean = model(x)
    before_step(model, 5, None)
    got, again = model(x), model(x)
    assert torch.equal(got, again), "the same masks in every pass of a step"
    inputs, outputs = adapter._masks
    assert {round(v, 9) for v in torch.cat([inputs, outputs]).tolist()} <= {0.0, round(1 / 0.6, 9) if rescale else 1.0}
    shape = (-1, *[1] * (adapter.down.dim() - 2))
    delta = product(torch.diag(outputs) @ adapter.up, adapter.down * inputs.view(shape))
    want = operate(model[0], x, model[0].weight + delta, model[0].bias)
    close(got, want)
    probe, sources = torch.randn_like(want), [x, adapter.down, adapter.up]
    for a, b in zip(torch.autograd.grad(got, sources, probe), torch.autograd.grad(want, sources, probe)):
        close(a, b)
    model.eval()
    close(model(x), mean)
    model.train()
    after_step(model)
    close(model(x), mean)


def test_masks_of_layers_and_steps_differ_and_come_again():
    model = va.adapt(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)), va.LoRADropout(), "all")
    first, second = va.adapters(model).values()

    def masks(step):
        before_step(model, step, None)
        return torch.cat([*first._masks, *second._masks])

    a, b, again = masks(0), masks(1), masks(0)
    assert torch.equal(a, again)
    assert not torch.equal(a, b)
    assert not torch.equal(first._masks[0], second._masks[0])


def test_share_of_zeros_and_mean_over_masks():
    _, adapter, _ = place("linear", va.LoRADropout(rank=2, p=0.3))
    total, zeros, count = 0, 0.0, 3000
    for number in range(count):
        adapter.draw(number)
        delta = adapter.delta().detach()
        total, zeros = total + delta / count, zeros + (delta == 0).double().mean().item() / count
    adapter.draw(None)
    assert abs(zeros - (2 * 0.3 - 0.3**2)) < 0.02
    assert (total - adapter.delta()).norm() < 0.05 * adapter.delta().norm()
    with pytest.raises(ValueError, match=r"p=1"):
        place("linear", va.LoRADropout(p=1))


def test_the_ensemble_is_the_mean_of_masked_outputs():
    model, adapter, x = place("linear", va.LoRADropout(rank=2))
    model.eval()
    want = 0
    for number in range(3):
        adapter.draw(number)
        want = want + model(x).detach() / 3
    adapter.draw(None)
    mean = model(x)
    close(ensemble(model, lambda: model(x), 3), want)
    close(model(x), mean)
    with pytest.raises(ValueError, match="random forms"):
        ensemble(place("linear", va.LoRA())[0], lambda: x, 2)


class Outputs(TinyTask):
    def criterion(self, output, target):
        if not self.training:
            self.seen = output.detach().clone()
        return super().criterion(output, target)


def test_a_run_validates_with_the_ensemble_and_trains_without(tmp_path):
    task = Outputs(dropout=0.0, adapters=[va.Adaptation(va.LoRADropout(rank=2), ["mlp.fc1"])])
    train(tmp_path, Ensemble(3), task=task, max_epochs=1)
    data = NoisyData(batch_size=4)
    last = torch.stack([data.dataset("val")[i][0] for i in range(12, 13)])
    model = task.model.eval()
    close(task.seen, ensemble(model, lambda: model(last), 3), 1e-5)
    assert (task.seen - model(last)).abs().max() > 1e-6
    assert "forward" not in model.__dict__
    with pytest.raises(ValueError, match="passes=0"):
        Ensemble(0)
