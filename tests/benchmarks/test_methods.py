"""The comparison of methods: sizes at the budget, every method in a run, results that stay, and what tables say."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from PIL import Image
from torch import nn

import visadapt as va
from benchmarks import _budget, _costs, _standings, _training, methods
from benchmarks._contests import CONTESTS, DigitsContest, Trains
from benchmarks._training import Job, Plan

# Methods that are made to be smaller than LoRA of that rank, or that have no size at all.
SMALL = {"IA3", "SSF", "VeRA", "LoLDU"}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)).requires_grad_(False)


@pytest.mark.parametrize("name", va.METHODS)
def test_every_method_comes_near_the_budget(name, network):
    budget = _budget.parameters(network, ["all"], va.LoRA(rank=8))
    assert budget == 2 * 8 * (48 + 96)
    found = _budget.parameters(network, ["all"], _budget.nearest(name, network, ["all"], budget, 100))
    if name in SMALL:
        assert 0 < found < budget
    else:
        assert 0.5 * budget < found < 1.5 * budget, found
    assert not va.adapters(network), "the network is left as it was"


def test_the_nearest_size_is_the_nearest_of_all(network):
    for name, options in (("LoHa", range(1, 20)), ("RandLoRA", range(2, 49)), ("FourierFT", range(1000, 1400))):
        counts = [_budget.parameters(network, ["all"], _budget.prototype(name, size, 9)) for size in options]
        best = min(abs(number - 2304) for number in counts)
        found = _budget.parameters(network, ["all"], _budget.nearest(name, network, ["all"], 2304, 9))
        assert abs(found - 2304) <= max(best, 0.03 * 2304), name


def test_a_method_that_refuses_says_why(network):
    with pytest.raises(ValueError, match="use Linear layers"):
        _budget.nearest("InfLoRA", nn.Sequential(nn.Conv2d(3, 4, 3)), ["all"], 100, 10)
    assert _budget.parameters(nn.Sequential(nn.Conv2d(3, 4, 3)), ["all"], va.InfLoRA()) is None


@pytest.fixture(scope="module")
def few():
    _training.begin()
    return DigitsContest(steps=2)


@pytest.mark.parametrize("name", va.METHODS)
def test_every_method_trains_on_a_contest(name, few):
    options = _budget.prototype(name, {"IA3": 0, "BOFT": 8, "OFT": 8, "Bat": 8}.get(name, 4), few.steps).hparams()
    found = _training.train(few, Job(name, options, 1e-3, 0, "val"))
    assert 0 <= found["score"] <= 100
    assert found["parameters"] > 0
    assert found["bytes"] > 4 * found["parameters"]


@pytest.mark.parametrize("task", CONTESTS)
def test_a_training_is_a_function_of_its_seed_and_leaves_the_kept_base_alone(task):
    _training.begin()
    contest = CONTESTS[task](steps=2)
    before = contest.score(contest.task([], Trains(), 0.0, 0), "val")
    jobs = [Job("full fine-tuning", None, 1e-3, seed, "val") for seed in (0, 1)]
    jobs += [Job("LoRA", {"rank": 2}, 1e-3, seed, "val") for seed in (0, 0)]
    full, other, *scores = (_training.train(contest, job)["score"] for job in jobs)
    assert full != other
    assert scores[0] == scores[1]
    assert contest.score(contest.task([], Trains(), 0.0, 0), "val") == before


def test_a_loss_that_is_not_finite_is_no_score(few):
    assert _training.train(few, Job("full fine-tuning", None, 1e30, 0, "val"))["score"] is None


def test_runs_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    plan = Plan(tmp_path, seeds=2, rates=(1e-3, 1e-2), steps=1)
    first = _training.row("digits", "SSF", plan)
    assert set(first["tried"]) == {"0.001", "0.01"}
    assert [len(first["runs"]), first["rate"] in plan.rates] == [2, True]
    assert first["budget"] == 65_536
    monkeypatch.setattr(_training, "train", lambda contest, job: pytest.fail("made again"))
    assert _training.row("digits", "SSF", plan) == first
    calls = []
    monkeypatch.setattr(_training, "train", lambda contest, job: calls.append(job) or {"score": 1.0})
    _training.row("digits", "SSF", Plan(tmp_path, seeds=2, rates=(1e-3, 1e-2), steps=2))
    assert len(calls) == 4, "other steps, other runs"


def example():
    def result(scores, options=True, parameters=90):
        runs = [{"score": s, "parameters": parameters, "seconds": 1.0, "bytes": 2048} for s in scores]
        extra = {"options": {"rank": 8}, "budget": 100} if options else {}
        return {"runs": runs, "rate": 0.005, **extra}

    return {
        "digits": {
            "head alone": result([50.0, 52.0, 51.0], options=False),
            "LoRA": result([70.0, 72.0, 74.0]),
            "DoRA": result([71.0, 70.0, 76.0]),
            "SSF": result([35.0, 36.0, 34.0]),
            "NICE": {"refused": "not here", "budget": 100},
            "OFT": result([40.0, None, 41.0]),
        },
        "style": {"LoRA": result([0.5, 0.51, 0.52]), "DoRA": result([0.4, 0.41, 0.42])},
    }


COSTS = {
    "LoRA": {"step": 1.2, "peak": 1.1, "merge_error": 3e-7},
    "SSF": {"merge_error": 0.0},
    "OFT": {"merge_error": None, "no_merge": "no"},
    "NICE": {"merge_error": None, "no_merge": "no"},
}


def test_intervals_and_what_seeds_cannot_tell():
    assert math.isclose(_standings.half_width([70.0, 72.0, 74.0]), 4.302652729911275 * 2 / 3**0.5)
    assert _standings.half_width([1.0]) is None
    found = example()
    names = ["LoRA", "DoRA", "SSF", "NICE", "OFT"]
    assert _standings.leading(found, "digits", names) == {"LoRA", "DoRA"}
    assert _standings.leading(found, "style", ["LoRA", "DoRA"]) == {"DoRA"}, "lower is better, differences are paired"


def test_the_table_says_all_of_it():
    text = _standings.table(example(), COSTS, {"digits": 14.2, "style": 1.0}, set(va.METHODS))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines()}
    columns = text.splitlines()[0].count("|")
    assert all(line.count("|") == columns for line in text.splitlines())
    assert list(lines)[2:4] == ["base as shipped", "head alone"]
    assert lines["LoRA"].startswith(
        "| LoRA | **72.0 ± 5.0** | 0.510 ± 0.025 | 90 | 90 / 90 | 2 | 1.20 | 1.10 | 3e-07 |"
    )
    assert lines["SSF"].endswith("| 0 |")
    assert lines["OFT"].endswith("| no merge |")
    assert "**0.410 ± 0.025**" in lines["DoRA"]
    assert "| 1 of 3 failed |" in lines["OFT"]
    assert "| refused |" in lines["NICE"]


def test_the_files_hold_every_run(tmp_path):
    about = {"command": "python -m x", "commit": "abc"}
    _standings.write_csv(tmp_path / "m.csv", example(), about)
    with (tmp_path / "m.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 5 + 1 + 2 * 3
    assert (lines[3]["row"], lines[3]["options"], lines[3]["commit"]) == ("LoRA", "rank=8", "abc")
    _standings.write_costs(tmp_path / "c.csv", COSTS, about)
    assert "NICE" in (tmp_path / "c.csv").read_text()
    _standings.picture(tmp_path / "m.png", example(), COSTS, set(va.METHODS))
    with Image.open(tmp_path / "m.png") as found:
        assert min(found.size) > 500


def test_costs_are_ratios_to_the_frozen_model():
    found = _costs.measure(["LoRA", "LoRASB", "NICE"], rank=2, rounds=0)
    sides = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    assert found["LoRA"]["parameters"] == 2 * sum(map(sum, sides))
    assert 1 < found["LoRA"]["peak"] < 3
    assert found["LoRA"]["merge_error"] < 1e-4
    assert found["NICE"]["merge_error"] is None
    assert "not affine" in found["NICE"]["no_merge"]


def test_one_command_makes_table_files_and_picture(tmp_path, capsys):
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--image", str(tmp_path / "m.png")]
    methods.main(["--subset", "--tasks", "digits", "--rows", "head alone", "SSF", "--rounds", "0", *folders])
    text = (tmp_path / "out" / "methods.md").read_text()
    assert "| SSF | **" in text
    assert "benchmarks.methods --subset --tasks digits --rows 'head alone' SSF --rounds 0`" in text
    assert str(tmp_path) not in text
    assert (tmp_path / "m.png").is_file()
    assert "SSF" in capsys.readouterr().out


@pytest.mark.slow
def test_the_subset_runs_on_every_task(tmp_path):
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--image", str(tmp_path / "m.png")]
    methods.main(["--subset", "--jobs", "2", *folders])
    lines = (tmp_path / "out" / "methods.md").read_text().splitlines()
    for name in methods.SUBSET["rows"]:
        assert next(line for line in lines if line.startswith(f"| {name} |")).count("±") == len(CONTESTS)


def test_unknown_rows_are_listed(capsys):
    with pytest.raises(SystemExit):
        methods.main(["--rows", "LoRa"])
    assert "'LoRA'" in capsys.readouterr().err
