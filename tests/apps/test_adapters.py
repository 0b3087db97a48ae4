"""Handlers of the app for adapter files, without a server; the command that starts apps; sizes of their files."""

import ast
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch

import visadapt as va
from apps import APPS, adapters
from visadapt.backbones.timm_vit import TimmViT
from visadapt.cli import app
from visadapt.cli.errors import UserError
from visadapt.cli.main import main

ROOT = Path(__file__).parents[2]


def test_own_files_and_peft_folders_are_told_and_drawn(digits_adapter, peft_zip, tmp_path):
    own = adapters.looked_at([str(digits_adapter)], tmp_path)
    rows = dict(adapters.facts(own))
    assert rows["kind"] == "visadapt adapter"
    assert rows["base"].startswith("tiny_digits")
    folder = adapters.looked_at([str(peft_zip)], tmp_path)
    assert dict(adapters.facts(folder))["kind"] == "PEFT folder"
    from apps._spectra import spectra

    mine, theirs = spectra(own.path)[0], spectra(folder.path)[0]
    assert sorted(s.norm for s in mine) == pytest.approx(sorted(s.norm for s in theirs), rel=1e-4)
    picture, note = adapters.norms(own)
    assert picture.shape[2] == 3
    assert picture.std() > 5
    assert note == ""


def test_what_is_no_adapter_is_told_in_one_message(tmp_path):
    from safetensors.torch import save

    with pytest.raises(UserError, match="there is no file yet"):
        adapters.looked_at([], tmp_path)
    for plan, told in (("[1", "what it says of itself is broken"), ("[" * 100_000, "its description is broken")):
        tensors = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        header = json.dumps({"__metadata__": {"visadapt": plan}, **tensors})
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
        with pytest.raises(UserError, match=told) as caught:
            adapters.looked_at([str(tmp_path / "a.safetensors")], tmp_path)
        assert caught.value.where == "a.safetensors"
    (tmp_path / "b.safetensors").write_bytes(save({}))
    with pytest.raises(UserError, match="no tensor"):
        adapters.looked_at([str(tmp_path / "b.safetensors")], tmp_path)


def test_factors_that_do_not_fit_have_no_norms(tmp_path):
    from safetensors.torch import save_file

    bad = {"lora_unet_x.lora_down.weight": torch.ones(2, 3), "lora_unet_x.lora_up.weight": torch.ones(4, 5)}
    save_file(bad, tmp_path / "a.safetensors")
    picture, note = adapters.norms(adapters.looked_at([str(tmp_path / "a.safetensors")], tmp_path))
    assert picture is None
    assert "do not fit together" in note


def test_a_file_goes_to_peft_and_back(digits_adapter, tmp_path):
    (tmp_path / "1").mkdir()
    found = adapters.looked_at([str(digits_adapter)], tmp_path)
    archive, told = adapters.converted(found, "ink.safetensors", "peft", adapters.STATED, 0, tmp_path)
    assert archive.name == "ink_peft.zip"
    assert "exact" in told
    assert str(tmp_path) not in told
    back = adapters.looked_at([str(archive)], tmp_path / "1")
    output, _ = adapters.converted(back, "ink.zip", "visadapt", "tiny_digits", 0, tmp_path)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (va.load(TimmViT("tiny_digits").build(), file).eval()(x) for file in (digits_adapter, output))
    assert torch.allclose(before, after, atol=1e-5)


def test_what_a_format_cannot_hold_is_told_by_the_name_of_the_upload(digits_adapter, tmp_path):
    found = adapters.looked_at([str(digits_adapter)], tmp_path)
    with pytest.raises(UserError, match="diffusion model"):
        adapters.converted(found, "ink.safetensors", "kohya", adapters.STATED, 0, tmp_path)
    for format, base in (("other", adapters.STATED), ("peft", "/etc/passwd")):
        with pytest.raises(UserError, match="there is no format"):
            adapters.converted(found, "ink.safetensors", format, base, 0, tmp_path)
    copy = shutil.copy(digits_adapter, tmp_path / "secret.safetensors")
    found = adapters.looked_at([copy], tmp_path)
    with pytest.raises(UserError) as caught:
        adapters.converted(found, "ink.safetensors", "peft", "tiny_sam", 0, tmp_path)
    assert "secret" not in f"{caught.value.what} {caught.value.hint}"


# --- the command ------------------------------------------------------------------------
def test_the_command_lists_the_apps_and_explains_mistakes(capsys, monkeypatch, tmp_path):
    assert main(["app"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in APPS)
    for args, message in (
        (["clasify"], "did you mean: classify?"),
        (["classify", "--auth", "me"], "USER:PASSWORD"),
        (["classify", "--port", "x"], "invalid int value"),
    ):
        assert main(["app", *args]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(app, "ROOT", tmp_path)
    assert main(["app"]) == 2
    assert "clone the repository" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "classify"]) == 2
    assert "pip install 'visadapt[apps]'" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "apps").glob("*.py")), ids=lambda path: path.stem)
def test_size_budgets(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            assert body[-1].end_lineno - body[0].lineno + 1 <= 45, node.name


def test_every_app_is_listed():
    assert set(APPS) == {p.stem for p in (ROOT / "apps").glob("[a-z]*.py")}
