"""Adherence: exact counts from known answers; the shipped judge knows renders as its file states."""

import json

import pytest
import torch
from torch import nn

from visadapt.data import scenes
from visadapt.metrics import adherence as module
from visadapt.metrics.adherence import FILE, Judge, adherence, judge, judged

shipped = pytest.mark.skipif(not FILE.is_file(), reason="the judge has not been trained yet")


class Reads(nn.Module):
    """Answers that are written in the corner pixel: red is the shape, green the colour, blue the background."""

    classes = (3, 2, 4)

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        corner = images[:, :, 0, 0]
        counts = zip(("shape", "colour", "background"), (4, 2, 4))
        named = {n: nn.functional.one_hot(corner[:, i].long(), c).float() for i, (n, c) in enumerate(counts)}
        return named | {"subject": images[:, 0, 0, 1], "style": images[:, 0, 0, 2]}


def picture(shape, colour, background, subject=False, style=False):
    image = torch.full((3, 4, 4), -1.0)
    image[:, 0, 0] = torch.tensor([shape, colour, background])
    image[0, 0, 1], image[0, 0, 2] = (1.0 if present else -1.0 for present in (subject, style))
    return image


def test_adherence_counts_what_was_asked_for():
    images = torch.stack([picture(0, 1, 2), picture(1, 1, 3, subject=True), picture(3, 0, 0), picture(2, 1, 1)])
    labels = {"shape": [0, 2, 1, -1], "colour": torch.tensor([1, 1, 1, -1]), "background": [2, 3, -1, -1]}
    found = adherence(images, labels, Reads())
    assert found["shape"] == pytest.approx(1 / 3)
    assert found["colour"] == pytest.approx(2 / 3)
    assert found["background"] == 1.0
    assert found["all"] == pytest.approx(1 / 3)  # the fourth picture was asked for nothing
    assert found["subject"] == 0.25
    assert found["style"] == 0.0


def test_nothing_asked_is_nothing_counted():
    assert adherence(picture(0, 0, 0, style=True)[None], {"shape": [-1]}, Reads()) == {"subject": 0.0, "style": 1.0}


def test_a_picture_without_a_known_shape_gets_no_credit():
    images = torch.stack([picture(3, 0, 0), picture(2, 0, 0)])
    assert judged(images, Reads())["shape"].tolist() == [-1, 2]
    assert adherence(images, {"shape": [3, 2]}, Reads())["shape"] == 0.5


def test_any_size_and_batches_of_any_size():
    torch.manual_seed(0)
    network = Judge([8, 8, 11], widths=(4, 4, 4, 4)).eval()
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    whole, parts = (judged(images, network, batch_size=size) for size in (5, 2))
    for name, answers in whole.items():
        assert torch.equal(answers, parts[name])
    large = nn.functional.interpolate(images, scale_factor=2, mode="nearest")
    logits, same = network(large), network(images)
    for name, value in same.items():
        assert torch.allclose(logits[name], value, atol=0.2)


def test_a_missing_judge_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "FILE", tmp_path / "judge.safetensors")
    judge.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"judge\.safetensors: the judge of adherence is missing"):
        judge()
    judge.cache_clear()


@shipped
def test_the_shipped_judge_knows_renders():
    known = json.loads(FILE.with_suffix(".json").read_text())
    assert known["classes"]["shape"] == list(scenes.SHAPES)
    assert known["classes"]["colour"] == list(scenes.COLOURS)
    assert known["classes"]["background"] == list(scenes.BACKGROUNDS)
    assert FILE.stat().st_size < 1_000_000
    drawn = [scenes.scene(123, i, split="test" if i % 2 else "val") for i in range(120)]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _, _ in drawn]).float() / 127.5 - 1
    labels = {name: [entry[2][name] for entry in drawn] for name in drawn[0][2]}
    found = adherence(images, labels)
    for name in ("shape", "colour", "background"):
        assert known["accuracy"]["renders"][name] > 0.97
        assert found[name] > known["accuracy"]["renders"][name] - 0.05
    assert found["subject"] < 0.03
    assert found["style"] < 0.03
    assert known["accuracy"]["renders"]["near"] > 0.9  # near misses are not taken for the subject or the style


@shipped
@pytest.mark.parametrize("concept", ["subject", "style"])
def test_the_shipped_judge_sees_the_concept(concept):
    drawn = [getattr(scenes, concept)(5, i, split="val")[0] for i in range(30)]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in drawn]).float() / 127.5 - 1
    assert adherence(images, {})[concept] > 0.95
