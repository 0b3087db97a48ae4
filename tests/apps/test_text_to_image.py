"""Handlers of the text-to-image app and its studio, without a server."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import visadapt as va
from apps import _prompting, _runs, _studio, text_to_image
from tests.apps.conftest import noisy, write_run
from tests.tiny_video import video_base
from visadapt.backbones.sd_render import render
from visadapt.backbones.sd_tokens import NewToken, add_tokens, metadata
from visadapt.backbones.stable_diffusion import StableDiffusion
from visadapt.cli.errors import UserError

CROSS, SELF = ["unet.cross"], ["unet.self"]


def base():
    return StableDiffusion(video_base())  # its parts are a Stable Diffusion, too


def saved(path, targets, method=None, seed=0):
    model = noisy(va.adapt(base().build(), method or va.LoRA(rank=2), targets), 0.3 + seed)
    return va.save(model, path, base_name="random")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return [saved(folder / "style.safetensors", CROSS), saved(folder / "subject.safetensors", SELF, va.DoRA(rank=1))]


@pytest.fixture(scope="module")
def studio(files):
    return _studio.Studio(base(), files)


def wish(strengths, **changed):
    given = {"prompt": "a cat", "negative": "", "seed": 3, "steps": 1, "guidance": 2.0, "number": 2} | changed
    return _prompting.wish(**given, strengths=strengths)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_sets_at_strengths_render_what_the_library_renders(studio, files, tmp_path):
    assert [one.label for one in studio.sets] == ["style", "subject"]
    sheet, found, note = text_to_image.painted(studio, wish({"style": 1.0, "subject": 0.5}), tmp_path)
    names = [Path(file).name for file in found]
    assert names == ["base_and_adapted.png", *(f"{t}_seed{s}.png" for t in ("base", "adapted") for s in (3, 4))]
    assert sheet == found[0]
    assert note == ""
    model = va.load(va.load(base().build(), files[0], name="a"), files[1], name="b").eval()
    for strengths, titles in (({"a": 0.0, "b": 0.0}, names[1:3]), ({"a": 1.0, "b": 0.5}, names[3:])):
        with va.strength(model, **strengths):
            wanted = (render(model, ["a cat"] * 2, [3, 4], 1, 2.0) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for title, picture in zip(titles, wanted, strict=True):
            assert np.abs(pixels(tmp_path / title).astype(int) - picture).max() <= 1
    how = json.loads(Image.open(found[3]).text["visadapt"])
    assert (how["strengths"], how["seed"], how["prompt"]) == ({"style": 1.0, "subject": 0.5}, 3, "a cat")
    assert "/" not in how["base"], "a picture does not say where the base lies"


def test_without_strength_the_base_stands_alone(studio, tmp_path):
    _, found, note = text_to_image.painted(studio, wish({"style": 0.0}, number=1), tmp_path)
    assert [Path(file).name for file in found] == ["base_and_adapted.png", "base_seed3.png"]
    assert "base alone" in note


def test_uploads_join_once_and_the_first_ones_make_room(files, tmp_path, monkeypatch):
    studio = _studio.Studio(base())
    assert (studio.sets, studio.admit([])) == ([], [])
    (one,) = studio.admit([str(files[0])])
    again = shutil.copy(files[0], tmp_path / "renamed.safetensors")
    assert studio.admit([again]) == [one], "the same content is the same set"
    found = studio.admit([str(files[0]), str(files[1])])
    assert [row.label for row in found] == ["style", "subject"]
    assert {a.name for a in va.adapters(studio.model).values()} == {row.name for row in found}
    monkeypatch.setattr(_studio, "KEPT", 1)
    (kept,) = studio.admit([str(files[0])])
    assert {a.name for a in va.adapters(studio.model).values()} == {kept.name}
    assert not any(p.requires_grad for p in studio.model.parameters())


def test_files_of_other_tools_and_of_several_sets(files, tmp_path):
    model = va.load(base().build(), files[0])
    va.export(model, tmp_path / "kohya.safetensors", format="kohya")
    va.export(model, tmp_path / "peft", format="peft")
    zipped = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path, "peft")
    both = va.adapt(base().build(), va.LoRA(rank=1), SELF, name="one")
    va.adapt(va.adapt(both, va.LoRA(rank=1), CROSS, name="two"), va.DoRA(rank=1), ["unet.ff"], name="two")
    va.save(noisy(both), tmp_path / "both.safetensors", base_name="random")
    studio = _studio.Studio(base())
    labels = [one.label for one in studio.admit([str(tmp_path / "kohya.safetensors"), zipped])]
    assert labels == ["kohya", "zipped"]
    pair = [str(next((tmp_path / "peft").rglob(name))) for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert [one.label for one in studio.admit([*pair, zipped])] == ["PEFT folder", "zipped"]
    counts = {one: len(va.adapters(studio.model, one)) for one in {a.name for a in va.adapters(studio.model).values()}}
    assert set(counts.values()) == {len(va.adapters(model))}
    assert [one.label for one in studio.admit([str(tmp_path / "both.safetensors")])] == ["both: one", "both: two"]


def test_what_does_not_fit_leaves_the_model_as_it_was(files, tmp_path, digits_adapter):
    studio = _studio.Studio(base(), files[:1])
    before = set(studio.model.state_dict())
    with pytest.raises(UserError, match="does not fit the base"):
        studio.admit([str(digits_adapter)])
    changed = base().build()
    changed.unet.conv_in.requires_grad_(True)
    va.save(changed, tmp_path / "full.safetensors", base_name="random")
    with pytest.raises(UserError, match="changes the base itself"):
        studio.admit([str(tmp_path / "full.safetensors")])
    words = base().build()
    add_tokens(words, [NewToken("<sks>")])
    va.adapt(words, va.LoRA(rank=1), CROSS)
    for parameter in (p for n, p in words.named_parameters() if n.endswith(".new_tokens")):
        parameter.requires_grad_(True)
    path = va.save(words, tmp_path / "words.safetensors", base_name="random", extra=metadata(words))
    with pytest.raises(UserError, match="brings new words"):
        studio.admit([str(path)])
    assert set(studio.model.state_dict()) == before
    assert _studio.Studio(base(), [path]).words == ["<sks>"], "at the start it may"
    (tmp_path / "evil.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="hidden under the name"):
        studio.admit([str(tmp_path / "evil.safetensors")])


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"prompt": "  "}, "no prompt yet"), ({"prompt": "a" * 1001}, "too many"), ({"seed": -1}, "whole number"),
     ({"steps": None}, "whole number")],
)  # fmt: skip
def test_fields_that_say_nothing_are_refused(changed, told):
    with pytest.raises(UserError, match=told):
        wish({}, **changed)


def test_strengths_of_programs_go_by_label(studio):
    assert _studio.strengths_of(None, studio.sets) == {"style": 1.0, "subject": 1.0}
    assert _studio.strengths_of({"style": 0.25}, studio.sets) == {"style": 0.25, "subject": 1.0}
    for wrong, told in ([1], "numbers by name"), ({"style": "much"}, "numbers by name"), ({"stile": 1}, "there is no"):
        with pytest.raises(UserError, match=told):
            _studio.strengths_of(wrong, studio.sets)


def test_a_run_says_its_base_preview_and_certificate(files, tmp_path):
    options = {
        "backbone": {"class_path": "visadapt.backbones.stable_diffusion.StableDiffusion",
                     "init_args": {"name": video_base()}},
        "preview": {"prompts": ["a sks cat"], "steps": 7},
    }  # fmt: skip
    path = write_run(tmp_path / "x" / "1", "visadapt.tasks.text_to_image.TextToImage", options, [])
    shutil.copy(files[0], path)
    assert _runs.newest(text_to_image.TASKS, tmp_path) == [path]
    assert _runs.diffusion([path], None).name == _runs.base_name(path) == video_base()
    assert _runs.options(path)["preview"]["steps"] == 7
    assert _runs.certificate(path) == ""
    card = "# x\n\n<!-- certificate -->\n## Parity certificate\n\nLoaded: **passed**.\n<!-- /certificate -->\n"
    (path.parent / "README.md").write_text(card)
    assert _runs.certificate(path) == "Loaded: **passed**."
    assert _runs.diffusion([], None).name == "tiny_sd"
    with pytest.raises(UserError, match="its base is 'random', which is not shipped"):
        _runs.diffusion([files[0]], None)
    assert _runs.diffusion([files[0]], "elsewhere").name == "elsewhere"


def test_resting_files_start_at_0(files):
    assert [one.strength for one in _studio.Studio(base(), files, files[1:]).sets] == [1.0, 0.0]


def test_runs_that_trained_the_base_are_passed_over_unless_they_are_named(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"backbone": {"class_path": "visadapt.backbones.stable_diffusion.StableDiffusion",
                            "init_args": {"name": video_base()}}}  # fmt: skip
    task = "visadapt.tasks.text_to_image.TextToImage"
    lora, full = (write_run(Path("runs") / name / "1", task, options, []) for name in ("lora", "full"))
    shutil.copy(files[0], lora)
    changed = base().build()
    changed.unet.conv_in.requires_grad_(True)
    va.save(changed, full, base_name="random")
    os.utime(lora, (0, 0))
    assert _runs.newest(text_to_image.TASKS) == [full, lora]
    recipe, found, resting = text_to_image.chosen([], None)
    assert (recipe.name, found, resting) == (video_base(), [lora], [])
    assert _studio.Studio(recipe, found).sets
    named = text_to_image.chosen([full], None)
    with pytest.raises(UserError, match="changes the base itself"):
        _studio.Studio(named[0], named[1])
