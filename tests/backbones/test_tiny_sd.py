"""The tiny Stable Diffusion: its recipe resumes exactly and keeps things apart; the shipped one follows prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import visadapt.backbones
from tests.backbones.recipes import recipe
from visadapt.data import scenes

SHIPPED = Path(visadapt.backbones.__file__).parent / "tiny" / "tiny_sd"
shipped = pytest.mark.skipif(not SHIPPED.is_dir(), reason="the tiny Stable Diffusion has not been trained yet")


def test_every_word_is_one_token_and_old_files_give_the_same(tmp_path):
    networks = recipe("tiny_sd_networks")
    tokenizer = networks.tokenizer()
    for word in scenes.vocabulary():
        assert len(tokenizer(word).input_ids) == 3
    words = ["a red star on a blue background", "a sks shape in sks style", "", "été: unknown!"]
    ids = tokenizer(words, padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (4, networks.POSITIONS)
    assert len(set(ids[1].tolist())) > 6  # bytes of "sks", not one token for everything unknown
    tokenizer.save_pretrained(tmp_path)
    networks.write_old_tokenizer(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert torch.equal(again(words, padding="max_length", return_tensors="pt").input_ids, ids)
    (tmp_path / "tokenizer.json").unlink()
    old = type(tokenizer).from_pretrained(tmp_path, model_max_length=networks.POSITIONS)
    assert torch.equal(old(words, padding="max_length", return_tensors="pt").input_ids, ids)


def test_longest_captions_fit():
    networks = recipe("tiny_sd_networks")
    tokenizer = networks.tokenizer()
    longest = [make(0, i, 8)[1] for make in (scenes.scene, scenes.style, scenes.digit) for i in range(60)]
    assert max(len(tokenizer(words).input_ids) for words in longest) <= networks.POSITIONS


def test_an_interrupted_stage_goes_on_bit_for_bit(tmp_path):
    resumable = recipe("resumable")

    def run(folder, stops):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

        def loss(step):
            if step in stops:
                stops.remove(step)
                raise KeyboardInterrupt
            return network(torch.randn(8, 3)).square().mean()

        return resumable.train(resumable.Plan("part", 12, 1e-2), folder, network, loss)

    resumable.KEEP = 4
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(tmp_path / "a", [])
    stops = [6, 9]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b", stops)
    again = run(tmp_path / "b", stops)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_held_out_combinations_are_not_drawn():
    tiny_sd = recipe("tiny_sd")
    images, which = tiny_sd.drawn_scenes(6)
    assert images.shape == (6, 3, 32, 32)
    assert not any(scenes.specs(False)[i].held_out for i in which)
    assert tiny_sd.drawn_others(4).shape == (4, 3, 32, 32)


def test_pictures_without_a_known_shape():
    judge = recipe("tiny_judge")
    images, labels = judge.pictures(0, 40, "val")
    assert images.shape == (40, 3, 32, 32)
    assert (labels["shape"] == judge.NO_SHAPE).sum() == 14  # 8 distractors, 2 subjects, 2 of nearly that, 2 digits
    assert labels["subject"].sum() == 2
    assert labels["style"].sum() == 4
    for near in (judge.near_subject, judge.near_style):
        drawn = [near(0, i) for i in range(20)]
        assert len({image.tobytes() for image, _, _ in drawn}) == 20
        assert not any(entry["subject"] or entry["style"] for _, _, entry in drawn)
    drawn = [judge.distractor(0, i)[0] for i in range(20)]
    assert len({image.tobytes() for image in drawn}) == 20
    assert sum(np.ptp(image.reshape(-1, 3), axis=0).max() > 40 for image in drawn) > 12


@shipped
def test_the_shipped_pipeline_follows_prompts_as_stated():
    tiny_sd = recipe("tiny_sd")
    stated = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*") if f.is_file()) < 25_000_000
    found, images = tiny_sd.follows(tiny_sd.reload(SHIPPED), None, scenes.specs(False), 24)
    assert images.shape == (24, 3, 32, 32)
    for name in ("shape", "colour", "background"):
        assert stated["adherence"]["combinations_of_training"][name] >= 0.9
        assert found[name] > stated["adherence"]["combinations_of_training"][name] - 0.15
