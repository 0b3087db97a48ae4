"""Uploads that are not what they claim: one message that names the file, and no request to other machines."""

import io
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


def jpegs(*pictures):
    """JPEGs one behind the other, as phones and `MPO` files have them."""
    with_segments = io.BytesIO()
    pictures[0].save(with_segments, "MPO", save_all=True, append_images=pictures[1:])
    return with_segments.getvalue()


ENDS = {"png": b"IEND\xaeB`\x82", "jpg": b"\xff\xd9", "gif": b";", "bmp": b"", "webp": b""}


@pytest.mark.parametrize("suffix", ENDS)
@pytest.mark.parametrize("disguised", [False, True], ids=["plain", "with an end mark of its own"])
def test_what_follows_a_picture_is_found(tmp_path, suffix, disguised):
    path = image(tmp_path / f"a.{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole + b"<script>alert(1)</script>" + ENDS[suffix] * disguised)
    with pytest.raises(UserError, match="goes on with something else"):
        _safety.picture(path)
    path.write_bytes(whole + bytes(40))
    assert _safety.picture(path) == path, "zeros are padding"


def test_a_payload_does_not_hide_in_the_place_of_the_last_block(tmp_path):
    path = image(tmp_path / "a.gif")
    path.write_bytes(path.read_bytes().removesuffix(b";") + b"<?php echo 1;?>;")
    with pytest.raises(UserError, match="goes on with something else"):
        _safety.picture(path)
    path = image(tmp_path / "a.bmp")
    whole = path.read_bytes() + b"<script></script>"
    path.write_bytes(whole[:2] + struct.pack("<I", len(whole)) + whole[6:])  # its header counts the payload in
    with pytest.raises(UserError, match="goes on with something else"):
        _safety.picture(path)


@pytest.mark.parametrize("suffix", ENDS)
def test_a_picture_without_its_end_is_cut_off(tmp_path, suffix):
    path = image(tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut off or damaged|this is no picture"):  # a WebP without it is no WebP
        _safety.picture(path)


def test_all_that_pillow_writes_has_its_end_where_it_is_sought(tmp_path):
    grey, palette, red = PIXELS.convert("L"), PIXELS.quantize(7), PIXELS.transpose(Image.Transpose.ROTATE_90)
    made = {
        "progressive.jpg": (PIXELS, {"progressive": True, "comment": b"\xff\xd9;", "dpi": (72, 72)}),
        "restarts.jpg": (PIXELS, {"restart_marker_blocks": 1, "quality": 100}),
        "grey.jpg": (grey, {}),
        "grey.bmp": (grey, {}), "palette.bmp": (palette, {}), "one_bit.bmp": (PIXELS.convert("1"), {}),
        "alpha.bmp": (PIXELS.convert("RGBA"), {}),
        "moving.gif": (PIXELS, {"save_all": True, "append_images": [grey, PIXELS], "loop": 0, "comment": b";"}),
        "palette.gif": (palette, {}),
        "moving.png": (PIXELS, {"save_all": True, "append_images": [grey.convert("RGB")]}),
        "palette.png": (palette, {}),
        "moving.webp": (PIXELS, {"save_all": True, "append_images": [red.resize(PIXELS.size)]}),
        "lossless.webp": (PIXELS, {"lossless": True}),
    }  # fmt: skip
    for name, (picture, options) in made.items():
        picture.save(tmp_path / name, **options)
        assert _safety.picture(tmp_path / name).name == name


def test_the_jpeg_of_a_phone_may_have_others_behind_it(tmp_path):
    path = tmp_path / "a.jpg"
    both = jpegs(PIXELS, PIXELS.convert("L"))
    path.write_bytes(both)
    with Image.open(path) as file:
        assert file.format == "MPO"
    assert _safety.picture(path) == path
    for more in (b"<script>", b"\xff\xd8<script>\xff\xd9"):
        path.write_bytes(both + more)
        with pytest.raises(UserError, match="after the JPEG picture the file goes on"):
            _safety.picture(path)
    path.write_bytes(both)
    with pytest.raises(UserError, match="ends in '.png', but it is a JPEG"):
        _safety.picture(path.rename(tmp_path / "a.png"))


@pytest.mark.parametrize("format", ["PPM", "TGA", "ICO", "PCX", "PDF", "DIB"])
def test_formats_that_are_not_listed_are_refused_by_name(tmp_path, format):
    with pytest.raises(UserError, match="this is no picture, or one of a kind that apps do not take") as caught:
        _safety.picture(image(tmp_path / "a.png", format=format))
    assert caught.value.where == "a.png"
    assert "PNG, JPEG, WEBP, BMP, GIF, TIFF" in caught.value.hint


def test_float_pixels_are_told_as_such(tmp_path):
    Image.fromarray(np.ones((4, 5), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="its pixels are floats") as caught:
        _safety.picture(tmp_path / "a.tif")
    assert caught.value.hint == "save it with 8 or 16 bits"


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
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            asked = (
                lambda: socket.gethostbyname("example.org"),
                lambda: socket.gethostbyname_ex("example.org"),
                lambda: socket.gethostbyaddr("192.0.2.1"),
                lambda: socket.getnameinfo(("192.0.2.1", 9), 0),
                lambda: sender.sendto(b"a", ("192.0.2.1", 9)),
                lambda: sender.sendmsg([b"a"], [], 0, ("192.0.2.1", 9)),
            )
            for ask in asked:
                with pytest.raises(PermissionError, match="no request to other machines"):
                    ask()
            sender.sendmsg([b"a"], [], 0, server.getsockname())
        assert socket.gethostbyname("127.0.0.1") == "127.0.0.1"
        with socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as own:
            assert own.sendmsg([b"a"]) == 1, "it is connected, so there is no address"
    finally:
        _safety.stay_on_this_machine(False)
        server.close()
