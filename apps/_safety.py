"""Uploads are looked at before anything uses them: one clear message for what is wrong, and the file is gone."""

from __future__ import annotations

import ipaddress
import shutil
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from apps import _endings
from visadapt.cli.errors import UserError

MOST_BYTES = 64 * 2**20  # of one upload; the server refuses more before it is stored
MOST_SIDE = 10_000  # pixels
MOST_PIXELS = 40_000_000
MOST_HEADER = 8 * 2**20  # of a safetensors file; parsed as JSON
MOST_ENTRIES, MOST_UNPACKED, MOST_RATIO = 200, 512 * 2**20, 100  # of a zip archive

_FORMATS = {"PNG": "png", "JPEG": "jpg jpeg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif tiff"}
PICTURES = [f".{suffix}" for suffixes in _FORMATS.values() for suffix in suffixes.split()]
ADAPTERS = [".safetensors", ".zip", ".json"]
_PARTS = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_FOLDERS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # a diffusion model has a folder for each part
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# --- pictures ---------------------------------------------------------------------------
def picture(path: str | Path) -> Path:
    """The path of an upload that is a whole picture of a bearable size and nothing else.

    The header is read first; pixels are decoded only if there are not too many.

    Raises:
        UserError: it is not.
    """
    from PIL import Image

    from visadapt.data.images import UnreadableImage, read_rgb

    path = _there(path)
    try:
        with Image.open(path, formats=list(_FORMATS)) as file:
            kind, mode, (width, height) = str(file.format), file.mode, file.size
    except Image.DecompressionBombError:
        raise _too_large(path, "more than 179 million pixels") from None
    except (OSError, ValueError, SyntaxError):
        known = f"pictures are {', '.join(_FORMATS)}, with 8 or 16 bits a channel"
        raise UserError(path.name, "this is no picture, or one of a kind that apps do not take", known) from None
    kind = "JPEG" if kind == "MPO" else kind  # Pillow's name of a phone's JPEG that has others behind it
    if max(width, height) > MOST_SIDE or width * height > MOST_PIXELS:
        raise _too_large(path, f"{width:,} × {height:,} pixels")
    if path.suffix.lower().removeprefix(".") not in _FORMATS[kind].split():
        raise UserError(path.name, f"its name ends in '{path.suffix}', but it is a {kind}", "give it the right ending")
    if mode == "F":
        raise UserError(path.name, "its pixels are floats, which have no agreed range", "save it with 8 or 16 bits")
    more = _endings.goes_on(path.read_bytes(), kind)
    if zipfile.is_zipfile(path) or more:
        raise UserError(path.name, f"after the {kind} picture the file goes on with something else", "save it anew")
    try:
        read_rgb(path)
    except UnreadableImage:
        more = None
    if more is None:
        raise UserError(path.name, f"this {kind} picture is cut off or damaged", "upload it again")
    return path


def _too_large(path: Path, size: str) -> UserError:
    most = f"this app takes {MOST_SIDE:,} pixels a side and {MOST_PIXELS // 10**6} million in all"
    return UserError(path.name, f"{size} are too many: {most}", "make it smaller; `visadapt predict` takes any size")


# --- adapters ---------------------------------------------------------------------------
def adapter(paths: Sequence[str | Path], into: Path) -> Path:
    """An upload as what `visadapt inspect` takes: one safetensors file, or a PEFT folder made in ``into``.

    Args:
        paths: One .safetensors file, one .zip of a folder, or adapter_config.json with adapter_model.safetensors.
        into: Empty folder for what is unpacked.

    Raises:
        UserError: it is none of these, or not what it claims.
    """
    files = [_there(path) for path in paths]
    if len(files) == 1 and files[0].suffix.lower() == ".zip":
        return _unpacked(files[0], into)
    if len(files) == 1 and files[0].name != "adapter_config.json":
        return _safetensors(files[0])
    if sorted(file.name for file in files) == sorted(_PARTS[:2]):
        for file in files:
            shutil.copyfile(file, into / file.name)
        _safetensors(into / "adapter_model.safetensors")
        return into
    told = ", ".join(file.name for file in files) or "nothing"
    raise UserError(
        told,
        "this is no adapter",
        "one .safetensors file; or a .zip of a PEFT folder; or its two files, adapter_config.json and "
        "adapter_model.safetensors, together",
    )


def _safetensors(path: Path) -> Path:
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() in _PICKLES:
        raise UserError(path.name, "this is a pickle, which can run code when it is read", "save it as safetensors")
    if path.suffix.lower() != ".safetensors":
        raise UserError(path.name, "this is no adapter file", f"adapters are {', '.join(ADAPTERS)}")
    with path.open("rb") as file:
        start = file.read(8)
    if zipfile.is_zipfile(path) or start[:1] == b"\x80":
        raise UserError(
            path.name, "a pickle or an archive is hidden under the name .safetensors", "it was not opened: delete it"
        )
    length = int.from_bytes(start, "little")
    if length > MOST_HEADER and length <= path.stat().st_size:
        raise UserError(path.name, f"its header of {length:,} bytes is no header of an adapter")
    try:
        with safe_open(path, framework="np") as content:
            content.keys()
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(path.name, "this is no safetensors file, or it is cut off", reason) from None
    return path


def _unpacked(path: Path, into: Path) -> Path:
    """The files of an adapter from an archive, whose sizes are checked before a byte is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check_archive(path.name, entries)
            wanted = [entry for entry in entries if PurePosixPath(entry.filename).name in _PARTS]
            if not wanted:
                pickles = [e.filename for e in entries if e.filename.lower().endswith(_PICKLES)]
                told = [f"it holds '{name}', a pickle, which can run code: save it as safetensors" for name in pickles]
                raise UserError(path.name, "there is no adapter in this archive", *told[:1] or ["zip the folder"])
            folders = {PurePosixPath(entry.filename).parent for entry in wanted}
            peft = all(PurePosixPath(entry.filename).name in _PARTS[:2] for entry in wanted)
            parts = peft and {folder.name for folder in folders} <= set(_FOLDERS)
            if len(folders) > 1 and not (parts and len({folder.parent for folder in folders}) == 1):
                raise UserError(path.name, "this archive holds several folders", "zip the folder of one adapter")
            for entry in wanted:
                name = PurePosixPath(entry.filename)
                to = into / (name.parent.name if parts else "") / name.name
                to.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, to.open("wb") as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(path.name, "this archive is damaged or no zip archive", reason) from None
    for file in into.rglob("*.safetensors"):
        _safetensors(file)
    return into


def _check_archive(name: str, entries: Sequence[zipfile.ZipInfo]) -> None:
    if len(entries) > MOST_ENTRIES:
        raise UserError(name, f"this archive holds {len(entries):,} files, an adapter has a few")
    total, packed = sum(e.file_size for e in entries), sum(e.compress_size for e in entries)
    if total > MOST_UNPACKED or total > MOST_RATIO * max(packed, 2**16):
        raise UserError(name, f"this archive would unpack to {total:,} bytes; it was not opened")
    for entry in entries:
        parts = PurePosixPath(entry.filename.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in entry.filename or entry.external_attr >> 28 == 0xA:
            raise UserError(name, f"this archive writes outside of its folder ('{entry.filename[:60]}')")


# --- files and network ------------------------------------------------------------------
def _there(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(path.name, "this upload is gone", "upload it again")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(path.name, f"{path.stat().st_size:,} bytes; this app takes {MOST_BYTES:,}")
    return path


def discard(paths: Sequence[str | Path], below: Path) -> None:
    """Delete uploads, and their folders where these are empty then.

    Args:
        paths: The uploads.
        below: The folder of temporary files; nothing outside of it is touched.
    """
    for path in (Path(path).resolve() for path in paths):
        if path.is_relative_to(below.resolve()):
            path.unlink(missing_ok=True)
            if path.parent != below.resolve() and path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()


_guard = {"hooked": False, "on": False}
_ASKED = ("getaddrinfo", "gethostbyname", "gethostbyaddr")  # events about a host alone
_SENT = {"connect": 1, "sendto": 1, "sendmsg": 1, "getnameinfo": 0}  # and those with an address, and which detail it is


def stay_on_this_machine(on: bool = True) -> None:
    """From now on no code of this process can look up or reach another machine; its own addresses stay reachable.

    An audit hook of the interpreter (PEP 578) refuses it: an upload that is really an address makes no request either.

    Args:
        on: False lifts it (tests; a hook cannot be removed).
    """
    _guard["on"] = on
    if not _guard["hooked"]:
        sys.addaudithook(_refuse_others)
        _guard["hooked"] = True


def _refuse_others(event: str, details: tuple[Any, ...]) -> None:
    module, _, name = event.partition(".")
    if not _guard["on"] or module != "socket" or name not in (*_ASKED, *_SENT):
        return
    address = details[_SENT.get(name, 0)]
    if name in _SENT and not isinstance(address, tuple):
        return  # a socket of the file system has a path, one that is connected no address
    if not is_local(address[0] if name in _SENT else address):
        raise PermissionError("apps make no request to other machines")


def is_local(host: Any) -> bool:
    """Whether a host name or address is this machine's own (nothing at all means "any of mine")."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        found = ipaddress.ip_address(str(name))
    except ValueError:
        return False
    return found.is_loopback or found.is_unspecified
