"""The average follows its formula, is what is validated, saved and left in the model; the base is not copied."""

import lightning as L
import pytest
import torch

from tests.training import NoisyData, TinyTask, train, weights
from visadapt.callbacks.adapter_ema import AdapterEMA


class Watch(L.Callback):
    """Live weights after each step; the weights that validation saw."""

    def __init__(self):
        self.live, self.seen = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.live.append(pl_module.model.head.weight.detach().clone())

    def on_validation_epoch_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append(pl_module.model.head.weight.detach().clone())


def test_average(tmp_path):
    watch, task = Watch(), TinyTask(ema_decay=0.8)
    task.configure_model()
    expected = task.model.head.weight.detach().clone()
    train(tmp_path, watch, task=task, max_epochs=1)
    for step, live in enumerate(watch.live, 1):
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * live
    assert torch.allclose(watch.seen[-1], expected, atol=1e-7)
    assert torch.equal(task.model.head.weight, watch.seen[-1])
    assert not torch.equal(watch.live[-1], watch.seen[-1])


def test_checkpoint_holds_averages_for_evaluation(tmp_path):
    task = train(tmp_path, task=TinyTask(ema_decay=0.8), max_epochs=1)
    saved = torch.load(tmp_path / "last.ckpt")
    assert saved["live_weights"].keys() == saved["state_dict"].keys()
    assert not any(name.endswith("attn.qkv.weight") for name in saved["state_dict"])
    fresh = TinyTask()  # knows nothing of averages
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.test(fresh, NoisyData(batch_size=4), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    ours, theirs = weights(task), weights(fresh)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="ema_decay"):
        AdapterEMA(decay)
