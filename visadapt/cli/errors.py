"""Three lines where jsonargparse prints sixty: where, what, and what was perhaps meant."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    Parser = ArgumentParser
else:
    Parser = object

NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value type: |Not a valid subclass of|"
    r"Subclass types expect one of|a class path \(str\)|a dict with|Expected a <class 'NoneType'>"
)
KEY = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)')
CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':\s*(?P<rest>.*)")


class UserError(Exception):
    """A mistake of the user that one message explains; the command line prints it without a traceback.

    Args:
        where: Key of the configuration, name of the file or option.
        what: What is wrong with it.
        hint: What to do.
    """

    def __init__(self, where: str, what: str, hint: str = "") -> None:
        super().__init__(where, what, hint)
        self.where, self.what, self.hint = where, what, hint

    def show(self, command: str, file: TextIO | None = None) -> None:
        """Print the error as `visadapt COMMAND: error at 'where'`, what, hint."""
        place = f" at '{self.where}'" if self.where else ""
        lines = [f"visadapt {command}: error{place}", *(f"  {x}" for x in (self.what, self.hint) if x)]
        print("\n".join(lines), file=file or sys.stderr)


def close(word: str, known: Iterable[str]) -> str:
    """``did you mean: x?`` for the known word nearest to ``word``, or an empty string."""
    known = sorted(set(known))
    lower = {k.lower(): k for k in known}
    match = get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f"did you mean: {lower[match[0]]}?" if match else ""


def one_of(word: str, known: Iterable[str], limit: int = 14) -> str:
    """`close`, else the known words themselves if they are few enough to print."""
    known = sorted(set(known))
    return close(word, known) or (f"known: {', '.join(known)}" if 0 < len(known) <= limit else "")


def subclasses(cls: type) -> Iterator[type]:
    """All subclasses of ``cls`` that are imported, at any depth."""
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def options_of(class_path: str) -> list[str]:
    """Names of the arguments of a class, with those of its bases where it passes ``**kwargs`` on."""
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    names: list[str] = []
    for base in cls.__mro__[:-1]:
        init = base.__dict__.get("__init__")
        if init is None:
            continue
        parameters = inspect.signature(init).parameters.values()
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [n for n in names if n != "self"]


def leaves(message: str) -> Iterator[tuple[list[str], str, str]]:
    """Each complaint of a nested message as (keys from the root, innermost class, text)."""
    stack: list[tuple[int, str, str]] = []  # (indentation, key, class)
    for line in message.splitlines():
        if not line.strip() or line.strip().startswith("Given value: "):
            continue
        indent = len(line) - len(line.lstrip(" -"))
        text = line.strip(" -")
        while stack and indent <= stack[-1][0]:
            stack.pop()
        if match := KEY.match(text):
            stack.append((indent, match["key"], ""))
            text = match["rest"]
        elif match := CLASS.match(text):
            stack.append((indent, "", match["path"]))
            text = match["rest"]
        if text and not NOISE.match(text):
            classes = [c for _, _, c in stack if c]
            yield [k for _, k, _ in stack if k], classes[-1] if classes else "", text


def given(message: str) -> str:
    """The value that a message complains about, if it is short enough to repeat."""
    found = re.findall(r"(?:Given|Got) value: (.*)", message)
    value = found[-1].strip() if found else ""
    return value if len(value) < 80 and "NestedArg" not in value else ""


def explain(message: str, known: dict[str, list[str]]) -> UserError:
    """Turn jsonargparse's message into one `UserError`.

    Args:
        message: Text of the exception.
        known: Words to suggest: ``options`` (flat keys of the parser) and ``classes`` (short names).
    """
    if match := re.search(r"(?:does not accept option|unrecognized arguments:) '?-*([\w.]+)", message):
        key = match[1]
        parent = key.rpartition(".")[0]
        return UserError(
            key, "there is no such key", close(key, known["options"]) or _beside(parent, known["options"])
        )
    if match := re.search(r"^the following arguments are required: (.+)", message):
        key = re.sub(r"\b(fit|validate|test|predict)\.", "", match[1])
        return UserError(key, "this is required and missing", f"give it in the configuration or as --{key} …")
    found = list(leaves(message))
    if not found:
        return UserError("configuration", message.strip().splitlines()[0])
    keys, class_path, text = max(found, key=lambda leaf: len(leaf[0]))
    same = [t for k, _, t in found if k == keys]
    return _leaf_error(".".join(keys) or "configuration", class_path, text, same, message, known)


def _leaf_error(
    where: str, class_path: str, text: str, same: list[str], message: str, known: dict[str, list[str]]
) -> UserError:
    """The error of one complaint; ``same`` are all complaints about the same key (members of a union)."""
    everything = "\n".join(same)
    if match := re.search(r"Option '([^']+)' is not accepted", everything):
        inner = re.search(r"Namespace\(class_path='([^']+)'", text)  # optimisers name their class here
        owner = inner[1] if inner else class_path
        option, options = match[1].split(".")[0], options_of(owner)
        name = owner.rpartition(".")[2] or "this"
        hint = one_of(option, options) if options else "say which class: class_path: …"
        return UserError(f"{where}.{option}", f"{name} has no option '{option}'", hint)
    if match := re.search(r"following arguments are required: (.+)", text):
        owner = class_path.rpartition(".")[2]
        return UserError(
            f"{where}.{match[1]}",
            f"{owner} requires it and it is missing",
            f"give it in the configuration or as --{where}.{match[1]} …",
        )
    if match := re.search(
        r"(?:Expected a path but|File does not exist:) '?([^\s']+\.(?:ya?ml|json))", everything
    ):
        return UserError(where, f"there is no file '{match[1]}'", nearby(match[1]))
    if match := re.search(r"No module named '([^']+)'", everything):
        return UserError(
            where, f"there is no module '{match[1]}'", close(class_path.split(".")[-1], known["classes"])
        )
    if match := re.search(r"Expected a dot import path string: (\S+)", everything):
        return UserError(where, f"there is no class '{match[1]}'", one_of(match[1], known["classes"]))
    if match := re.search(r"(?:File does not exist|Path .*): '?([^\s']+)", everything):
        return UserError(where, f"there is no file '{match[1]}'", nearby(match[1]))
    types = re.findall(r"Expected a <class '([\w.]+)'>", everything)
    if types:
        value = given(text) or given(message)
        got = f", got {value!r}" if value else ""
        return UserError(where, f"expected {' or '.join(dict.fromkeys(types))}{got}")
    return UserError(where, " ".join(text.split())[:200])


def _beside(parent: str, options: list[str]) -> str:
    """The keys of the group ``parent``, if they are few."""
    inside = [o.removeprefix(f"{parent}.") for o in options if parent and o.startswith(f"{parent}.")]
    return f"known: {', '.join(sorted(inside))}" if 0 < len(inside) <= 14 else ""


def nearby(file: str) -> str:
    """Hint for a file that is missing: the file of that folder with the nearest name."""
    folder = Path(file).parent
    if not folder.is_dir():
        return f"there is no folder '{folder}' either"
    match = get_close_matches(Path(file).name, [p.name for p in folder.iterdir()], n=1)
    return f"did you mean: {folder / match[0]}?" if match else ""


def check_yaml(file: str) -> None:
    """Raise a `UserError` that names file, line and column where ``file`` is no YAML mapping.

    Keys given twice are an error too: YAML readers keep the last one in silence.
    """
    import yaml

    if not Path(file).is_file():
        raise UserError("--config", f"there is no file '{file}'", nearby(file))
    text = Path(file).read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else 0
        source = text.splitlines()[line].strip() if line < len(text.splitlines()) else "end of the file"
        problem = error.problem or "is not YAML"
        raise UserError(f"{file}:{line + 1}", f"YAML syntax: {problem}", f"near: {source}") from None
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
        if key is not None and key.value in seen:
            yield key
        if key is not None:
            seen.add(key.value if isinstance(key.value, str) else repr(key.value))
        if value is not None:
            yield from _duplicates(value)


def purposeful(error: BaseException) -> bool:
    """True where visadapt raised ``error`` itself, to tell the user something; its message is enough then.

    The innermost line of the traceback is a ``raise`` of ours. Anything else may be a defect: show it whole.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(__file__).resolve().parents[1]
    return bool(
        frames
        and Path(frames[-1].filename).is_relative_to(ours)
        and (frames[-1].line or "").startswith("raise ")
    )


def fail(error: UserError, command: str) -> NoReturn:
    """Print the error and leave with status 2."""
    error.show(command)
    sys.exit(2)


class Friendly(Parser):
    """Mixin of a jsonargparse parser: mistakes are explained in three lines, exit status 2."""

    def classes(self) -> Iterator[str]:
        """Short names to suggest where a class is unknown."""
        return iter(())

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the explained message and exit; raise as jsonargparse does where it must not exit."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        known = {"options": [action.dest for action in parser._actions], "classes": list(self.classes())}
        command = parser.prog.replace("[options]", "").split()[1:]
        fail(explain(message, known), " ".join(command[:1]) or sys.argv[1])
