"""Warm-up, decay, and the number of steps computed from the configuration."""

from itertools import pairwise

import lightning as L
import pytest
import torch
from torch import nn

from visadapt.optim.schedule import Schedule


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_shape(shape):
    schedule = Schedule(shape, warmup=0.1, final=0.2)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert 0 < factors[0] < factors[5] < factors[10] == 1
    assert factors[-1] == pytest.approx(1.0 if shape == "constant" else 0.2)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    if shape != "constant":
        assert factors[55] == pytest.approx(0.6)  # half way down


def test_no_warmup_starts_at_full_rate():
    assert Schedule(warmup=0).factor(0, 10) == 1


@pytest.mark.parametrize("kwargs", [{"warmup": 1.0}, {"final": -1.0}, {"shape": "wave"}], ids=str)
def test_bad_values_name_the_field(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        Schedule(**kwargs)


class Probe(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.total = None

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        from visadapt.optim.schedule import total_steps

        self.total = total_steps(self.trainer)
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 3}, 30),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 9),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 15),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_steps": 12}, 12),
    ],
    ids=str,
)
def test_total_steps_are_the_steps_taken(tmp_path, options, expected):
    loader = torch.utils.data.DataLoader(torch.ones(20, 1), batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    probe = Probe()
    trainer.fit(probe, loader)
    assert probe.total == expected == trainer.global_step
