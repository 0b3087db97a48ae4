"""Configuration files before LightningCLI reads them: syntax, keys given twice, where a value stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from visadapt.cli.errors import UserError, nearby


def files(args: Sequence[str]) -> Iterator[str]:
    """Configuration files that a command line names."""
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in ("-c", "--config") and (equals or i + 1 < len(args)):
            yield value if equals else args[i + 1]


def check(file: str) -> None:
    """Raise a `UserError` that names file and line where ``file`` is no YAML mapping.

    Keys given twice are an error too: YAML readers keep the last one in silence.
    """
    if not Path(file).is_file():
        raise UserError("--config", f"there is no file '{file}'", nearby(file))
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(file, "this is not text in UTF-8", "give a YAML file, saved as UTF-8") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        lines = text.splitlines()
        marks = [mark.line for mark in (error.problem_mark, error.context_mark) if mark is not None]
        line = next((n for n in marks if n < len(lines)), len(lines) - 1)  # an open bracket shows at the end only
        source = lines[line].strip()
        raise UserError(
            f"{file}:{line + 1}", f"YAML syntax: {error.problem or 'unreadable'}", f"near: {source}"
        ) from None
    except yaml.reader.ReaderError as error:
        raise UserError(file, f"no YAML: {error.reason}", "give a YAML file, saved as UTF-8") from None
    if node is None:
        raise UserError(file, "the file is empty")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(file, "expected a mapping of keys to values (key: value)")
    for twice in _duplicates(node):
        raise UserError(f"{file}:{twice.start_mark.line + 1}", f"the key '{twice.value}' is given twice")


def _duplicates(node: Any) -> Iterator[Any]:
    """Key nodes of a YAML tree that repeat an earlier key of the same mapping."""
    seen: set[str] = set()
    for child in node.value if isinstance(node.value, list) else ():
        key, value = child if isinstance(child, tuple) else (None, child)
        if key is not None and isinstance(key.value, str):
            if key.value in seen:
                yield key
            seen.add(key.value)
        yield from _duplicates(value)


def where(quoted: Sequence[str], args: Sequence[str]) -> str:
    """Key under which the configuration gives one of the ``quoted`` values; empty if none does.

    So an error from deep inside, which knows a value but not its key, still names the key.
    """
    given: dict[str, str] = {}
    for file in files(args):
        given |= {key: value for key, value in _flat(yaml.safe_load(Path(file).read_text(encoding="utf-8")))}
    for arg in args:
        name, equals, value = arg.partition("=")
        if equals and name.startswith("--"):
            given[name.removeprefix("--")] = value
    for text in quoted:
        for key, value in given.items():
            if value == text:
                return key
    return ""


def _flat(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of a configuration as (key without ``init_args``, text)."""
    if isinstance(node, dict):
        for name, value in node.items():
            inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            yield from _flat(value, inner)
    elif isinstance(node, list):
        for value in node:
            yield from _flat(value, key)
    else:
        yield key, str(node)
