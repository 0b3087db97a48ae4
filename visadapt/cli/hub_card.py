"""The model card of a repository: the one that a run or an export has written, with what the Hub wants beside it."""

from __future__ import annotations

import json
import re
from typing import Any

from visadapt.cli.hub_files import CONFIG, PARTS, PEFT, RUN, Bundle, without_places
from visadapt.cli.inspect import Description
from visadapt.report.card import PICTURES, table

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_START, _END = "<!-- hub -->", "<!-- /hub -->"
NO_LICENCE = "no licence: without one nobody may use it; --license apache-2.0, or another id of the Hub"


def model_card(bundle: Bundle, repo: str, licence: str | None) -> tuple[str, list[str]]:
    """Text of README.md for a repository, and what is to be said of it.

    The card that lies beside the adapter is kept, a new one says what the file itself does; added are the header
    (licence, library, base), the data of the run's configuration and how to load it from the Hub.

    Args:
        bundle: What is sent.
        repo: owner/name.
        licence: Its id on the Hub; None keeps what the card says.
    """
    from huggingface_hub import ModelCard

    card: Any = ModelCard(bundle.card or _new(bundle))
    data, notes = card.data, []
    if licence is not None:
        data["license"] = licence
    elif not data.get("license"):
        notes.append(NO_LICENCE)
    base = str(data.get("base_model") or "")
    if not HUB_ID.fullmatch(base):  # the Hub refuses names that are no repositories
        data.pop("base_model", None)
    data["library_name"] = data.get("library_name") or _library(bundle)
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), "visadapt"]))
    order = ["license", "base_model", "library_name", "pipeline_tag", "tags"]
    card._original_order = [key for key in order if data.get(key)]
    body = card.text.partition(_START)
    text = body[0].rstrip("\n") + "\n" + body[2].partition(_END)[2].rstrip("\n")
    section = "\n".join([_START, *_data(bundle), "## Load it from the Hub", "", *_usage(bundle, repo), _END])
    card.text = f"{text.rstrip()}\n\n{section}\n"
    return f"{str(card).rstrip()}\n", notes


def _library(bundle: Bundle) -> str:
    kinds = [known.kind for known in bundle.adapters.values()]
    if any(kind.startswith("visadapt") for kind in kinds):
        return "visadapt"
    return "peft" if any(kind.startswith("PEFT") for kind in kinds) else "diffusers"


def _new(bundle: Bundle) -> str:
    """A card of what the files themselves say."""
    base = next((value for known in bundle.adapters.values() for key, value in known.facts if "base" in key), "")
    name = without_places(base).partition("  ")[0]
    lines = ["---", *([f"base_model: {name}"] if HUB_ID.fullmatch(name) else []), "tags: [visadapt]", "---"]
    lines += [f"# {bundle.name}", ""]
    for file, known in bundle.adapters.items():
        rows = [(key.strip(), f"`{without_places(value)}`") for key, value in known.facts]
        numbers = sum(tensor.size for tensor in known.tensors)
        rows.append(("tensors", f"{len(known.tensors)}, {numbers:,} numbers"))
        lines += [f"`{file or PEFT[1]}`: {known.kind}.", "", *table(("", ""), rows), ""]
    for picture in (name for name in PICTURES if name in bundle.files):
        lines += [f"![{PICTURES[picture]}]({picture})", ""]
    return "\n".join(lines)


def _data(bundle: Bundle) -> list[str]:
    """What the adapter was trained on, as the run's configuration says it; options that are places are left out."""
    held = bundle.files.get(CONFIG)
    if held is None:
        return []
    import yaml

    text = held.decode() if isinstance(held, bytes) else held.read_text(encoding="utf-8")
    found = (yaml.safe_load(text) or {}).get("data") or {}
    if not found.get("class_path"):
        return []
    options = found.get("init_args") or {}
    plain = {k: v for k, v in options.items() if isinstance(v, bool | int | float | str) and k != "cache"}
    listed = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in plain.items())
    return ["## Data", "", f"`{found['class_path'].rpartition('.')[2]}({listed})`", ""]


def _usage(bundle: Bundle, repo: str) -> list[str]:
    """Commands and code that load each kind of file that is there."""
    folder = repo.rpartition("/")[2]
    shell, python = [f"visadapt pull {repo}"], []
    for file, known in bundle.adapters.items():
        facts = dict(known.facts)
        if known.kind.startswith("visadapt"):
            shell += _ours(bundle, known, f"{folder}/{file}")
            python.append(f'va.load(model, "{folder}/{file}")  # model: the base, {without_places(facts["base"])}')
        elif file == "":
            parts = [part for part in PARTS if f"{part}/{PEFT[0]}" in bundle.files]
            python += [f'PeftModel.from_pretrained(pipe.{p}, "{repo}", subfolder="{p}")' for p in parts]
            python += [] if parts else [f'model = PeftModel.from_pretrained(model, "{repo}")']
        elif known.kind == "textual inversion":
            python.append(f'pipe.load_textual_inversion("{repo}", weight_name="{file}")')
        elif facts.get("diffusers", "").startswith("loads"):
            python.append(f'pipe.load_lora_weights("{repo}", weight_name="{file}")')
        if not known.kind.startswith("visadapt") and "loads" in facts.get("visadapt", facts.get("loads in", "")):
            where = f"{folder}/{file}".rstrip("/")
            shell.append(f"visadapt import {where} --output adapter.safetensors --backbone BASE")
    heads = {"va.": "import visadapt as va", "PeftModel": "from peft import PeftModel"}
    head = [text for sign, text in heads.items() if any(sign in line for line in python)]
    code = ["", "```python", *head, *([""] if head else []), *python, "```"] if python else []
    return ["```bash", *shell, "```", *code]


def _ours(bundle: Bundle, known: Description, file: str) -> list[str]:
    """Commands for an adapter of visadapt, by the kind of its run, else by the layers that it is on."""
    base = "" if CONFIG in bundle.files else " --backbone BASE"
    kind = _kind(bundle, known)
    if kind in ("pictures", "videos"):
        found = [f'visadapt predict --adapter {file} --prompts "a prompt" --seeds 0 1 2{base}']
        use = "AnimateDiffPipeline: pipe" if kind == "videos" else "diffusers: pipe"
        export = f'--format diffusers --output lora{base}   # {use}.load_lora_weights("lora")'
    else:
        found = [f"visadapt predict --adapter {file} --images FOLDER"] if CONFIG in bundle.files else []
        export = f'--output peft{base}   # PEFT: PeftModel.from_pretrained(model, "peft")'
    return [*found, f"visadapt export {file} {export}"]


def _kind(bundle: Bundle, known: Description) -> str:
    held = bundle.files.get(RUN)
    if held is not None:
        return str(json.loads(held if isinstance(held, bytes) else held.read_bytes()).get("kind", ""))
    names = [tensor.name for tensor in known.tensors]
    if any("motion_modules" in name for name in names):
        return "videos"
    return "pictures" if any(name.startswith(("unet.", "text_encoder")) for name in names) else ""
