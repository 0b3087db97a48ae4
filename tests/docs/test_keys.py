"""Keys of configurations that the pages name exist; so do the messages that troubleshooting explains."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
import yaml
from jsonargparse import Namespace

from tests.docs import pages
from tests.docs.test_commands import training_parser

# Between them these configurations have every task, backbone and data module of the pages.
CONFIGS = [
    ["configs/classification/vit_b16_lora_folder.yaml"],
    ["configs/segmentation/vit_b_folder.yaml"],
    ["configs/text_to_image/folder.yaml"],
    ["configs/text_to_video/folder.yaml"],
    ["configs/class_incremental/imagenet_r.yaml"],
]
MORE = ["--data=HubImages", "--data.dataset=name"]
KEY = re.compile(r"(?:--)?((?:model|data|trainer)\.[a-z_.]+[a-z])(?:[ :=].*)?", re.DOTALL)


@cache
def known() -> frozenset[str]:
    """All keys without `init_args`, with the options of the named groups."""
    parser = training_parser("fit")
    found: set[str] = set()
    lines = [["--config", *names] for names in CONFIGS]
    for line in [*lines, ["--config", "configs/text_to_image/folder.yaml", *MORE]]:
        parsed: Namespace = parser.parse_args(["fit", *line])
        found |= {key.removeprefix("fit.").replace("init_args.", "") for key in parsed.keys(branches=True)}
    return frozenset(found)


def keys_of(page):
    for token, line in pages.inline(page):
        if token.type == "code_inline" and (match := KEY.fullmatch(token.content)):
            yield line, match[1]
    for block in pages.blocks(page):
        if block.language == "yaml":
            yield from ((block.line, key) for key in flat(yaml.safe_load(block.text)))


def flat(node, key=""):
    """Keys of a whole configuration; parts of one, which do not begin at the root, are left alone."""
    for name, value in node.items() if isinstance(node, dict) else ():
        here = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        if here.partition(".")[0] in ("model", "data", "trainer") and name not in ("init_args", "class_path"):
            yield here
        yield from flat(value, here)


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_keys_exist(page, monkeypatch):
    monkeypatch.chdir(pages.ROOT)
    wanted = list(keys_of(page))
    wrong = [f"line {line}: {key}" for line, key in wanted if key not in known()] if wanted else []
    assert not wrong, "\n".join(wrong)


@cache
def messages() -> list[str]:
    """Texts of the package's code; a `…` for each value that is filled in."""
    found = []
    for path in (pages.ROOT / "visadapt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted():
    """The message in the first cell of each row of the tables headed so."""
    page = pages.ROOT / "docs" / "troubleshooting.md"
    chosen = False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            chosen = False
        elif cells[0].startswith(("message", "symptom")):
            chosen = cells[0].startswith("message")
        elif chosen and (match := re.match(r"`(?P<text>.+)`", cells[0])):
            yield match["text"].partition("` at `")[0]


@pytest.mark.parametrize("message", quoted())
def test_messages_are_those_of_the_code(message):
    pattern = re.compile(".*".join(re.escape(part) for part in re.split("…", message)), re.DOTALL)
    assert any(pattern.search(text) for text in messages()), f"no code says: {message}"
