"""A method of one's own is one class in a file of one's own: everything takes it by its import path."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import visadapt as va
from visadapt.cli.main import main

from .conftest import tiny, write

TOY = '''
from visadapt import LowRank
from visadapt.core.adapter import kaiming, zeros


class Toy(LowRank):
    """ΔW = gain · B A: a toy.

    Nobody 2026, arXiv 0000.00000; there is no official code.

    Args:
        rank: inner dimension.
        gain: the scale.
    """

    gain: float = 2.0

    def build(self, layer):
        self.down, self.up = kaiming(layer, self.rank, *layer.in_shape), zeros(layer, layer.width, self.rank)

    def factors(self):
        return self.down, self.up * self.gain
'''


@pytest.fixture
def toy(here, monkeypatch) -> type[va.Adapter]:
    (here / "toy_method.py").write_text(TOY)
    monkeypatch.syspath_prepend(here)
    return import_module("toy_method").Toy


def test_the_grid_holds(toy, capsys):
    assert main(["check", "--methods", "toy_method.Toy"]) == 0
    assert "204 hold, 0 refused, 0 fail" in capsys.readouterr().out


def test_the_table_lists_it(toy, capsys):
    assert main(["methods", "--methods", "toy_method.Toy,LoRA", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| Toy | ΔW = gain · B A: a toy | all | yes | exact |")
    assert lines[3].startswith("| LoRA |")


def test_a_configuration_trains_it_and_its_file_loads_merges_and_exports(toy, here, capsys):
    config = tiny()
    config["trainer"]["max_epochs"] = 1
    config["model"]["init_args"]["adapters"][0]["method"] = {
        "class_path": "toy_method.Toy",
        "init_args": {"rank": 2, "gain": 0.5},
    }
    assert main(["fit", "--config", write(here / "c.yaml", config), "--run_dir", "own"]) == 0
    facts = json.loads(Path("own/run.json").read_text())
    assert facts["sets"][0]["method"] == "Toy"
    resolved = yaml.safe_load(Path("own/config.yaml").read_text())
    assert resolved["model"]["init_args"]["adapters"][0]["method"]["init_args"]["gain"] == 0.5
    assert main(["merge", "own/adapter.safetensors", "--output", "merged.safetensors"]) == 0
    assert main(["export", "own/adapter.safetensors", "--output", "peft"]) == 0

    again = [sys.executable, "-m", "visadapt", "merge", "own/adapter.safetensors", "--output", "again.safetensors"]
    subprocess.run(again, check=True)  # a process that has not imported the method
    assert load_file("again.safetensors").keys() == load_file("merged.safetensors").keys()

    from visadapt.backbones import TimmViT
    from visadapt.cli.files import base_recipe

    recipe = base_recipe(Path("own/adapter.safetensors"), None, None, None)
    assert isinstance(recipe, TimmViT)
    model = va.load(recipe.build(10), "own/adapter.safetensors")
    adapter = next(iter(va.adapters(model).values()))
    assert (type(adapter), adapter.hparams()) == (toy, {"rank": 2, "gain": 0.5})
    assert adapter.up.any(), "it has trained"
    assert torch.isfinite(adapter.up).all()
    before = model.eval()(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(va.merge(model)(torch.zeros(1, 3, 32, 32)), before, atol=1e-5, rtol=1e-5)


def test_a_wrong_option_of_it_is_refused(toy, here, capsys):
    config = tiny()
    config["model"]["init_args"]["adapters"][0]["method"] = {
        "class_path": "toy_method.Toy",
        "init_args": {"gian": 0.5},
    }
    with pytest.raises(SystemExit):
        main(["fit", "--config", write(here / "c.yaml", config)])
    assert "did you mean: gain?" in capsys.readouterr().err
