"""The hooks of adapters come once per optimiser step; a run that cannot learn stops with a clear message."""

import lightning as L
import pytest
import torch

import visadapt as va
from tests.training import TinyTask, train


class Recorder(va.LoRA):
    """LoRA that writes down what training tells it."""

    def build(self, layer):
        super().build(layer)
        self.calls = []

    def before_step(self, step, total):
        self.calls.append(("before", (step, total)))

    def after_backward(self):
        self.calls.append(("gradient", self.up.grad is not None))

    def after_step(self):
        self.calls.append(("after", None))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_once_per_optimiser_step(tmp_path, accumulate):
    task = TinyTask(adapters=[va.Adaptation(Recorder(rank=1), ["attn.proj"])])
    train(tmp_path, task=task, accumulate_grad_batches=accumulate, max_epochs=1)
    steps = task.trainer.global_step
    assert steps == (9 if accumulate == 1 else 5)
    expected = [c for i in range(steps) for c in (("before", (i, steps)), ("gradient", True), ("after", None))]
    for adapter in va.adapters(task).values():
        assert adapter.calls == expected


class Frozen(va.LoRA):
    """A gradient that an adapter replaces counts."""

    def after_backward(self):
        self.up.grad = torch.zeros_like(self.up)


def test_a_gradient_replaced_by_an_adapter_counts(tmp_path):
    task = TinyTask(adapters=[va.Adaptation(Frozen(rank=1), ["attn.proj"])])
    train(tmp_path, task=task, max_epochs=1)
    assert all((a.up == 0).all() for a in va.adapters(task).values())


class Bypassed(TinyTask):
    """Calls the first block's MLP by its weights, past the adapter."""

    def build(self):
        model = super().build()
        linear = model.blocks[0].mlp.fc1
        model.blocks[0].mlp.forward = lambda x: torch.nn.functional.linear(x, linear.weight)[..., :16]
        return model


def test_unreached_adapters_stop_the_run(tmp_path):
    task = Bypassed(adapters=[va.Adaptation(va.LoRA(rank=1), ["mlp.fc1"])])
    with pytest.raises(RuntimeError, match=r"no gradient reached the adapters of blocks\.0\.mlp\.fc1: .* targets"):
        train(tmp_path, task=task)
    assert not (tmp_path / "last.ckpt").exists()


class Poison(L.Callback):
    """Spoils an adapter tensor at a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            next(iter(va.adapters(pl_module).values())).up.data.fill_(float("nan"))


class Explodes(TinyTask):
    def criterion(self, output, target):
        return super().criterion(output, target) * (float("inf") if self.global_step == 3 else 1.0)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt(tmp_path):
    task = Explodes(dropout=0.0)
    with pytest.raises(FloatingPointError, match=r"the loss is inf at step 3"):
        train(tmp_path, task=task)
    assert all(torch.isfinite(p).all() for p in task.parameters())


def test_a_tensor_that_is_not_finite_is_named():
    from visadapt.callbacks.check_reached import check_finite

    task = TinyTask()
    task.configure_model()
    check_finite(task, 1)
    Poison().on_train_batch_start(type("Trainer", (), {"global_step": 3}), task, None, 0)
    with pytest.raises(FloatingPointError, match=r"blocks\.0\.attn\.qkv\.adapters\.default_q\.up is not finite"):
        check_finite(task, 50)


def test_the_poisoned_run_stops(tmp_path):
    with pytest.raises(FloatingPointError):
        train(tmp_path, Poison())
