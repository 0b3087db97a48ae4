"""The way between the weights after the first task and the last ones begins and ends at the files of the run."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml

import visadapt as va
from benchmarks import _path
from visadapt.backbones import TimmViT
from visadapt.data.digits import Digits
from visadapt.data.task_sequence import TaskSequence
from visadapt.report.run import RunReport
from visadapt.tasks.class_incremental import ClassIncremental

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCE = {"domain": "inverted", "source_domain": None, "shots": 4}
CONFIG = {
    "model": {"init_args": {"backbone": {"class_path": "TimmViT", "init_args": {"name": "tiny_digits"}}}},
    "data": {
        "class_path": "TaskSequence",
        "init_args": {"tasks": 2, "source": {"class_path": "visadapt.data.digits.Digits", "init_args": SOURCE}},
    },
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def test_both_ends_are_the_files_and_the_middle_is_neither(tmp_path):
    data = TaskSequence(Digits(**SOURCE), tasks=2)
    sets = [va.Adaptation(va.SDLoRA(rank=2, tasks=2), ["attention", "mlp"])]
    task = ClassIncremental(TimmViT("tiny_digits"), 10, data.task_classes, sets, keep_tasks=True, optimizer=sgd)
    L.Trainer(
        accelerator="cpu", devices=1, max_epochs=8, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[RunReport(str(tmp_path))],
    ).fit(task, data)  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    found = _path.losses(tmp_path, points=3)

    def loss(file, number):
        model, classes = va.load(TimmViT("tiny_digits").build(10), tmp_path / file).eval(), data.task_classes[number]
        data.sources[0].transform = TimmViT("tiny_digits").preprocess(False)
        images, labels, tasks = zip(*data.held_out(1), strict=True)
        mine = torch.tensor(tasks) == number
        with torch.no_grad():
            scores = model(torch.stack(images)[mine])[:, classes]
        return F.cross_entropy(scores, torch.tensor(labels)[mine] - classes[0])

    torch.testing.assert_close(found[0, 0], loss(_path.FIRST, 0), rtol=1e-4, atol=1e-5)
    for number in range(2):
        torch.testing.assert_close(found[2, number], loss(_path.LAST, number), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(found[0], found[2]).any()
    assert not torch.isclose(found[1], found[2]).any()
