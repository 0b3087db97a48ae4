"""Tasks cut from a source by classes, or a domain each: who trains when, what is held out, what is replayed."""

from collections import Counter

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from visadapt.data.base import BaseData
from visadapt.data.digits import Digits
from visadapt.data.image_folder import ImageFolder
from visadapt.data.task_sequence import TaskSequence


class Coloured(Dataset):
    """Six samples of each label; the image says label, number and domain."""

    def __init__(self, classes, domain):
        self.labels, self.domain, self.epoch = [c for c in range(classes) for _ in range(6)], domain, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.tensor([self.labels[index], index, self.domain]), self.labels[index]


class Source(BaseData):
    def __init__(self, names="abcde", domain=0):
        super().__init__()
        self.class_names, self.domain = list(names), domain

    def dataset(self, stage):
        return Coloured(len(self.class_names), self.domain)


def content(dataset):
    return [dataset[i] for i in range(len(dataset))]


def test_classes_are_shared_out_in_the_order_of_a_seed():
    data = TaskSequence(Source(), tasks=2, order_seed=3)
    assert data.task_classes == [[0, 1, 2], [3, 4]]
    assert sorted(data.class_names) == list("abcde")
    assert data.class_names != list("abcde")
    assert TaskSequence(Source(), tasks=2, order_seed=3).class_names == data.class_names
    assert TaskSequence(Source(), tasks=2, order_seed=None).class_names == list("abcde")


def test_a_task_has_its_own_images_and_labels():
    data = TaskSequence(Source(), tasks=2, order_seed=3)
    for task, classes in enumerate(data.task_classes):
        found = content(data.of_task(task))
        assert Counter(label for _, label, _ in found) == {c: 6 for c in classes}
        assert {number for *_, number in found} == {task}
        assert all("abcde"[image[0]] == data.class_names[label] for image, label, _ in found)


def test_held_out_are_the_tasks_so_far():
    data = TaskSequence(Source(), tasks=5)
    assert [len(data.held_out(task)) for task in range(5)] == [6, 12, 18, 24, 30]
    assert {task for *_, task in content(data.held_out(2))} == {0, 1, 2}


def test_replayed_images_are_the_same_in_every_epoch_and_few():
    data = TaskSequence(Source(), tasks=5, replay=2, seed=4)
    assert len(data.of_task(0)) == 6
    found = content(data.of_task(3))
    assert Counter(label for _, label, _ in found) == {0: 2, 1: 2, 2: 2, 3: 6}
    again = content(TaskSequence(Source(), tasks=5, replay=2, seed=4).of_task(3))
    assert [image.tolist() for image, *_ in found] == [image.tolist() for image, *_ in again]
    other = content(TaskSequence(Source(), tasks=5, replay=2, seed=5).of_task(3))
    assert [image.tolist() for image, *_ in found] != [image.tolist() for image, *_ in other]


def test_several_sources_are_a_domain_each():
    data = TaskSequence(Source(domain=7), [Source(domain=8)])
    assert data.task_classes == [[0, 1, 2, 3, 4]] * 2
    assert data.class_names == list("abcde")
    assert {int(image[2]) for image, *_ in content(data.of_task(1))} == {8}
    assert {(int(image[2]), task) for image, _, task in content(data.held_out(1))} == {(7, 0), (8, 1)}


def test_all_together_is_one_task():
    assert len(TaskSequence(Source(domain=7), [Source(domain=8)], tasks=1).of_task(0)) == 60
    assert len(TaskSequence(Source(), tasks=1).of_task(0)) == 30


def test_epochs_reach_the_source():
    dataset = TaskSequence(Source()).of_task(0)
    dataset.set_epoch(5)
    assert dataset.datasets[0].epoch == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskSequence(Source(), tasks=6), "6 tasks of 5 classes"),
        (lambda: TaskSequence(Source(), [Source("abc")]), "number 1 has other classes"),
        (lambda: TaskSequence(Source(), [Source()], tasks=3), "3, but there are 2 sources"),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_digits_and_folders_say_their_labels(tmp_path):
    digits = TaskSequence(Digits(domain="inverted"), tasks=5)
    assert {label for *_, label, _ in digits.of_task(0).samples} == {0, 1}
    for split in ("train", "val", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "1.png")
    folder = TaskSequence(ImageFolder(str(tmp_path)), tasks=2)
    assert len(folder.of_task(1)) == 1
    assert folder.of_task(1)[0][1:] == (1, 1)


def test_a_source_without_labels_is_named():
    class Silent(Source):
        def dataset(self, stage):
            return torch.utils.data.TensorDataset(torch.zeros(3))

    with pytest.raises(ValueError, match="TensorDataset does not say its labels"):
        TaskSequence(Silent()).of_task(0)
