"""What lies between two models of one run: the loss on the straight line of weights from the one to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

import visadapt as va
import visadapt.backbones
from visadapt.backbones.base import Backbone
from visadapt.data.task_sequence import TaskSequence

FIRST, LAST = "after_task_1.safetensors", "adapter.safetensors"


def losses(folder: Path, points: int = 11) -> Tensor:
    """Loss of W(s) = (1 − s) W_1 + s W_T on held-out images by task, for s from 0 to 1 (points, tasks).

    W_1 are the merged weights after the first task, W_T those after the last. The loss is the one that trained, the
    cross-entropy among the classes of the image's own task. The head is the last one all the way: trained like that,
    its rows of the first task are those that the first task left.

    Args:
        folder: A run of a sequence that has kept its tasks (``model.keep_tasks``).
        points: How many s.
    """
    backbone, data = _recipes(folder)
    network = backbone.build(data.num_classes)
    of_head = {id(parameter) for parameter in backbone.head(network).parameters()}
    head = {name for name, parameter in network.named_parameters() if id(parameter) in of_head}
    first, last = ({**_merged(backbone, data, folder / name)} for name in (FIRST, LAST))
    first |= {name: last[name] for name in head}
    found = []
    for s in torch.linspace(0, 1, points).tolist():
        network.load_state_dict({name: torch.lerp(first[name], last[name], s) for name in last})
        found.append(_by_task(network.eval(), data))
    return torch.stack(found)


def _recipes(folder: Path) -> tuple[Any, TaskSequence]:
    """The network and the data of a run; the data prepare images as the network wants them."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    parser.add_subclass_arguments(TaskSequence, "data")
    parts = {"backbone": config["model"]["init_args"]["backbone"], "data": config["data"]}
    made = parser.instantiate_classes(parser.parse_object(parts))
    for source in made.data.sources:
        source.transform = made.backbone.preprocess(False)
    made.data.setup("test")
    return made.backbone, made.data


def _merged(backbone: Any, data: TaskSequence, file: Path) -> dict[str, Tensor]:
    return va.merge(va.load(backbone.build(data.num_classes), file)).state_dict()


@torch.no_grad()
def _by_task(network: Any, data: TaskSequence) -> Tensor:
    sums = torch.zeros(2, len(data.task_classes))
    for images, labels, tasks in data.loader(data.held_out(len(data.task_classes) - 1)):
        scores = network(images)
        for task in tasks.unique().tolist():
            mine, classes = tasks == task, torch.tensor(data.task_classes[task])
            place = torch.searchsorted(classes, labels[mine])
            sums[0, task] += F.cross_entropy(scores[mine][:, classes], place, reduction="sum")
            sums[1, task] += len(place)
    return sums[0] / sums[1]
