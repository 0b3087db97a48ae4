"""Accuracies over a sequence of tasks, against figures counted by hand."""

import pytest
import torch

from visadapt.metrics.sequence import TaskAccuracy, summary

NAN = float("nan")


def test_accuracy_of_each_task():
    metric = TaskAccuracy(3)
    metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 2]), torch.tensor([0, 0, 1]))
    metric.update(torch.tensor([3]), torch.tensor([2]), torch.tensor([1]))
    found = metric.compute()
    assert found[:2].tolist() == [0.5, 0.5]
    assert found[2].isnan()


def test_figures_of_a_matrix():
    matrix = torch.tensor([[0.9, NAN, NAN], [0.5, 0.8, NAN], [0.6, 0.4, 1.0]])
    found = summary(matrix)
    assert found["last accuracy"] == pytest.approx(2 / 3)
    assert found["average accuracy"] == pytest.approx((0.9 + 0.65 + 2 / 3) / 3)
    assert found["forgetting"] == pytest.approx((0.3 + 0.4) / 2)
    assert found["backward transfer"] == pytest.approx((-0.3 - 0.4) / 2)


def test_a_sequence_under_way():
    assert summary(torch.full((3, 3), NAN)) == {}
    one = torch.full((3, 3), NAN)
    one[0, 0] = 0.7
    assert summary(one) == {"last accuracy": pytest.approx(0.7), "average accuracy": pytest.approx(0.7)}


def test_forgetting_counts_the_best_of_all_earlier_tasks():
    matrix = torch.tensor([[0.5, NAN, NAN], [0.9, 0.8, NAN], [0.6, 0.8, 1.0]])
    assert summary(matrix)["forgetting"] == pytest.approx(0.15)
    assert summary(matrix)["backward transfer"] == pytest.approx(0.05)
