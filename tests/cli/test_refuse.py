"""What is refused before anything is written: taken folders, places in the way, files of another kind."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from visadapt.cli import refuse
from visadapt.cli.errors import UserError
from visadapt.cli.main import main
from visadapt.cli.rundir import loggers

from .conftest import tiny, write


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["run", "user"])
def test_fit_leaves_a_taken_folder_alone(kind, run, here, capsys):
    if kind == "run":
        shutil.copytree(run, "taken")
    else:
        Path("taken").mkdir()
        Path("taken/README.md").write_text("mine")
    before = files(Path("taken"))
    assert main(["fit", "--config", write(here / "c.yaml", tiny()), "--run_dir", "taken"]) == 2
    told = capsys.readouterr().err
    assert "error at '--run_dir'" in told
    assert "choose another --run_dir" in told
    assert ("or go on with --ckpt_path taken/checkpoints/last.ckpt" in told) is (kind == "run")
    assert files(Path("taken")) == before


def test_fit_goes_on_in_the_folder_of_its_checkpoint(run, here):
    shutil.copytree(run, "taken")
    last = "taken/checkpoints/last.ckpt"
    line = ["fit", "--config", "taken/config.yaml", "--run_dir", "taken", "--ckpt_path", last]
    assert main([*line, "--trainer.max_epochs=3"]) == 0
    with pytest.raises(UserError, match="holds a run already"):
        refuse.taken(here / "taken", str(run / "checkpoints" / "last.ckpt"))


def test_what_may_be_written_to(here, monkeypatch):
    refuse.place("fit", here / "new", None)
    (here / "failed").mkdir()
    (here / "failed" / "events.out.tfevents.1").touch()
    refuse.place("fit", here / "failed", None)
    (here / "failed" / "mine").touch()
    refuse.place("predict", here / "failed", None)
    with pytest.raises(UserError, match="holds files already"):
        refuse.place("fit", here / "failed", None)
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    refuse.place("fit", here / "failed", None)  # a process that the first one has started


FIT = {
    "folder as checkpoint": (["--ckpt_path", "folder"], "--ckpt_path", "'folder' is a folder"),
    "empty checkpoint": (["--ckpt_path", ""], "--ckpt_path", "the name of the file is empty"),
    "file as run folder": (["--run_dir", "file"], "--run_dir", "'file' is a file"),
    "below a file": (["--run_dir", "file/run"], "--run_dir", "is a file"),
    "workers": (["--data.num_workers", "-1"], "data.num_workers", "must not be negative"),
    "seed": (["--data.seed", "-1"], "data.seed", "must not be negative"),
    "rate": (["--model.optimizer.init_args.lr", "-1"], "model.optimizer.init_args.lr", "must not be negative"),
    "utf-16": (["-c", "utf16.yaml"], "utf16.yaml", "not text in UTF-8"),
    "control": (["-c", "control.yaml"], "control.yaml", "no YAML"),
    "picture": (["-c", "picture.png"], "picture.png", "not text in UTF-8"),
}


@pytest.mark.parametrize("case", FIT)
def test_fit_says_it_in_one_message(case, here, capsys):
    options, where, message = FIT[case]
    (here / "folder").mkdir()
    (here / "file").write_text("mine")
    (here / "utf16.yaml").write_text("a: 1", encoding="utf-16")
    (here / "control.yaml").write_bytes(b"a: \x01")
    Image.new("RGB", (4, 4)).save("picture.png")
    assert main(["fit", "--config", write(here / "c.yaml", tiny()), *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"visadapt fit: error at '{where}'\n")
    assert message in told
    assert not (here / "runs").exists()


def test_a_folder_without_rights_is_refused(here, monkeypatch):
    monkeypatch.setattr(refuse.os, "access", lambda place, mode: False)
    with pytest.raises(UserError, match="cannot be written to"):
        refuse.unwritable(here / "x" / "y.safetensors", "--output")


@pytest.mark.parametrize("output", ["file/a.safetensors", "folder", ""])
def test_tools_say_where_they_cannot_write(output, run, here, capsys):
    (here / "folder").mkdir()
    (here / "file").write_text("mine")
    assert main(["import", str(run / "adapter.safetensors"), "--output", output]) == 2
    assert "error at '--output'" in capsys.readouterr().err


def test_tools_take_the_folder_of_a_run(run, here, capsys):
    assert main(["inspect", str(run)]) == 0
    assert "LoRA" in capsys.readouterr().out
    assert main(["merge", str(run), "--output", "m.safetensors"]) == 0
    assert main(["export", str(run), "--output", "peft"]) == 0
    assert Path("m.safetensors").is_file()
    assert Path("peft/adapter_config.json").is_file()


def test_import_does_not_replace_the_adapter_of_a_run(run, here, monkeypatch):
    shutil.copytree(run, "taken")
    assert main(["export", str(run), "--output", "taken/peft"]) == 0
    monkeypatch.chdir("taken")
    before = Path("adapter.safetensors").read_bytes()
    assert main(["import", "peft"]) == 0
    assert Path("adapter.safetensors").read_bytes() == before
    assert Path("imported.safetensors").is_file()


def test_merge_writes_nothing_above_the_tolerance(run, here, capsys):
    assert main(["merge", str(run), "--output", "m.safetensors", "--tolerance", "-1"]) == 2
    told = capsys.readouterr().err
    assert "error at '--tolerance'" in told
    assert "accept it with --tolerance" in told
    assert not Path("m.safetensors").exists()


def test_a_run_that_goes_on_in_its_folder_keeps_the_table_so_far(tmp_path):
    for number in range(3):
        (tmp_path / "metrics.csv").write_text(f"step\n{number}\n")
        csv, *_ = loggers(tmp_path, "fit")
        csv.log_metrics({"loss": 1.0}, step=7)
        csv.save()
    held = {path.name: path.read_text() for path in tmp_path.glob("metrics*.csv")}
    assert held.pop("metrics.csv").splitlines() == ["loss,step", "1.0,7"]
    assert held == {f"metrics_{number + 1}.csv": f"step\n{number}\n" for number in range(3)}
