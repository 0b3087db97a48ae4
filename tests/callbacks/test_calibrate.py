"""LoRA-SB in a run: it starts from the gradients of the first batches, which then train as ever, also after a kill."""

from __future__ import annotations

import lightning as L
import pytest
import torch

import visadapt as va
from tests.training import Crash, CrashAt, NoisyData, TinyTask, train, weights
from visadapt.callbacks.calibrate import Calibrate

TARGETS = ["attn.qkv:v", "mlp.fc1"]


def task(dropout=0.0, **fields):
    return TinyTask(dropout=dropout, adapters=[va.Adaptation(va.LoRASB(rank=2, **fields), TARGETS)])


class Watch(L.Callback):
    """Writes down the batches that are trained on and the first start of the adapters."""

    def __init__(self):
        self.images, self.start = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.images.append(batch[0].clone())
        self.start = self.start or weights(pl_module)


def test_a_run_starts_from_its_first_batches(tmp_path):
    watch, other, base = Watch(), Watch(), task()
    train(tmp_path / "a", watch, Calibrate(batches=2), task=base, max_epochs=1)
    plain = TinyTask(dropout=0.0)
    train(tmp_path / "b", other, task=plain, max_epochs=1)
    for a, b in zip(watch.images, other.images, strict=True):
        assert torch.equal(a, b), "the same batches as without"
    model = TinyTask(dropout=0.0, adapters=[])
    model.configure_model()
    weight = model.model.blocks[0].mlp.fc1.weight.requires_grad_()
    model.model.head.load_state_dict({k: watch.start[f"head.{k}"] for k in ("weight", "bias")})
    data = NoisyData(batch_size=4).train_dataloader()
    for _, (images, labels) in zip(range(2), data):
        model.criterion(model.model(images), labels).backward()
    u, *_ = torch.linalg.svd(-weight.grad.double().sign())
    found = watch.start["blocks.0.mlp.fc1.adapters.default.up"].double()
    torch.testing.assert_close((u[:, :2].t() @ found).abs(), torch.eye(2).double(), atol=1e-4, rtol=0)
    assert watch.start["blocks.0.mlp.fc1.adapters.default.calibrated"] == 1
    assert not any(p.requires_grad for n, p in base.model.named_parameters() if n.endswith("fc1.weight"))


def test_a_killed_run_does_not_calibrate_again(tmp_path):
    whole = train(tmp_path / "a", task=task(dropout=0.1))
    with pytest.raises(Crash):
        train(tmp_path / "b", CrashAt(7), task=task(dropout=0.1))
    resumed = train(tmp_path / "b", task=task(dropout=0.1), resume=str(tmp_path / "b" / "last.ckpt"))
    for key, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[key], tensor), key
    start = {k: v for k, v in weights(whole).items() if k.endswith("fc1.adapters.default.core")}
    assert any(v.any() for v in start.values())


def test_the_callback_is_there_where_it_is_needed(tmp_path):
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    for one, wanted in ((task(), True), (TinyTask(), False)):
        one.trainer = trainer
        assert any(isinstance(c, Calibrate) for c in one.configure_callbacks()) is wanted
    with pytest.raises(ValueError, match="batches=0"):
        Calibrate(0)
