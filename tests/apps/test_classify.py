"""Handlers of the classification app, without a server."""

import os
import shutil

import pytest
import torch
from PIL import Image

import visadapt as va
from apps import _runs, classify
from tests.apps.conftest import write_run
from visadapt.backbones.timm_vit import TimmViT
from visadapt.cli.errors import UserError


@pytest.fixture(scope="module")
def classifier(digits_adapter):
    return classify.Classifier([digits_adapter])


def test_strength_0_is_the_base_and_1_the_adapter(classifier, digits_adapter, tmp_path):
    (path, *_) = classify.examples(tmp_path, classifier)
    image, base, adapted = classifier.answer(str(path), 1.0)
    recipe = TimmViT("tiny_digits")
    plain = recipe.build().eval()
    inputs = recipe.preprocess(False)(Image.open(path))[None]
    with torch.no_grad():
        wanted = plain(inputs).softmax(1)[0].tolist()
        assert list(base.values()) == wanted
        assert list(adapted.values()) == va.load(plain, digits_adapter)(inputs).softmax(1)[0].tolist()
    assert image.size == (224, 224)
    assert classifier.answer(str(path), 0.0)[2] == base
    assert sum(adapted.values()) == pytest.approx(1, abs=1e-5)


def test_without_adapters_the_base_stands_alone(tmp_path):
    alone = classify.Classifier()
    assert alone.sets == []
    paths = classify.examples(tmp_path, alone)
    _, base, adapted = alone.answer(str(paths[0]))
    assert base == adapted
    assert len(paths) == 10


def test_several_files_are_several_sets(digits_adapter, tmp_path):
    other = shutil.copy(digits_adapter, tmp_path / "other.safetensors")
    assert classify.Classifier([digits_adapter, _runs.given([other])[0]]).sets == ["ink", "other"]


def test_nothing_uploaded_and_adapters_of_other_bases(classifier, tmp_path):
    with pytest.raises(UserError, match="there is no picture yet"):
        classifier.answer(None, 1.0)
    with pytest.raises(UserError, match="there is no file"):
        _runs.given([tmp_path / "a.safetensors"])
    model = va.adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), va.LoRA(rank=1), "0")
    with pytest.raises(UserError, match="its base is 'mine', which is not shipped"):
        classify.Classifier([va.save(model, tmp_path / "a.safetensors", base_name="mine")])


def test_the_newest_run_of_each_name_is_found(digits_adapter, tmp_path):
    for i, (name, task) in enumerate([("a/1", "Classification"), ("a/2", "Classification"), ("b/1", "Other")]):
        path = write_run(tmp_path / name, f"visadapt.tasks.x.{task}", {}, [])
        shutil.copy(digits_adapter, path)
        os.utime(path, (i, i))
    assert _runs.newest(["Classification"], tmp_path) == [tmp_path / "a/2/adapter.safetensors"]
    assert _runs.newest(["Other", "Classification"], tmp_path)[0] == tmp_path / "b/1/adapter.safetensors"
    assert _runs.newest(["Classification"], tmp_path / "none") == []
