"""A sequence of tasks in one run: what trains when, the matrix, exact resume inside and between tasks, and files."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import visadapt as va
from tests.training import Crash, CrashAt, weights
from visadapt.backbones.base import Backbone
from visadapt.callbacks.last_checkpoint import LastCheckpoint
from visadapt.data.base import BaseData
from visadapt.data.task_sequence import TaskSequence
from visadapt.report.run import RunReport
from visadapt.tasks.class_incremental import ClassIncremental

pytestmark = pytest.mark.usefixtures("one_thread")


class Blobs(Dataset):
    """Points around a corner for each class, drawn by torch's state, so that resuming has something to lose."""

    def __init__(self, train):
        self.labels = [c for c in range(6) for _ in range(10 if train else 4)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        label = self.labels[index]
        return 3 * torch.eye(8)[label] + 0.5 * torch.randn(8), label


class BlobData(BaseData):
    class_names = tuple("uvwxyz")

    def dataset(self, stage):
        return Blobs(stage == "train")


class Net(nn.Module):
    """A frozen layer and a classifier, with timm's names for it."""

    def __init__(self, classes):
        super().__init__()
        self.body, self.head = nn.Linear(8, 12), nn.Linear(12, classes)
        self.num_features = 12

    def forward(self, x):
        return self.head(self.body(x).relu())

    def get_classifier(self):
        return self.head

    def reset_classifier(self, classes):
        self.head = nn.Linear(12, classes)


class NetBackbone(Backbone):
    name = "net"

    def build(self, num_classes=None, class_names=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Net(num_classes)

    def preprocess(self, train):
        return lambda image: image


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)


def made(method=None, data=None, **options):
    method = va.SDLoRA(rank=2, tasks=3) if method is None else method
    adaptations = [va.Adaptation(method, ["body"])] if method else []
    data = data or sequence()
    return ClassIncremental(NetBackbone(), data.num_classes, data.task_classes, adaptations, optimizer=adamw, **options)


def sequence(**options):
    return TaskSequence(BlobData(), **{"tasks": 3, "batch_size": 8, "order_seed": None, **options})


def run(folder, task=None, data=None, *callbacks, epochs=6, resume=None, every=2, devices=1, strategy="auto"):
    L.seed_everything(5, verbose=False)
    data = data or sequence()
    task = task or made(data=data)
    trainer = L.Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", devices=devices, strategy=strategy,
        logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1,
        callbacks=[LastCheckpoint(every_n_steps=every, dirpath=str(folder)), *callbacks],
    )  # fmt: skip
    trainer.fit(task, data, ckpt_path=resume)
    return task


class Watch(L.Callback):
    """Which labels came in which epoch, the learning rate, and which parameters changed."""

    def __init__(self):
        self.labels, self.rates = {}, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.labels.setdefault(trainer.current_epoch, set()).update(batch[1].tolist())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_each_task_has_its_epochs_and_its_schedule(tmp_path):
    watch = Watch()
    task = run(tmp_path, None, None, watch)
    assert watch.labels == {0: {0, 1}, 1: {0, 1}, 2: {2, 3}, 3: {2, 3}, 4: {4, 5}, 5: {4, 5}}
    assert watch.rates[:6] == pytest.approx(watch.rates[6:12])
    assert watch.rates[5] < 0.3 * watch.rates[6]
    assert task.task == 2
    assert [a.done for a in va.adapters(task.model).values()] == [2]


def test_the_matrix_has_a_row_after_each_task(tmp_path):
    task = run(tmp_path)
    known = ~task.matrix.isnan()
    assert known.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert task.matrix.diag().mean() > 0.7
    assert (~task.sizes.isnan()).tolist() == known.tolist()
    (adapter,) = va.adapters(task.model).values()
    delta = adapter.magnitude[0] * adapter.past_up[:, :2] @ adapter.past_down[:2]
    assert task.sizes[2, 0].item() == pytest.approx(delta.norm().item(), rel=1e-5)


def test_local_training_leaves_the_rows_of_other_classes_alone(tmp_path):
    rows = []

    class Rows(L.Callback):
        def on_validation_end(self, trainer, module):
            rows.append(module.model.head.weight.detach().clone())

    run(tmp_path, None, None, Rows())
    first, second, third = rows[-3:]
    assert first[:2].any()
    assert not first[2:].any()
    assert torch.equal(first[:2], second[:2])
    assert torch.equal(second[:4], third[:4])


def test_all_classes_so_far_compete_with_replay(tmp_path):
    data = sequence(replay=5)
    plain = run(tmp_path / "a", made(va.LoRA(rank=2)))
    replayed = run(tmp_path / "b", made(va.LoRA(rank=2), data, local=False), data)
    assert replayed.matrix[2].mean() > plain.matrix[2].mean()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", [va.SDLoRA, va.CoDyRA, va.InfLoRA])
@pytest.mark.parametrize("batches", [4, 6, 7, 11, 13])  # in the first task, at its end, in the second, in the third
def test_resume_is_exact(tmp_path, batches, method):
    whole = run(tmp_path / "whole", made(method(rank=2, tasks=3)), every=1)
    with pytest.raises(Crash):
        run(tmp_path / "cut", made(method(rank=2, tasks=3)), None, CrashAt(batches), every=1)
    resumed = run(tmp_path / "cut", made(method(rank=2, tasks=3)), resume=tmp_path / "cut" / "last.ckpt", every=1)
    assert same(weights(whole), weights(resumed))
    assert torch.equal(whole.matrix.nan_to_num(-1), resumed.matrix.nan_to_num(-1))
    assert torch.equal(whole.sizes.nan_to_num(-1), resumed.sizes.nan_to_num(-1))


def test_an_oracle_asks_the_adapters_of_the_task(tmp_path):
    task = run(tmp_path, made(oracle=True))
    (adapter,) = va.adapters(task.model).values()
    images = torch.randn(4, 8)
    found = task.classify(images, torch.tensor([0, 0, 2, 2]))
    assert set(found[:2].tolist()) <= {0, 1}
    assert set(found[2:].tolist()) <= {4, 5}
    body = task.model.body
    hidden = nn.functional.linear(
        images, body.weight + adapter.magnitude[0] * adapter.past_up[:, :2] @ adapter.past_down[:2], body.bias
    )
    want = nn.functional.linear(hidden.relu(), task.model.head.weight, task.model.head.bias)[:, :2].argmax(1)
    assert torch.equal(found[:2], want[:2])
    assert adapter.only is None


class Acting(L.Callback):
    """Which of a stack's updates act while a task trains."""

    def __init__(self):
        self.seen = set()

    def on_train_start(self, trainer, module):
        (adapter,) = va.adapters(module.model).values()

        def note(*_):
            if module.training:
                self.seen.add((module.task, adapter.only))

        module.model.body.register_forward_pre_hook(note)


@pytest.mark.parametrize("oracle", [True, False])
def test_an_oracle_trains_the_adapters_of_a_task_alone(tmp_path, oracle):
    acting = Acting()
    run(tmp_path, made(oracle=oracle), None, acting)
    assert acting.seen == {(k, k if oracle else None) for k in range(3)}


def test_replayed_images_need_a_loss_that_knows_their_classes(tmp_path):
    data = sequence(replay=2)
    with pytest.raises(ValueError, match="model.local: replayed images"):
        run(tmp_path, made(data=data), data)
    run(tmp_path, made(data=data, local=False), data)


def test_a_cosine_head_scores_angles(tmp_path):
    task = run(tmp_path, made(head="cosine"))
    head, features = task.model.head, torch.randn(3, 12)
    want = head.scale * nn.functional.cosine_similarity(features[:, None], head.weight[None], dim=-1)
    torch.testing.assert_close(head(features), want)
    assert task.matrix[0, 0] > 0.7


def test_predictions_leave_out_classes_that_never_came(tmp_path):
    task = made()
    task.configure_model()
    scores = task.predict_step(torch.randn(2, 8), 0)
    assert scores[:, 2:].max() == -math.inf
    assert scores[:, :2].isfinite().all()


def test_a_checkpoint_predicts_without_being_told_the_tasks(tmp_path):
    trained = run(tmp_path, epochs=3)
    task = ClassIncremental(NetBackbone(), 6, adapters=[va.Adaptation(va.SDLoRA(rank=2, tasks=3), ["body"])])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    task.on_load_checkpoint(saved)
    task.load_state_dict(saved["state_dict"], strict=False)
    images = torch.randn(5, 8)
    assert torch.equal(task.predict_step(images, 0), trained.eval().predict_step(images, 0))


def test_a_run_leaves_matrix_pictures_and_a_merged_model(tmp_path):
    report = RunReport(str(tmp_path / "run"), name="blobs")
    task = run(tmp_path, None, None, report)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    rows = (tmp_path / "run" / "accuracy_matrix.csv").read_text().splitlines()
    assert rows[0] == "after task,task 1,task 2,task 3"
    assert float(rows[3].split(",")[1]) == pytest.approx(task.matrix[2, 0].item())
    assert facts["figures"]["last accuracy"] == pytest.approx(task.matrix[2].mean().item())
    assert {"accuracy_matrix.png", "update_sizes.png", "update_sizes.csv", "README.md"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    from safetensors.torch import load_file

    plain, x = Net(6), torch.randn(5, 8)
    plain.load_state_dict(load_file(tmp_path / "run" / "merged.safetensors"))
    torch.testing.assert_close(plain(x), task.model(x))
    loaded = va.load(NetBackbone().build(6), tmp_path / "run" / "adapter.safetensors")
    assert torch.equal(loaded(x), task.model(x))


@pytest.mark.parametrize("method", [va.SDLoRA(rank=2, tasks=3), va.LoRA(rank=2)])
def test_a_file_of_each_task_is_kept_where_that_is_wanted(tmp_path, method):
    x, outputs = torch.randn(5, 8), []

    class Look(L.Callback):
        def on_validation_end(self, trainer, task):
            outputs.append(task.model(x))

    run(tmp_path, made(method, keep_tasks=True), None, RunReport(str(tmp_path / "run")), Look())
    files = sorted(path.name for path in (tmp_path / "run").glob("*task*.safetensors"))
    assert files == ["after_task_1.safetensors", "after_task_2.safetensors"]
    for name, output in zip([*files, "adapter.safetensors"], outputs[-3:], strict=True):
        assert torch.equal(va.load(NetBackbone().build(6), tmp_path / "run" / name)(x), output)
    assert not torch.equal(outputs[-3], outputs[-2])


def test_what_cannot_be_is_named(tmp_path):
    with pytest.raises(ValueError, match="7 cannot be shared out over 3 tasks"):
        run(tmp_path, epochs=7)
    with pytest.raises(ValueError, match="'default' has room for 2 tasks"):
        run(tmp_path, made(va.SDLoRA(tasks=2)))
    with pytest.raises(ValueError, match="task_classes"):
        ClassIncremental(NetBackbone(), 4, [[0, 1]])
    other = sequence(tasks=2)
    saved = run(tmp_path / "three", epochs=3)
    assert saved.task == 2
    with pytest.raises(ValueError, match="another sequence of tasks"):
        run(tmp_path / "two", made(va.LoRA(rank=2), other), other, epochs=4, resume=_plain(tmp_path))


def _plain(folder):
    """A checkpoint of three tasks with plain LoRA."""
    run(folder / "lora", made(va.LoRA(rank=2)), epochs=3)
    return folder / "lora" / "last.ckpt"


def test_the_data_are_for_this_task_alone(tmp_path):
    from tests.training import TinyTask

    with pytest.raises(ValueError, match="TaskSequence is for"):
        L.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
                  enable_model_summary=False, max_epochs=1).fit(TinyTask(), sequence())  # fmt: skip


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    found = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        script = Path(__file__).parents[1] / "sequence_run.py"
        command = [sys.executable, str(script), str(folder), "--devices", str(devices)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=400)
        found[devices] = torch.load(folder / "result.pt")
    one, two = found[1], found[2]
    assert torch.equal(one["matrix"].nan_to_num(-1), two["matrix"].nan_to_num(-1))
    torch.testing.assert_close(one["sizes"], two["sizes"], equal_nan=True, rtol=1e-4, atol=1e-6)
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(tensor, two["weights"][name], rtol=1e-4, atol=1e-5, msg=name)
