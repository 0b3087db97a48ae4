"""Uploads that are not what they claim: one message that names the file, and no request to other machines."""

import pickle
import socket
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from apps import _safety
from visadapt.cli.errors import UserError

PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))


def image(path, **options):
    PIXELS.save(path, **options)
    return path


def png_of(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "PNG"])
def test_whole_pictures_pass(tmp_path, suffix):
    path = image(tmp_path / f"a.{suffix}")
    assert _safety.picture(path) == path


def damaged(kind: str, path):
    whole = image(path).read_bytes()
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        archive.writestr("a.txt", "b" * 100)
    made = {
        "text": b"not a picture",
        "empty": b"",
        "cut": whole[: len(whole) * 9 // 10],
        "zip behind": whole + path.with_suffix(".zip").read_bytes(),
        "page behind": whole + b"<script>alert(1)</script>",
        "20,000 pixels": png_of(20_000, 20_000),
        "long": png_of(20_000, 100),
    }
    path.write_bytes(made[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "this is no picture"),
        ("empty", "this is no picture"),
        ("cut", "cut off or damaged"),
        ("zip behind", "goes on with something else"),
        ("page behind", "goes on with something else"),
        ("20,000 pixels", "too many|million pixels"),
        ("long", "20,000 × 100 pixels are too many"),
    ],
)
def test_other_pictures_are_refused_by_name(tmp_path, kind, message):
    with pytest.raises(UserError, match=message) as caught:
        _safety.picture(damaged(kind, tmp_path / "a.png"))
    assert caught.value.where == "a.png", "the message must not tell where uploads lie"


@pytest.mark.parametrize("kind", ["cut", "page behind"])
def test_jpeg_too(tmp_path, kind):
    with pytest.raises(UserError, match="cut off|goes on"):
        _safety.picture(damaged(kind, tmp_path / "a.jpg"))


def test_another_format_than_the_name_says(tmp_path):
    path = image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="ends in '.png', but it is a JPEG"):
        _safety.picture(path.rename(tmp_path / "a.png"))


def test_gone_and_too_large(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="this upload is gone"):
        _safety.picture(tmp_path / "a.png")
    monkeypatch.setattr(_safety, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="this app takes 100"):
        _safety.picture(image(tmp_path / "a.png"))


# --- adapters ---------------------------------------------------------------------------
WEIGHTS = save({"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(4, 2)})


def bad_adapter(kind: str, folder):
    path = folder / "a.safetensors"
    if kind == "torch archive":
        torch.save({"a": torch.ones(2)}, path)
        return path
    content = {
        "pickle": pickle.dumps({"a": 1}),
        "cut": WEIGHTS[:-5],
        "more behind": WEIGHTS + b"#!/bin/sh",
        "huge header": struct.pack("<Q", 2**62) + b"{}",
        "text": b"adapter",
        "list": struct.pack("<Q", 2) + b"[]",
        "pickle by name": b"",
    }
    path = path.with_suffix(".pt") if kind == "pickle by name" else path
    path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("torch archive", "hidden under the name .safetensors"),
        ("pickle", "hidden under the name .safetensors"),
        ("pickle by name", "this is a pickle"),
        ("cut", "cut off"),
        ("more behind", "cut off"),
        ("huge header", "cut off"),
        ("text", "cut off"),
        ("list", "cut off"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, kind, message):
    with pytest.raises(UserError, match=message) as caught:
        _safety.adapter([bad_adapter(kind, tmp_path)], tmp_path)
    assert caught.value.where.startswith("a.")


def archive(path, **files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in files.items():
            made.writestr(name, content)
    return path


CONFIG = '{"peft_type": "LORA", "r": 2}'


def test_a_folder_comes_out_of_its_archive_and_nothing_else(tmp_path):
    path = tmp_path / "a.zip"
    files = {"run/adapter_config.json": CONFIG, "run/adapter_model.safetensors": WEIGHTS, "run/evil.py": "1"}
    found = _safety.adapter([archive(path, **files)], tmp_path / "into")
    assert sorted(p.name for p in found.rglob("*")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_parts_of_a_diffusion_model_keep_their_folders(tmp_path):
    names = [
        f"run/{part}/adapter_{end}" for part in ("unet", "text_encoder") for end in ("config.json", "model.safetensors")
    ]
    files = {name: CONFIG if name.endswith("json") else WEIGHTS for name in names}
    found = _safety.adapter([archive(tmp_path / "a.zip", **files)], tmp_path / "into")
    assert sorted(p.name for p in found.iterdir()) == ["text_encoder", "unet"]


def test_the_two_files_of_a_folder_may_come_alone(tmp_path):
    (tmp_path / "up").mkdir()
    (tmp_path / "into").mkdir()
    (tmp_path / "up" / "adapter_config.json").write_text(CONFIG)
    (tmp_path / "up" / "adapter_model.safetensors").write_bytes(WEIGHTS)
    found = _safety.adapter(sorted((tmp_path / "up").iterdir()), tmp_path / "into")
    assert len(list(found.iterdir())) == 2
    with pytest.raises(UserError, match="this is no adapter"):
        _safety.adapter([tmp_path / "up" / "adapter_config.json"], tmp_path / "into")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_model.safetensors": bytes(20_000_000)}, "would unpack to 20,000,000 bytes"),
        ({"../adapter_config.json": CONFIG}, "writes outside of its folder"),
        ({"/adapter_config.json": CONFIG}, "writes outside of its folder"),
        ({"adapter_model.bin": "x"}, "holds 'adapter_model.bin', a pickle"),
        ({"readme.md": "x"}, "no adapter in this archive"),
        ({"a/adapter_config.json": CONFIG, "b/adapter_config.json": CONFIG}, "several folders"),
        ({str(i): "x" for i in range(300)}, "holds 300 files"),
        ({"adapter_model.safetensors": pickle.dumps(1)}, "hidden under the name"),
    ],
)
def test_archives_that_are_bombs_or_climb_are_refused(tmp_path, files, message):
    into = tmp_path / "deep" / "into"
    with pytest.raises(UserError, match="archive|hidden") as caught:
        _safety.adapter([archive(tmp_path / "a.zip", **files)], into)
    assert message in f"{caught.value.what} {caught.value.hint}"
    assert not (tmp_path / "deep" / "adapter_config.json").exists()


def test_an_archive_that_is_cut_off_or_lies_is_refused(tmp_path):
    path = archive(tmp_path / "a.zip", **{"adapter_config.json": CONFIG * 9})
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="damaged or no zip"):
        _safety.adapter([path], tmp_path / "into")
    size = struct.pack("<I", len(CONFIG) * 9)
    path.write_bytes(whole.replace(size, struct.pack("<I", 5)))  # a bomb that says it is small
    with pytest.raises(UserError, match="damaged or no zip"):
        _safety.adapter([path], tmp_path / "into")


def test_discard_stays_below_its_folder(tmp_path):
    for name in ("in/x/a", "out"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    _safety.discard([tmp_path / "in/x/a", tmp_path / "in/../out"], tmp_path / "in")
    assert (tmp_path / "out").is_file()
    assert list((tmp_path / "in").iterdir()) == []


def test_no_request_leaves_the_machine():
    server = socket.create_server(("127.0.0.1", 0))
    _safety.stay_on_this_machine()
    try:
        with pytest.raises(PermissionError, match="no request to other machines"):
            socket.create_connection(("192.0.2.1", 9), timeout=1)  # an address of no machine, RFC 5737
        with pytest.raises(PermissionError):
            socket.getaddrinfo("example.org", 80)
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()
    finally:
        _safety.stay_on_this_machine(False)
        server.close()
