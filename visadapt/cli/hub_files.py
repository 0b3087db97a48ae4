"""What of a run, an export or a repository goes over the wire: adapters as safetensors, and what tells of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from visadapt.cli.errors import UserError
from visadapt.cli.inspect import Description, describe
from visadapt.report.card import PICTURES
from visadapt.report.facts import FILE

CARD, CONFIG, CERTIFICATE, RUN = "README.md", "config.yaml", "certificate.json", FILE
PEFT = ("adapter_config.json", "adapter_model.safetensors")
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # folders of a diffusion model's PEFT folders
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TEXTS = (CARD, CONFIG, RUN, CERTIFICATE, PEFT[0])
_NO_ADAPTER = ("no adapter", "full checkpoint")
# An absolute path in a text, but no part of an address: a published file tells nobody how a machine is laid out.
_PLACE = re.compile(r"(?<![\w.:/~-])~?/(?:[\w.@+-]+/)+(?=[\w.@+-])")
_OURS = re.compile(r"(?:visadapt|torch\.optim|lightning\.pytorch)\.[\w.]+|\w+")  # or a short name, of what is imported
_TRAINER = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")


@dataclass
class Bundle:
    """Files to send.

    Attributes:
        name: What the adapter is called.
        files: Path in the repository -> content, or a file with it.
        adapters: Path in the repository -> what that adapter is; "" is a PEFT folder itself.
        card: The model card that lies beside the adapter; empty without one.
        left: Names of what is there and not sent.
        shortened: Whether paths of this machine were cut to their last name.
    """

    name: str
    files: dict[str, Path | bytes] = field(default_factory=dict)
    adapters: dict[str, Description] = field(default_factory=dict)
    card: str = ""
    left: list[str] = field(default_factory=list)
    shortened: bool = False

    def add(self, name: str, path: Path) -> None:
        """A file, without the paths of this machine that it names."""
        if name.endswith(".safetensors"):
            content = _without_places_in_header(path)
        elif PurePosixPath(name).name in _TEXTS or name.endswith(f".{CERTIFICATE}"):
            text = path.read_text(encoding="utf-8")
            content = short.encode() if (short := without_places(text)) != text else None
        else:
            content = None
        self.shortened |= content is not None
        self.files[name] = path if content is None else content


def size(content: Path | bytes) -> int:
    """Bytes of a file to send."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def without_places(text: str) -> str:
    """A text whose absolute paths are cut to their last name."""
    return _PLACE.sub("", text)


def _without_places_in_header(path: Path) -> bytes | None:
    """The bytes of a safetensors file whose metadata name no path of this machine; None if they do not anyway."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    held = header.get("__metadata__", {})
    short = {key: without_places(value) for key, value in held.items()}
    if short == held:
        return None
    text = json.dumps(header | {"__metadata__": short}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


# --- to send ----------------------------------------------------------------------------
def collect(place: Path) -> Bundle:
    """The adapters of a folder or one file, with the card, the figures and the pictures that lie beside them.

    Raises:
        UserError: There is no adapter, or one is a pickle, whole weights, or broken.
    """
    folder = place if place.is_dir() else place.parent
    run = (folder / RUN).is_file()
    name = folder.resolve().parent.name if run else place.resolve().stem
    found = Bundle(name)
    _add_adapters(found, place)
    if not found.adapters:
        pickles = [p.name for p in folder.iterdir() if p.suffix in PICKLES] if place.is_dir() else [place.name]
        told = f"'{pickles[0]}' is a pickle, which can run code: save it as safetensors" if pickles else ""
        raise UserError(
            str(place), "there is no adapter in it", told or "give a run, an export, or a .safetensors file"
        )
    single = [place.with_suffix(f".{CERTIFICATE}")] if place.is_file() else []
    beside = [*single, *(folder / name for name in (RUN, CONFIG, CERTIFICATE, *PICTURES))]
    for path in beside if run or place.is_dir() else single:
        if path.is_file():
            found.add(path.name, path)
    if (folder / CARD).is_file() and (run or place.is_dir()):
        text = (folder / CARD).read_text(encoding="utf-8")
        found.card = without_places(text)
        found.shortened |= found.card != text
    if place.is_dir():
        sent = {PurePosixPath(name).parts[0] for name in found.files} | {CARD}
        found.left = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if p.name not in sent)
    return found


def _add_adapters(found: Bundle, place: Path) -> None:
    """The adapters of a folder, or the one file."""
    if place.is_file():
        if place.suffix != ".safetensors":
            return
        found.adapters[place.name] = _adapter(place)
        found.add(place.name, place)
        return
    peft = [part for part in ("", *PARTS) if (place / part / PEFT[0]).is_file()]
    if peft:
        found.adapters[""] = describe(place)
        for part in peft:
            for name in PEFT:
                if not (path := place / part / name).is_file():
                    raise UserError(str(path), "this PEFT folder is not whole: the file is missing")
                found.add(f"{part}/{name}".lstrip("/"), path)
    for path in sorted(place.glob("*.safetensors")):
        if path.name not in found.files and not any(sign in describe(path).kind for sign in _NO_ADAPTER):
            found.adapters[path.name] = describe(path)
            found.add(path.name, path)


def _adapter(path: Path) -> Description:
    """What an adapter file is.

    Raises:
        UserError: It is broken, or holds whole weights.
    """
    known = describe(path)
    if any(sign in known.kind for sign in _NO_ADAPTER):
        raise UserError(str(path), f"this is no adapter but {known.kind}")
    return known


# --- to take ----------------------------------------------------------------------------
def wanted(names: Iterable[str], repo: str) -> list[str]:
    """The files of a repository to take: adapters as safetensors, and known files that tell of them.

    Raises:
        UserError: It has none, or pickles in their place.
    """
    names = list(names)
    known = {*_TEXTS, *PICTURES, *(f"{part}/{name}" for part in PARTS for name in PEFT)}
    alone = re.compile(r"[\w][\w .+@-]*\.(?:safetensors|certificate\.json)")
    found = [name for name in names if name in known or alone.fullmatch(name)]
    if any(name.endswith(".safetensors") for name in found):
        return found
    if "model_index.json" in names:
        raise UserError(repo, "this is a whole pipeline, no adapter", f"as a base: --model.backbone.name {repo}")
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise UserError(repo, f"its weights are pickles ('{pickles[0]}'), which can run code", "ask for safetensors")
    raise UserError(repo, "there is no adapter in it: no .safetensors file", "is it the right repository?")


def check_taken(folder: Path) -> list[Description]:
    """What was taken, adapter by adapter; its configuration is cut down to what can name classes of ours alone.

    Raises:
        UserError: A file is broken or holds whole weights.
    """
    peft = (folder / PEFT[0]).is_file() or any((folder / part / PEFT[0]).is_file() for part in PARTS)
    found = [describe(folder)] if peft else []
    found += [_adapter(path) for path in sorted(folder.glob("*.safetensors")) if path.name != PEFT[1] or not peft]
    if (folder / CONFIG).is_file():
        safe = safe_config((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(safe, encoding="utf-8") if safe else (folder / CONFIG).unlink()
    return found


def safe_config(text: str) -> str:
    """The parts of a stranger's configuration that say model and data; empty if they name code that is not known.

    ``visadapt predict`` builds what the configuration beside an adapter names, so a class from elsewhere, or a
    callback that writes files, must not come with it.
    """
    import yaml

    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        return ""
    if not isinstance(given, dict) or not isinstance(given.get("model"), dict) or not _known(given.get("model")):
        return ""
    kept: dict[str, Any] = {key: given[key] for key in ("seed_everything", "model") if key in given}
    (kept["model"].get("init_args") or kept["model"]).pop("start", None)  # a file that is not here
    if isinstance(given.get("data"), dict) and _known(given["data"]):
        kept["data"] = given["data"]
    trainer = given["trainer"] if isinstance(given.get("trainer"), dict) else {}
    plain = {key: trainer[key] for key in _TRAINER if isinstance(trainer.get(key), int | float | str)}
    return str(yaml.safe_dump(kept | ({"trainer": plain} if plain else {}), sort_keys=False, allow_unicode=True))


def _known(value: Any) -> bool:
    """Whether all code that a part of a configuration names is ours, torch's optimisers or Lightning's."""
    if isinstance(value, dict):
        named = [value[key] for key in ("class_path", "optimizer") if isinstance(value.get(key), str)]
        return all(_OURS.fullmatch(name) for name in named) and all(map(_known, value.values()))
    return all(map(_known, value)) if isinstance(value, list) else True
