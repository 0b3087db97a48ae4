"""push and pull against a stand-in of the Hub on this machine; never against the network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import visadapt as va
from tests.cli.hub_stand_in import TOKEN, Hub
from tests.tiny import images, moved, tiny_vit
from visadapt.cli.hub_files import safe_config, wanted, without_places
from visadapt.cli.inspect import describe, read_header
from visadapt.cli.main import main
from visadapt.interop.files import read_tensors, replace_tensors

REPO = "someone/birds"
SECRET = "/home/someone/private/photos"


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, as the Hub of this process."""
    from huggingface_hub import constants

    made = Hub()
    monkeypatch.setenv("HF_ENDPOINT", made.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # apps set it for their process
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, which the stand-in does not speak
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    yield made
    made.close()


@pytest.fixture
def run(here) -> Path:
    """What a run leaves: the adapter, its card, figures, a picture, and much that stays at home."""
    folder = here / "runs" / "birds" / "20260101-120000"
    (folder / "checkpoints").mkdir(parents=True)
    model = moved(va.adapt(tiny_vit(), va.LoRA(rank=2), ["attn.qkv"]))
    va.save(model, folder / "adapter.safetensors", base_name="/home/someone/models/tiny_vit")
    config = {
        "seed_everything": 0,
        "trainer": {"max_epochs": 3, "default_root_dir": "/home/someone", "callbacks": [{"class_path": "x.Y"}]},
        "model": {"class_path": "visadapt.tasks.classification.Classification", "init_args": {"start": "a.b"}},
        "data": {"class_path": "visadapt.data.image_folder.ImageFolder", "init_args": {"root": SECRET, "shots": 5}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"kind": "classes", "class_names": ["a", "b"], "base": SECRET}))
    (folder / "README.md").write_text(
        f"---\nlibrary_name: visadapt\nbase_model: {SECRET}\npipeline_tag: image-classification\n"
        "tags: [visadapt, lora]\n---\n# birds\n\n| accuracy | 91.2% |\n|---|---|\n"
    )
    (folder / "learning_curves.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"x" * 1000)
    (folder / "metrics.csv").write_text("a,b\n")
    return folder


def push(place, *more, repo=REPO):
    return main(["push", str(place), "--repo", repo, *more])


def test_the_dry_run_lists_exactly_what_would_go_and_sends_nothing(hub, run, capsys):
    assert push(run, "--dry-run") == 0
    told = capsys.readouterr().out
    assert hub.asked == []
    names = ["README.md", "adapter.safetensors", "run.json", "config.yaml", "learning_curves.png"]
    listed = [line.split() for line in told.partition("not sent")[0].splitlines()[1:]]
    assert [line[0] for line in listed] == names
    assert f"{REPO}: 5 files" in told
    assert "not sent: checkpoints/, metrics.csv" in told
    assert "dry run: nothing was sent" in told
    assert "note: no licence" in told
    assert "| accuracy | 91.2% |" in told
    assert f"visadapt pull {REPO}" in told
    assert "someone/private" not in told
    assert push(run, "--license", "mit") == 0
    assert list(hub.repos[REPO]) == names
    sizes = {line[0]: int(line[1].replace(",", "")) for line in listed}
    assert all(len(hub.repos[REPO][name]) == sizes[name] for name in names if name != "README.md")


def test_what_was_sent_comes_back_and_loads(hub, run, here, capsys):
    assert push(run, "--license", "apache-2.0", "--private") == 0
    assert f"sent: {hub.address}/{REPO}/commit/" in capsys.readouterr().out
    assert hub.commits == ["birds: adapter and model card (visadapt)"]
    assert hub.private == {REPO}
    everything = b"".join(hub.repos[REPO].values())
    assert b"/home/someone" not in everything
    assert TOKEN.encode() not in everything
    card = hub.repos[REPO]["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0"
    assert "base_model" not in header, "the Hub refuses a base that is no repository"
    assert '`ImageFolder(root="photos", shots=5)`' in card
    assert main(["pull", REPO]) == 0
    told = capsys.readouterr().out
    assert "birds: 5 files" in told
    assert "visadapt adapter" in told
    assert {p.name for p in here.iterdir()} == {"runs", "birds"}, "nothing else is left"
    assert sorted(p.name for p in (here / "birds").iterdir()) == sorted(hub.repos[REPO])
    mine, theirs = (
        va.load(tiny_vit(), path).eval() for path in (run / "adapter.safetensors", "birds/adapter.safetensors")
    )
    assert torch.equal(mine(images()), theirs(images()))
    config = yaml.safe_load((here / "birds" / "config.yaml").read_text())
    assert config["trainer"] == {"max_epochs": 3}
    assert config["model"]["init_args"] == {}
    assert push(here / "birds", "--license", "mit") == 0, "what was pulled can be pushed again"
    assert hub.repos[REPO]["README.md"].decode().count("## Load it from the Hub") == 1


def test_a_file_alone_gets_a_card_of_what_it_is(hub, here, capsys):
    model = moved(va.adapt(tiny_vit(), va.LoRA(rank=2), ["attn.qkv"]))
    va.save(model, here / "leaf.safetensors", base_name="owner/base")
    (here / "other.txt").write_text("stays")
    assert push(here / "leaf.safetensors") == 0
    assert set(hub.repos[REPO]) == {"README.md", "leaf.safetensors"}
    card = hub.repos[REPO]["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/base"
    assert "LoRA(rank=2" in card
    assert 'va.load(model, "birds/leaf.safetensors")' in card
    assert main(["pull", REPO, "--output", "got"]) == 0
    assert (here / "got" / "leaf.safetensors").read_bytes() == (here / "leaf.safetensors").read_bytes()


def test_a_peft_folder_is_named_as_peft_loads_it(hub, here):
    model = moved(va.adapt(tiny_vit(), va.LoRA(rank=2), ["attn.qkv"]))
    va.export(model, here / "peft", format="peft")
    (here / "peft" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert push(here / "peft") == 0
    assert set(hub.repos[REPO]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = hub.repos[REPO]["README.md"].decode()
    assert f'PeftModel.from_pretrained(model, "{REPO}")' in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    hub.repos[REPO]["adapter_model.bin"] = b"\x80\x04."
    assert main(["pull", REPO]) == 0
    assert not (here / "birds" / "adapter_model.bin").exists()
    assert describe(here / "birds").kind == "PEFT folder"


@pytest.mark.parametrize(
    ("token", "repo", "told"),
    [("hf_wrong", REPO, "does not know this token"), (TOKEN, "no name", "should be owner/name"),
     (TOKEN, "a/../b", "should be owner/name")],
)  # fmt: skip
def test_a_refused_push_says_why_and_never_the_token(hub, run, monkeypatch, capsys, token, repo, told):
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(run, repo=repo) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert token not in captured.out + captured.err
    assert "Traceback" not in captured.err
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("args", "told"),
    [(["none/there"], "no such repository"), ([REPO, "--revision", "v9"], "no such revision"),
     (["someone/private"], "this token may not see it")],
)  # fmt: skip
def test_what_is_not_there_is_not_taken(hub, here, monkeypatch, capsys, args, told):
    hub.repos |= {REPO: {"adapter.safetensors": b""}, "someone/private": {"adapter.safetensors": b""}}
    hub.private = {"someone/private"}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["pull", *args]) == 2
    assert told in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_a_public_repository_takes_nothing_private(hub, run, capsys):
    hub.repos[REPO] = {"README.md": b"old"}
    assert push(run, "--private") == 2
    assert "it is there already, and public" in capsys.readouterr().err
    assert hub.repos[REPO] == {"README.md": b"old"}


@pytest.mark.parametrize("where", ["upload", "commit"])
def test_a_push_that_breaks_off_changes_nothing(hub, run, capsys, where):
    hub.repos[REPO] = {"README.md": b"old"}
    hub.breaks = where
    assert push(run) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert hub.repos[REPO] == {"README.md": b"old"}


def test_a_pull_that_breaks_off_leaves_nothing(hub, run, here, monkeypatch, capsys):
    assert push(run) == 0
    hub.breaks = "download"
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its tries
    assert main(["pull", REPO]) == 2
    assert "broke off" in capsys.readouterr().err
    assert [p.name for p in here.iterdir()] == ["runs"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert main(["pull", REPO]) == 2
    assert [p.name for p in here.iterdir()] == ["runs"]


def test_only_adapters_as_safetensors_are_taken(hub, here, capsys):
    cases = {
        "a/pickles": ({"adapter_model.bin": b"x"}, "pickles"),
        "a/pipeline": ({"model_index.json": b"{}", "unet/model.safetensors": b"x"}, "whole pipeline"),
        "a/nothing": ({"README.md": b"x"}, "no adapter in it"),
        "a/evil": ({"adapter.safetensors": b"\x80\x04."}, "not a safetensors file"),
    }
    replace_tensors(here / "w.safetensors", {"layer.weight": torch.zeros(2, 2)}, {})
    cases["a/weights"] = ({"model.safetensors": (here / "w.safetensors").read_bytes()}, "this is no adapter")
    (here / "w.safetensors").unlink()
    for repo, (files, told) in cases.items():
        hub.repos[repo] = files
        assert main(["pull", repo]) == 2
        assert told in capsys.readouterr().err
        assert list(here.iterdir()) == []
    names = ["../../up.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".hidden.safetensors", "ok.safetensors"]
    assert wanted(names, "a/b") == ["ok.safetensors"]


def test_nothing_is_overwritten(hub, run, here, capsys):
    assert push(run) == 0
    (here / "birds").mkdir()
    (here / "birds" / "mine.txt").write_text("mine")
    assert main(["pull", REPO]) == 2
    assert "there is something at 'birds' already" in capsys.readouterr().err


def test_a_folder_without_adapters_is_not_sent(hub, here, capsys):
    (here / "empty").mkdir()
    assert push(here / "empty") == 2
    (here / "empty" / "adapter_model.bin").write_bytes(b"x")
    assert push(here / "empty") == 2
    told = capsys.readouterr().err
    assert "there is no adapter in it" in told
    assert "is a pickle" in told
    assert main(["push", str(here / "empty")]) == 2
    assert "--repo" in capsys.readouterr().err
    assert hub.asked == []


@pytest.mark.parametrize(
    "part",
    [{"class_path": "os.system"}, {"class_path": "Mine", "init_args": {"backbone": {"class_path": "evil.Net"}}},
     {"class_path": "Mine", "init_args": {"optimizer": "evil.step"}}, "text", None],
)  # fmt: skip
def test_a_configuration_that_names_foreign_code_is_not_taken(part):
    assert safe_config(yaml.safe_dump({"model": part})) == ""


def test_of_a_configuration_model_and_data_are_taken():
    text = yaml.safe_dump({
        "model": {"class_path": "Classification", "init_args": {"optimizer": "torch.optim.AdamW"}},
        "data": {"class_path": "evil.Data"}, "trainer": {"max_epochs": 1, "logger": {"class_path": "evil.L"}},
    })  # fmt: skip
    assert set(yaml.safe_load(safe_config(text))) == {"model", "trainer"}
    assert yaml.safe_load(safe_config(text))["trainer"] == {"max_epochs": 1}
    assert safe_config("a: [") == ""


def test_places_of_this_machine_are_cut_and_addresses_stay(here):
    assert without_places("root: /home/me/photos") == "root: photos"
    assert without_places("~/models/sd15 and https://x.y/a/b, docs/a.md") == "sd15 and https://x.y/a/b, docs/a.md"
    path = here / "a.safetensors"
    replace_tensors(path, {"a": torch.arange(3.0)}, {"made": "from /home/me/a/b.safetensors"})
    from visadapt.cli.hub_files import _without_places_in_header

    shutil.copy(path, here / "b.safetensors")
    (here / "b.safetensors").write_bytes(_without_places_in_header(path))
    assert read_header(here / "b.safetensors")[0] == {"made": "from b.safetensors"}
    assert torch.equal(read_tensors(here / "b.safetensors")[1]["a"], torch.arange(3.0))
