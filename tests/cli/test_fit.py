"""fit, test and predict on a tiny model: what a run leaves, and that it can be used again."""

import csv
import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from visadapt.cli.main import main

from .conftest import tiny, write


def test_a_run_leaves_everything(run):
    files = {p.name for p in run.iterdir()}
    assert {"adapter.safetensors", "config.yaml", "metrics.csv", "README.md", "run.json", "checkpoints"} <= files
    for name in ("learning_curves.png", "confusion_matrix.png", "predictions.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 300
    assert not [name for name in files if name.endswith(".tmp")]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert any(row["val/accuracy"] for row in rows)


def test_the_facts_of_a_run_are_true(run):
    facts = json.loads((run / "run.json").read_text())
    width, rank, head = 32, 4, 32 * 10 + 10
    assert facts["sets"][0]["method"] == "LoRA"
    assert facts["sets"][0]["parameters"] == 2 * (2 * rank * 2 * width)  # q and proj of two blocks
    assert facts["trainable"] == facts["sets"][0]["parameters"] + head
    assert facts["epochs"] == 2
    assert facts["steps"] == 4
    assert facts["class_names"] == [str(digit) for digit in range(10)]
    assert facts["adapter_bytes"] == (run / "adapter.safetensors").stat().st_size
    assert {"accuracy before, inverted (500 images)", "accuracy after, inverted (500 images)"} <= set(facts["figures"])
    card = (run / "README.md").read_text()
    assert "base_model: vit_tiny_patch16_224" in card
    assert f"{facts['trainable']:,}" in card
    assert "blocks.*.attn.qkv" in card


def test_the_reported_accuracy_is_that_of_the_saved_adapter(run):
    import visadapt as va
    from visadapt.backbones.timm_vit import TimmViT
    from visadapt.cli.files import base_recipe
    from visadapt.data.digits import Digits

    recipe = base_recipe(run / "adapter.safetensors", None, None, None)
    assert isinstance(recipe, TimmViT)
    torch.manual_seed(0)  # the base of this run is random: the seed of the run makes it again
    model = va.load(recipe.build(10), run / "adapter.safetensors").eval()
    data = Digits(domain="inverted")
    data.transform = recipe.preprocess(False)
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.test_dataloader())
    facts = json.loads((run / "run.json").read_text())
    assert facts["figures"]["accuracy after, inverted (500 images)"] == pytest.approx(right / 500, abs=0.004)


def test_tensorboard_gets_the_picture(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    assert len(events.Images("predictions")) >= 2
    assert "val/loss" in events.Tags()["scalars"]


def test_the_class_names_travel_in_the_adapter_file(run):
    with safe_open(run / "adapter.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["class_names"]) == [str(digit) for digit in range(10)]


def test_the_saved_configuration_makes_the_same_adapter(run, here):
    assert main(["fit", "--config", str(run / "config.yaml"), "--run_dir", "again"]) == 0
    with safe_open(run / "adapter.safetensors", framework="pt") as a:
        with safe_open(here / "again" / "adapter.safetensors", framework="pt") as b:
            assert set(a.keys()) == set(b.keys())
            assert all(torch.equal(a.get_tensor(k), b.get_tensor(k)) for k in a.keys())


def test_print_config_is_a_configuration(here, capsys):
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", write(here / "tiny.yaml", tiny()), "--print_config"])
    assert left.value.code in (0, None)
    text = capsys.readouterr().out
    found = yaml.safe_load(text)
    assert found["model"]["init_args"]["adapters"][0]["method"]["init_args"]["rank"] == 4
    assert main(["fit", "--config", write(here / "printed.yaml", text), "--trainer.fast_dev_run=true"]) == 0


def test_configurations_are_stacked_and_beaten_by_flags(here, capsys, monkeypatch):
    second = {"trainer": {"max_epochs": 7}, "data": {"init_args": {"shots": 3}}}
    args = ["fit", "-c", write(here / "tiny.yaml", tiny()), "-c", write(here / "more.yaml", second)]
    monkeypatch.setenv("VISADAPT_FIT__TRAINER__MAX_STEPS", "11")
    with pytest.raises(SystemExit):
        main([*args, "--data.shots=5", "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["trainer"]["max_epochs"] == 7
    assert found["trainer"]["max_steps"] == 11
    assert found["data"]["init_args"]["shots"] == 5
    assert found["data"]["init_args"]["domain"] == "inverted"


def test_a_part_of_the_configuration_may_be_a_file(here, capsys):
    config = tiny()
    part = config["model"]["init_args"].pop("backbone")
    write(here / "backbone.yaml", part)
    with pytest.raises(SystemExit):
        main(["fit", "-c", write(here / "t.yaml", config), "--model.backbone", "backbone.yaml", "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["backbone"]
    assert found["init_args"]["img_size"] == 32


def test_resume_keeps_the_command_line(run, here):
    """Stock LightningCLI would train on with the learning rate in the checkpoint."""
    checkpoint = run / "checkpoints" / "last.ckpt"
    options = ["--trainer.max_epochs=3", "--model.optimizer.lr=0.5", "--run_dir=resumed"]
    assert main(["fit", "-c", str(run / "config.yaml"), f"--ckpt_path={checkpoint}", *options]) == 0
    saved = torch.load(here / "resumed" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.5
    assert saved["epoch"] == 2
    facts = json.loads((here / "resumed" / "run.json").read_text())
    before = json.loads((run / "run.json").read_text())["figures"]["accuracy before, inverted (500 images)"]
    assert facts["figures"]["accuracy before, inverted (500 images)"] == before  # not that of the resumed weights
    config = yaml.safe_load((here / "resumed" / "config.yaml").read_text())
    assert config["ckpt_path"] is None
    assert config["run_dir"] is None


def test_test_needs_no_configuration(run, here):
    assert main(["test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--run_dir", "tested"]) == 0
    (row,) = csv.DictReader((here / "tested" / "metrics.csv").open())
    facts = json.loads((run / "run.json").read_text())
    assert float(row["test/accuracy"]) == pytest.approx(facts["figures"]["accuracy after, inverted (500 images)"])


def test_test_takes_an_adapter_file(run, here):
    assert main(["test", "--adapter", str(run / "adapter.safetensors"), "--run_dir", "tested"]) == 0
    (row,) = csv.DictReader((here / "tested" / "metrics.csv").open())
    facts = json.loads((run / "run.json").read_text())
    assert float(row["test/accuracy"]) == pytest.approx(facts["figures"]["accuracy after, inverted (500 images)"])


@pytest.mark.parametrize("source", ["adapter", "ckpt_path"])
def test_predict_on_a_folder(source, run, pictures, here, capsys):
    file = run / ("adapter.safetensors" if source == "adapter" else "checkpoints/last.ckpt")
    assert main(["predict", f"--{source}", str(file), "--images", str(pictures), "--run_dir", "out"]) == 0
    rows = list(csv.DictReader((here / "out" / "predictions.csv").open()))
    assert [row["file"].rpartition("/")[2] for row in rows] == [f"digit_{i}.png" for i in range(5)]
    for row in rows:
        shares = [float(row[k]) for k in ("probability", "probability_2", "probability_3")]
        assert shares == sorted(shares, reverse=True)
        assert row["class"] in "0123456789"
        assert 0.1 <= shares[0] <= 1
    text = capsys.readouterr().out
    assert "cut.png" in text
    assert "text.jpg" in text
    assert "5 images, 2 skipped" in text
    with Image.open(here / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 500


def test_predict_on_the_data_of_the_configuration(run, here):
    assert main(["predict", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--run_dir", "out"]) == 0
    assert len(list(csv.DictReader((here / "out" / "predictions.csv").open()))) == 500


def test_predict_without_images_says_so(run, here, capsys):
    (here / "empty").mkdir()
    assert main(["predict", "--adapter", str(run / "adapter.safetensors"), "--images", "empty"]) == 2
    assert "no images in 'empty'" in capsys.readouterr().err
