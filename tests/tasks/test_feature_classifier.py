"""Classifiers from sums over features, against the same thing computed from all samples at once."""

import pytest
import torch
import torch.nn.functional as F

from tests.tasks.test_class_incremental import NetBackbone, run, sequence
from visadapt.tasks.feature_classifier import FeatureClassifier
from visadapt.tasks.statistics_heads import MeansHead, RandomProjectionHead

pytestmark = pytest.mark.usefixtures("one_thread")


def samples(count=60):
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(count) % 4
    return torch.randn(count, 6, generator=generator) + 2 * F.one_hot(target, 6), target


def test_means_in_parts():
    features, target = samples()
    head = MeansHead(6, 4)
    for part in torch.arange(60).split(7):
        head.update(features[part], target[part])
    means = torch.stack([features[target == c].mean(0) for c in range(4)])
    torch.testing.assert_close(head(features), F.cosine_similarity(features[:, None], means[None], dim=-1))


def test_ridge_regression_from_sums():
    features, target = samples()
    head = RandomProjectionHead(6, 4, width=20, seed=1)
    for part in torch.arange(60).split(7):
        head.update(features[part], target[part])
    head.fit()
    hidden, wanted = (features @ head.projection).relu().double(), F.one_hot(target, 4).double()
    held = torch.arange(60) % 5 == 4
    eye, errors = torch.eye(20, dtype=torch.float64), {}

    def ridge(mine, rate):
        return torch.linalg.solve(hidden[mine].t() @ hidden[mine] + rate * eye, hidden[mine].t() @ wanted[mine])

    for power in range(-4, 9):
        errors[power] = float((hidden[held] @ ridge(~held, 10.0**power) - wanted[held]).square().sum())
    best = min(errors, key=errors.get)
    assert -4 < best < 8, "the choice is not at the edge"
    want = hidden @ ridge(torch.ones(60, dtype=bool), 10.0**best)
    torch.testing.assert_close(head(features).double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["means", "ranpac"])
def test_a_sequence_of_tasks_is_learned_in_one_pass(tmp_path, kind):
    data = sequence()
    task = FeatureClassifier(NetBackbone(), 6, data.task_classes, kind, width=40)
    run(tmp_path, task, data, epochs=3)
    assert task.matrix[2].mean() > 0.8
    twice = FeatureClassifier(NetBackbone(), 6, data.task_classes, kind, width=40)
    run(tmp_path / "twice", twice, data, epochs=3)
    assert torch.equal(task.matrix.nan_to_num(-1), twice.matrix.nan_to_num(-1))
