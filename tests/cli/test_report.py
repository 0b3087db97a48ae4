"""The parts of the report on their own."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from visadapt.cli.rundir import config_name, discard, new_run_dir
from visadapt.report import evaluate, plots, tiles
from visadapt.report.facts import patterns
from visadapt.report.predictions import table


def test_normalisation_is_undone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    transform = Compose([Compose([ToTensor(), Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.1))])])
    norm = evaluate.normalisation(transform)
    assert np.array_equal(evaluate.displayable(transform(image), norm), np.asarray(image))


def test_grey_images_are_displayable():
    assert evaluate.displayable(torch.rand(1, 5, 6), None).shape == (5, 6, 3)


def test_counts_rows_are_the_truth():
    matrix = evaluate.counts([0, 0, 1, 2], [0, 1, 1, 0], 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_evaluating_restores_modes_and_gradients():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(2))
    model[1].eval()
    with evaluate.evaluating(model):
        assert not model[0].training
        assert not torch.is_grad_enabled()
    assert model[0].training
    assert not model[1].training


def test_spread_covers_the_whole_set():
    assert evaluate.spread(500, 5)[0] == 0
    assert evaluate.spread(500, 5)[-1] == 499
    assert evaluate.spread(3, 24) == [0, 1, 2]


def test_pictures_of_any_number_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for count in (1, 8, 9):
        images = [rng.integers(0, 256, (int(rng.integers(8, 300)), 40, 3), dtype=np.uint8) for _ in range(count)]
        names = ["a very long name of a class indeed"] * count
        tiles.save(tiles.prediction_grid(images, names, names, ["b"] * count), tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as picture:
            assert picture.height >= tiles.SIDE


def test_right_is_green_and_wrong_is_red():
    image = np.full((32, 32, 3), 255, dtype=np.uint8)
    colours = [set(tiles.prediction_grid([image], ["1"], [p]).getdata()) for p in ("1", "2")]
    green, red = (26, 127, 55), (179, 38, 30)
    assert green in colours[0]
    assert red not in colours[0]
    assert red in colours[1]


def test_curves_and_matrix_are_drawn(tmp_path):
    history = [{"epoch": float(e), "train/loss": 1 / (e + 1), "val/accuracy": 0.5} for e in range(3)]
    plots.save(plots.learning_curves(history, {"accuracy": 0.2}), tmp_path / "c.png")
    plots.save(plots.confusion_matrix(np.eye(60, dtype=int), [str(i) for i in range(60)]), tmp_path / "m.png")
    plots.save(plots.learning_curves([]), tmp_path / "e.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("c.png", "m.png", "e.png"))


def test_layers_are_folded():
    layers = ["blocks.0.attn.qkv:q", "blocks.1.attn.qkv:q", "head"]
    assert patterns(layers) == "blocks.*.attn.qkv:q, head"


def test_table_quotes_names_with_commas():
    text = table({0: [(0.9, 1), (0.1, 0)]}, ["a,b.png"], ["x", "y"])
    assert text.splitlines() == ["file,class,probability,class_2,probability_2", '"a,b.png",y,0.9000,x,0.1000']


def test_run_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = new_run_dir("fit", "configs/quick.yaml", None)
    assert first.parent.as_posix() == "runs/quick"
    first.mkdir(parents=True)
    assert new_run_dir("fit", "configs/quick.yaml", None) != first
    (first / "config.yaml").write_text("")
    assert new_run_dir("test", None, str(first / "checkpoints" / "last.ckpt")) == first.resolve() / "test"
    assert config_name(str(first / "config.yaml")) == "quick"


def test_only_empty_runs_are_discarded(tmp_path):
    run = tmp_path / "runs" / "x" / "1"
    run.mkdir(parents=True)
    (run / "events.out.tfevents.1").write_text("")
    (run / "metrics.csv").write_text("")
    discard(run)
    assert run.exists()
    (run / "metrics.csv").unlink()
    discard(run)
    assert not (tmp_path / "runs").exists()
    assert tmp_path.exists()
