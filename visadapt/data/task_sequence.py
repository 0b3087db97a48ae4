"""A labelled data module cut into a sequence of tasks: by classes, or one domain after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from visadapt.data.base import BaseData, Stage

Sample = tuple[int, int, int, int]  # dataset, position in it, label, task


class TaskSequence(BaseData):
    """Tasks that come one after the other; of each only its own images train.

    A source is cut by classes: ``tasks`` groups of classes of equal size (the first ones take what is left over), in an
    order drawn by ``order_seed``. With ``domains``, further sources with the same classes, each of them is a task.
    Labels count in the order of the tasks. Samples are triples of image, label and task.

    Training runs through ``trainer.max_epochs / tasks`` epochs of each task; held out are the samples of all tasks so
    far.

    Args:
        source: A data module with labels, such as ``Digits`` or ``ImageFolder``.
        domains: More of them, with the same classes.
        tasks: Number of tasks: by default 5 of one source, and of several one for each. 1 is all of it together.
        order_seed: Source of the order of the classes; None takes them as they are.
        replay: Training images of each earlier class that train again with every task (0: none, as most methods want).
        evaluate: What is held out: "test", as papers do, or "val", to choose settings by.
        batch_size: Samples per batch on each device.
        num_workers: Processes that load data ahead.
        seed: Source of the order of the samples and of the replayed ones.
        drop_last: Leave out the last, short training batch of an epoch.
    """

    def __init__(
        self,
        source: BaseData,
        domains: list[BaseData] | None = None,
        tasks: int | None = None,
        order_seed: int | None = 0,
        replay: int = 0,
        evaluate: Literal["test", "val"] = "test",
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, drop_last=drop_last)
        self.sources, self.replay, self.evaluate = [source, *(domains or [])], replay, evaluate
        names, count = list(source.class_names), len(self.sources)
        for number, other in enumerate(self.sources[1:], 1):
            if list(other.class_names) != names:
                raise ValueError(f"data.domains: number {number} has other classes than data.source; they share theirs")
        tasks = tasks or (5 if count == 1 else count)
        self.by_domain = count > 1 and tasks > 1
        if self.by_domain and tasks != count:
            raise ValueError(f"data.tasks: {tasks}, but there are {count} sources, each a domain; leave it out")
        if not self.by_domain and not 1 <= tasks <= len(names):
            raise ValueError(f"data.tasks: {tasks} tasks of {len(names)} classes; each needs a class of its own")
        order = np.arange(len(names))
        if order_seed is not None and not self.by_domain:
            order = np.random.default_rng(order_seed).permutation(len(names))
        self.class_names = [names[i] for i in order]
        self._label = {int(old): new for new, old in enumerate(order)}
        groups = [list(range(len(names)))] * count
        if not self.by_domain:
            groups = [part.tolist() for part in np.array_split(np.arange(len(names)), tasks)]
        self.task_classes: list[list[int]] = groups

    # --- the tasks -------------------------------------------------------------------------
    def task_now(self) -> int:
        """The task that trains in this epoch.

        Raises:
            ValueError: The model knows no tasks.
        """
        if self.trainer is None:
            return 0
        asked = getattr(self.trainer.lightning_module, "task_now", None)
        if asked is None:
            raise ValueError("data: TaskSequence is for `model: {class_path: ClassIncremental}`")
        return asked()

    def setup(self, stage: str) -> None:
        """Let the sources list their images."""
        for source in self.sources:
            source.trainer = self.trainer
            source.setup(stage)

    def dataset(self, stage: Stage) -> Dataset:
        """Images of the task that trains; of all tasks so far where they are held out."""
        if stage == "predict":
            return self.sources[0].dataset(stage)
        return self.of_task(self.task_now()) if stage == "train" else self.held_out(self.task_now())

    def of_task(self, task: int) -> TaskSet:
        """The training images of a task, and those of earlier ones that are replayed."""
        found = self._samples("train")
        chosen = [sample for sample in found.samples if sample[3] == task]
        generator = np.random.default_rng((self.seed, 2))
        for earlier in range(task if self.replay else 0):
            for label in self.task_classes[earlier]:
                mine = [sample for sample in found.samples if sample[2:] == (label, earlier)]
                picks = generator.choice(len(mine), min(self.replay, len(mine)), replace=False)
                chosen += [mine[i] for i in sorted(picks.tolist())]
        return TaskSet(found.datasets, chosen)

    def held_out(self, task: int) -> TaskSet:
        """The held-out images of the tasks up to this one."""
        found = self._samples(self.evaluate)
        return TaskSet(found.datasets, [sample for sample in found.samples if sample[3] <= task])

    def _samples(self, stage: Stage) -> TaskSet:
        datasets = [source.dataset(stage) for source in self.sources]
        of_class = {label: task for task, classes in enumerate(self.task_classes) for label in classes}
        samples = []
        for number, dataset in enumerate(datasets):
            for position, old in enumerate(_labels(dataset)):
                label = self._label[old]
                samples.append((number, position, label, number if self.by_domain else of_class[label]))
        return TaskSet(datasets, samples)

    def preprocess(self, train: bool) -> Any:
        """The transform of the first source."""
        self.sources[0].trainer = self.trainer
        return self.sources[0].preprocess(train)


class TaskSet(Dataset):
    """Triples of image, label and task from several datasets.

    Args:
        datasets: Where the images are.
        samples: Number of the dataset, position in it, label and task of each sample.
    """

    def __init__(self, datasets: Sequence[Dataset], samples: Sequence[Sample]) -> None:
        self.datasets, self.samples = list(datasets), list(samples)

    def set_epoch(self, epoch: int) -> None:
        """Tell the datasets, which may draw anew."""
        for dataset in self.datasets:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        number, position, label, task = self.samples[index]
        return self.datasets[number][position][0], label, task


def _labels(dataset: Any) -> list[int]:
    if not hasattr(dataset, "labels"):
        raise ValueError(
            f"data.source: {type(dataset).__name__} does not say its labels without loading the images; "
            "use Digits or ImageFolder, or give it an attribute `labels`"
        )
    return list(dataset.labels)
