"""Figures of renders: what a run reports of base and adapted model, and the same of a saved one by test."""

import csv
import json

import lightning as L
import pytest

from tests.diffusion_training import task, train
from tests.tiny_judge import random_judge  # noqa: F401 - a fixture
from visadapt.backbones.sd_tokens import NewToken
from visadapt.data.captioned_scenes import Scenes
from visadapt.metrics.features import Extractor
from visadapt.report.run import RunReport
from visadapt.tasks.diffusion_options import Preview
from visadapt.tasks.measures import Measures, Measuring, key
from visadapt.tasks.text_to_image import TextToImage

pytestmark = pytest.mark.usefixtures("random_judge")
FEW = Measures(["a sks shape on bricks"], ["a red star on bricks"], 2, ["subject", "background"])


def scenes(**options):
    return Scenes("subject", train_size=4, val_size=2, test_size=4, batch_size=2, **options)


def one(measures=FEW, **options):
    return task(preview=Preview(["a"], [0], steps=1), measures=measures, **options)


def test_a_run_reports_the_base_and_the_adapted_model_and_test_repeats_it(tmp_path):
    logger = L.pytorch.loggers.CSVLogger(tmp_path, "", "")
    found = train(tmp_path / "run", RunReport(str(tmp_path), "x"), task=one(), data=scenes(), max_epochs=1,
                  logger=logger)  # fmt: skip
    figures = json.loads((tmp_path / "run.json").read_text())["figures"]
    names = {name.rpartition(", ")[0] for name in figures if name.endswith(", before") and "loss" not in name}
    assert names == {
        "share with the subject, asked for",
        "share with the subject, not asked for",
        "share with the right background",
        "share of other prompts followed",
        "similarity to the pictures (judge)",
        "similarity to the pictures, not asked for (judge)",
        "diversity (judge)",
        "KID (judge)",
    }
    assert all(f"{name}, after" in figures for name in names)
    assert figures["similarity among the pictures (judge)"] <= 1
    assert figures["drift from the base, not asked for (judge)"] > 0
    similar = "similarity to the pictures (judge)"
    assert figures[f"{similar}, before"] != figures[f"{similar}, after"]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    logged = {name: row[name] for row in rows for name in row if name.startswith("measures/") and row[name]}
    assert float(logged[key(similar)]) == pytest.approx(figures[f"{similar}, after"])
    assert float(logged[key(similar) + "_base"]) == pytest.approx(figures[f"{similar}, before"])
    assert "share with the subject, asked for, after |" in (tmp_path / "README.md").read_text()

    again = TextToImage.load_from_checkpoint(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert again.measures == found.measures  # also through the plain data of a checkpoint
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    (tested,) = trainer.test(again, scenes(), verbose=False)
    for name in names:
        assert tested[key(name)] == pytest.approx(figures[f"{name}, after"], abs=1e-5)
        assert tested[f"{key(name)}_base"] == pytest.approx(figures[f"{name}, before"], abs=1e-5)


def test_the_base_is_measured_unless_its_figures_are_known(tmp_path):
    found = one(Measures(["a sks shape on bricks"], ["a red star on bricks"], 1, base=False))
    train(tmp_path / "run", RunReport(str(tmp_path), "x"), task=found, data=scenes(), max_epochs=1)
    figures = json.loads((tmp_path / "run.json").read_text())["figures"]
    assert "similarity to the pictures (judge)" in figures
    assert {name for name in figures if name.endswith(", before") or "drift" in name} == set()
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    (tested,) = trainer.test(found, scenes(), verbose=False)
    assert "measures/similarity_to_the_pictures_judge" in tested
    assert not any(name.endswith("_base") for name in tested)


def test_captions_serve_as_prompts_and_seen_ones_are_told_from_new_ones():
    found, data = one(Measures(seeds=1, judge=["background"])), scenes()
    measuring = Measuring(found, data)
    assert measuring.prompts == list(dict.fromkeys(picture.caption for picture in data.pictures("test")))
    caption = data.pictures("train")[0].caption
    measuring.prompts = [caption, "a picture of a sks shape on wood"]
    found.configure_model()
    figures, features = measuring()
    assert features is None
    both = "share with the right background"
    assert {both, f"{both}, prompts that no training picture has"} <= set(figures)
    assert not any("diversity" in name for name in figures)


def test_no_base_where_new_tokens_train(tmp_path):
    found = one(tokens=[NewToken("<x>", "no")])
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    (tested,) = trainer.validate(found, scenes(), verbose=False)
    assert key("KID (judge)") in tested
    assert not any(name.endswith("_base") for name in tested)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'colours' is not one of shape, colour, background, subject, style"):
        Measures(judge=["colours"])
    with pytest.raises(ValueError, match=r"measures.seeds: 0"):
        Measures(seeds=0)
    with pytest.raises(ValueError, match="needs a local file"):
        Measures(extractor=Extractor("vit_tiny_patch16_224"))
    with pytest.raises(ValueError, match="list has no pictures with captions"):
        Measuring(one(), [])
