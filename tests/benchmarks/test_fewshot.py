"""The few-shot benchmark: every row trains, only what it should, and the base is untouched with the adapter off."""

import csv
from dataclasses import replace

import pytest
import torch

from benchmarks import methods
from benchmarks._fewshot import METHODS, Job, Setting, accuracy, build, data, fit, rows, run, trainable

FEW = Setting(shots=2, steps=2)
ROWS = {row.name: row for row in rows(rank=4)}


def test_the_catalogue_is_in_the_table():
    assert list(ROWS) == ["frozen base", "linear probe", "from scratch", "full fine-tuning", *METHODS]


@pytest.fixture(scope="module")
def base_accuracy():
    base = build(ROWS["frozen base"], FEW, 0)
    return accuracy(base.model, data(FEW, base, 0).source_dataloader())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_can_be_switched_off(name, base_accuracy):
    found = run(Job(ROWS[name], FEW, lr=1e-2, seed=0, validate=False))
    assert found["source_off"] == base_accuracy
    most = trainable(build(ROWS["full fine-tuning"], FEW, 0))  # NICE, made for embeddings, has more on every layer
    assert 0 < found["parameters"] < (most if name != "NICE" else 2 * most)
    assert found["seconds"] > 0


def test_reference_rows_train_what_they_say():
    assert trainable(build(ROWS["linear probe"], FEW, 0)) == 128 * 10 + 10
    scratch, full = build(ROWS["from scratch"], FEW, 0), build(ROWS["full fine-tuning"], FEW, 0)
    assert trainable(scratch) == trainable(full) == 821_642
    loader = data(FEW, full, 0).source_dataloader()
    assert accuracy(scratch.model, loader) < 0.4 < 0.9 < accuracy(full.model, loader)


def test_a_training_is_a_function_of_its_seed():
    def weights(seed):
        task = build(ROWS["LoRA"], FEW, seed)
        fit(task, data(FEW, task, seed), 1e-2, 2)
        return torch.cat([p.detach().flatten() for p in task.parameters() if p.requires_grad])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_tables_name_the_command_and_the_commit(tmp_path):
    arguments = ["--methods", "frozen base,SSF", "--steps", "1", "--shots", "4", "--seeds", "2", "--jobs", "1"]
    results = methods.main([*arguments, "--rates", "0.01", "--out", str(tmp_path)])
    assert [result.row for result in results] == ["frozen base", "SSF"]
    text = (tmp_path / "methods_digits.md").read_text()
    assert text.startswith("| row | accuracy % |")
    assert "| SSF |" in text
    assert "--methods 'frozen base,SSF'" in text
    assert str(tmp_path) not in text
    with (tmp_path / "methods_digits.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == ["frozen base", "SSF", "SSF"]
    assert lines[1]["source_off"] == lines[0]["source_off"]
    assert lines[1]["commit"] != ""


def test_unknown_rows_are_listed(capsys):
    with pytest.raises(SystemExit):
        methods.main(["--methods", "LoRa"])
    assert "no row ['LoRa']; there are frozen base, linear probe" in capsys.readouterr().err


def test_more_steps_than_batches_go_on_with_the_next_epoch():
    task = build(ROWS["SSF"], replace(FEW, steps=5), 0)
    module = data(FEW, task, 0)
    assert len(module.train_dataloader()) < 5
    fit(task, module, 1e-2, 5)
