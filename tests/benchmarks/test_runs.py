"""Tables of runs: command lines that anyone can repeat, runs that are not made twice, figures from their folders."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import _runs, segmentation, text_to_image, text_to_video
from visadapt.cli.yaml_files import check

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_command_lines_stack_the_row_on_the_task():
    line = segmentation.command("railway_10shot", "lora", 2, Path("out"), 1e-3)
    assert line[:4] == [sys.executable, "-m", "visadapt", "fit"]
    assert line[4:6] == [
        f"--config={segmentation.CONFIGS / name}" for name in ("railway_10shot.yaml", "rows/lora.yaml")
    ]
    assert line[6:] == ["--seed_everything=2", "--data.seed=2", "--run_dir=out", "--model.optimizer.init_args.lr=0.001"]
    assert segmentation.command("railway_10shot", "oracle", 0, Path("out"))[3] == "test"
    assert "--model.seed=1" in text_to_image.command("style", "wara", 1, Path("out"))


def test_pages_say_how_they_were_made_without_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/segmentation.py", "--jobs", "2", "--runs", "/somewhere", "--seeds=3"])
    _runs.write_page(tmp_path / "page.md", "Title", "| a |")
    title, made, text = (tmp_path / "page.md").read_text().strip().split("\n\n")
    assert (title, text) == ("# Title", "| a |")
    assert made.startswith(f"`python -m benchmarks.segmentation --jobs 2 --seeds=3` at {_runs.commit()}, on ")


@pytest.mark.parametrize("module", [segmentation, text_to_image, text_to_video])
def test_every_row_and_task_has_its_configuration(module):
    tasks = module.TASKS if module is segmentation else module.COLUMNS
    for path in [module.CONFIGS / f"{task}.yaml" for task in tasks] + [
        module.CONFIGS / "rows" / f"{row}.yaml" for row in module.ROWS
    ]:
        check(str(path))


def test_a_run_is_made_once_and_its_failure_is_shown(tmp_path):
    done = tmp_path / "done"
    line = [sys.executable, "-c", f"open({str(done)!r}, 'a').write('x')"]
    _runs.make(line, done, 1)
    _runs.make(line, done, 1)
    assert done.read_text() == "x"
    with pytest.raises(SystemExit, match="no such thing"):
        _runs.make([sys.executable, "-c", "raise ValueError('no such thing')"], tmp_path / "other", 1)


def test_spread_and_search():
    assert _runs.spread([]) == ""
    assert _runs.spread([1.0]) == "1.0"
    assert _runs.spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    text = _runs.search("t", {"a": "A", "b": "B"}, [0.1, 1.0], 2, lambda row, rate: f"{row}{rate:g}")
    assert text.splitlines() == ["| t | 0.1 | 1 |", "|---|---|---|", "| A | a0.1 | a1 |", "| B | b0.1 | b1 |"]


def facts(asked, minutes=1.0):
    figures = {f"{name}, {when}": asked for name in text_to_image.COLUMNS["subject"].values() for when in ("after",)}
    figures |= {"share with the subject, asked for, before": 0.01, "similarity among the pictures (judge)": 0.9}
    drift = "drift from the base, not asked for (judge)"  # only the trained model has one
    figures[drift] = figures.pop(f"{drift}, after")
    return {"figures": figures, "trainable": 1234, "adapter_bytes": 2048, "minutes": minutes}


def test_a_table_has_the_base_the_spread_and_the_costs(tmp_path):
    folder = tmp_path / "subject" / "lora" / "0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(facts(0.5)))
    known = text_to_image.run("subject", "lora", 0, tmp_path, 1)  # there already: not made again
    text = text_to_image.table({"lora": [known, facts(0.7, 2.0)]}, "subject").splitlines()
    assert text[0].startswith("| subject | shown when asked % | shown when not asked % | right background % |")
    assert text[2].startswith("| base | 1.0 | ")
    assert text[3].startswith("| LoRA | 60.0 ± 14.1 | ")
    assert text[3].split(" | ")[8] == "0.600 ± 0.141"
    assert text[3].endswith("| 1,234 | 2 | 1.0 |")
    assert text[-1] == "Similarity among the real pictures: 0.900."
    assert len({line.count("|") for line in text[:4]}) == 1


def test_pictures_lie_side_by_side():
    pictures = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pictures[1, 0] = 255
    page = text_to_image.side_by_side([("base", pictures), ("LoRA", pictures)], ["a red star", "two words " * 4])
    side, cell = text_to_image.SIDE, text_to_image.SIDE + 8
    middles = [page.getpixel((170 + column * cell + side // 2, 58 + row * cell + side // 2)) for row in (0, 1)
               for column in (0, 1)]  # fmt: skip
    assert middles == [(0, 0, 0), (255, 0, 0)] * 2


def test_after_a_failure_no_other_run_begins_and_a_rate_may_diverge():
    begun = []

    def run(number):
        begun.append(number)
        if number == 1:
            raise SystemExit("no such thing")

    with pytest.raises(SystemExit, match="no such thing"):
        _runs.each(run, 1, [(number,) for number in range(4)])
    assert begun == [0, 1]

    def tried(row, rate):
        if rate > 1:
            raise SystemExit("visadapt fit: error\n  the loss is nan at step 3")
        return "0.5"

    assert _runs.search("task", {"a": "A"}, [1.0, 2.0], 1, tried).endswith("| A | 0.5 | diverged |")


def test_what_a_run_that_was_cut_off_left_goes(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0")
    done = folder / "run.json"
    line = f"from pathlib import Path; p = Path({str(folder)!r}); p.mkdir(); Path({str(done)!r}).touch()"
    _runs.make([sys.executable, "-c", line], done, 1)
    assert [path.name for path in folder.iterdir()] == ["run.json"]
