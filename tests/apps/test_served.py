"""The apps as programs meet them: gradio_client, raw requests, limits and a password."""

import json
import os
import shutil
import urllib.error
import urllib.request
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from apps import _safety, _server, adapters, classify
from tests.apps.test_safety import image
from visadapt.cli.errors import UserError

gradio = pytest.importorskip("gradio", reason="apps need Gradio: pip install 'visadapt[apps]'")
gradio_client = pytest.importorskip("gradio_client")
Client, handle_file, AppError = gradio_client.Client, gradio_client.handle_file, gradio_client.exceptions.AppError
clients = {}


@pytest.fixture
def client(served):
    def connected(name):
        if name not in clients:
            clients[name] = Client(served(name), verbose=False)
        return clients[name]

    return connected


def uploads() -> list[str]:
    """Files that visitors have left."""
    root = _server.temporary()
    return [p.name for p in root.rglob("*") if p.is_file() and "results" not in p.relative_to(root).parts]


def test_classify_answers_and_refuses(client, tmp_path):
    _, base, adapted = client("classify").predict(handle_file(image(tmp_path / "a.png")), 1.0, api_name="/classify")
    assert len(base["confidences"]) == len(adapted["confidences"]) == 5
    assert base["label"].isdigit()
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(AppError, match="text.png: this is no picture"):
        client("classify").predict(handle_file(tmp_path / "text.png"), 1.0, api_name="/classify")
    assert "text.png" not in uploads(), "a refused upload is gone"
    assert all(path.stat().st_size for path in _server.temporary().iterdir() if path.is_file())


def test_segment_by_tiles_and_by_coordinates(client, tmp_path):
    picture = handle_file(image(tmp_path / "a.png"))
    overlay, files, told = client("segment").predict(picture, 1.0, 0.25, 0.6, api_name="/segment")
    assert overlay.endswith(".png")
    assert files[0].endswith("a_mask.png")
    assert "of the pixels" in told
    overlay, files = client("segment").predict(picture, [[10, 10, 1]], None, 0.6, api_name="/coordinates")
    assert files[0].endswith("a_mask.png")
    overlay, files = client("segment").predict(picture, None, [2, 2, 20, 20], 0.6, api_name="/coordinates")
    assert files[0].endswith("a_mask.png")
    with pytest.raises(AppError, match="no click yet"):
        client("segment").predict(picture, None, None, 0.6, api_name="/coordinates")
    for box in ([1, 2, 3], [1, 2, 3, 4] * 2, "box"):
        with pytest.raises(AppError, match="box: this should be left, top, right and bottom"):
            client("segment").predict(picture, None, box, 0.6, api_name="/coordinates")


def test_adapters_tells_and_converts(client, digits_adapter, tmp_path):
    files = [handle_file(str(digits_adapter))]
    table, picture, _ = client("adapters").predict(files, api_name="/inspect")
    assert ["kind", "visadapt adapter"] in table["data"]
    assert picture.endswith(".png")
    result, told = client("adapters").predict(files, "peft", adapters.STATED, 0, api_name="/convert")
    assert result.endswith("ink_peft.zip")
    assert "exact" in told
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(AppError, match="hidden under the name .safetensors"):
        client("adapters").predict([handle_file(tmp_path / "a.safetensors")], api_name="/inspect")
    assert "a.safetensors" not in uploads()


def test_pictures_of_a_prompt(client, picture_run, tmp_path):
    paint = client("text_to_image").predict
    fields = ["a red star on bricks", "", 1, 2, 3.0, 2]  # prompt, negative, seed, steps, guidance, pictures
    sheet, files, told = paint(None, None, *fields, api_name="/render")
    assert sheet.endswith(".png")
    assert len(files) == 5
    assert not told
    upload = handle_file(shutil.copy(picture_run, tmp_path / "mine.safetensors"))
    with pytest.raises(AppError, match="there is no 'other'. There are: .*, mine"):
        paint([upload], {"other": 1}, *fields, api_name="/render")
    name = picture_run.parents[1].name
    both = paint([upload], {name: 0.5, "mine": 0.5}, *fields, api_name="/render")[1]
    how = json.loads(Image.open(both[-1]).text["visadapt"])
    assert how["strengths"] == {name: 0.5, "mine": 0.5}
    _, files, told = paint(None, {name: 0}, *fields, api_name="/render")
    assert "base alone" in told
    for wrong, message in ((["", *fields[1:]], "no prompt yet"), ([*fields[:3], 101, 3.0, 2], "101")):
        with pytest.raises(AppError, match=message):
            paint(None, None, *wrong, api_name="/render")
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(AppError, match="hidden under the name .safetensors"):
        paint([handle_file(tmp_path / "a.safetensors")], None, *fields, api_name="/render")
    assert "a.safetensors" not in uploads()


def test_clips_of_a_prompt(client):
    fields = ["a red star orbiting", "", 0, 1, 2.0, 3]  # prompt, negative, seed, steps, guidance, frames
    shown, files, _ = client("text_to_video").predict(None, {"orbit: spatial": 0.5}, *fields, api_name="/render")
    assert shown.endswith(".webp")
    assert {"adapted_seed0.gif", "adapted_seed0.webp"} <= {file.rpartition("/")[2] for file in files}
    with Image.open(shown) as file:
        assert file.n_frames == 3


def asked(address: str, api: str, data: list) -> str:
    """What the server answers to a request that no client of ours would make."""
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(f"{address}gradio_api/call/{api}", body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request, timeout=20))["event_id"]
    return urllib.request.urlopen(f"{address}gradio_api/call/{api}/{event}", timeout=60).read().decode()


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "docs/images/quickstart.png", "http://192.0.2.1/a.png", "file:///etc/passwd", None]
)
def test_a_path_or_an_address_is_no_upload(served, place):
    """A file that was never uploaded is refused, and no request is made for it."""
    said = {"path": place, "url": "http://192.0.2.1/b.png", "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    answer = asked(served("classify"), "classify", [said if place else "docs/images/quickstart.png", 1.0])
    assert "event: error" in answer
    assert "confidences" not in answer


@pytest.mark.parametrize("path", ["/etc/passwd", "pyproject.toml", "visadapt/__init__.py"])
def test_files_of_the_machine_are_not_served(served, path):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{served('classify')}gradio_api/file={path}", timeout=10)
    assert caught.value.code in (403, 404)


PROMPTS = ["Prompt", "Negative prompt"]


@pytest.mark.parametrize(
    ("name", "boxes"),
    [("classify", []), ("segment", []), ("adapters", []), ("text_to_image", PROMPTS), ("text_to_video", PROMPTS)],
)
def test_no_input_but_a_prompt_is_a_text_box(served, name, boxes):
    config = json.load(urllib.request.urlopen(f"{served(name)}config", timeout=10))
    kinds = ("textbox", "code", "multimodaltextbox")
    assert [c["props"]["label"] for c in config["components"] if c["type"] in kinds] == boxes
    assert config["analytics_enabled"] is False


def test_a_password_and_a_limit_hold(monkeypatch):
    monkeypatch.setattr(_safety, "MOST_BYTES", 1000)
    blocks, address = _server.launch(classify.build(), auth=("me", "secret"), block=False)
    try:
        for place in ("config", "gradio_api/file=/etc/passwd"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{address}{place}", timeout=10)
            assert caught.value.code == 401
        me = Client(address, auth=("me", "secret"), verbose=False)
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            + bytes(5000)
            + b"\r\n--x--"
        )
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        headers["Cookie"] = "; ".join(f"{k}={v}" for k, v in dict(me.cookies).items())
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", body, headers), timeout=10)
        assert caught.value.code == 413
        assert blocks.max_file_size == 1000
        assert address.startswith("http://127.0.0.1:")
    finally:
        blocks.close(verbose=False)


def test_a_handler_that_fails_for_another_reason_is_not_explained_away(tmp_path):
    def broken(path):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _server.told(broken)("a")

    def refused(path):
        raise UserError("a.png", "this is no picture", "pictures are pictures")

    upload = _server.temporary() / "x" / "a.png"
    upload.parent.mkdir()
    upload.write_text("x")
    with pytest.raises(gradio.Error, match="a.png: this is no picture. Pictures are pictures."):
        _server.told(refused, _server.one)(str(upload))
    assert not upload.parent.exists()


def offered(blocks) -> list[str]:
    """The files that a page offers from its start on, and that a visitor has taken once."""
    components = list(blocks.blocks.values())
    found = [path for one in components for path in one.keep_in_cache]
    upload = next(one for one in components if isinstance(one, gradio.File))
    return [upload.move_resource_to_block_cache(path) for path in found]


@pytest.mark.parametrize("name", ["classify", "segment", "adapters"])
def test_examples_stay_for_hours_and_a_mistake_does_not_take_them(name, request):
    adapter = request.getfixturevalue("railway_run" if name == "segment" else "digits_adapter")
    blocks = import_module(f"apps.{name}").build([adapter])
    files = offered(blocks)
    assert files
    root = _server.temporary()
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, (0, 0))
    _server.workplace()  # clears away what is old
    gradio.route_utils.delete_files_created_by_app(blocks, -1)  # so does Gradio

    def refused(path):
        raise UserError("a.png", "this is no picture")

    with pytest.raises(gradio.Error):
        _server.told(refused, _server.one)(files[0])
    assert [path for path in files if not Path(path).is_file()] == []
    assert all(Path(path).is_relative_to(root) for path in files), "Gradio serves nothing else"


@pytest.mark.parametrize("zipped", [False, True])
def test_the_sample_of_the_adapters_stays_too(digits_adapter, tmp_path, zipped):
    given = digits_adapter.parent if zipped else digits_adapter
    (sample,) = adapters._samples([given])
    os.utime(sample.parent, (0, 0))
    _server.workplace()
    assert sample.is_file()
