"""Three lines where jsonargparse prints sixty: where, what, and what was perhaps meant."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, get_type_hints

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    Parser = ArgumentParser
else:
    Parser = object

NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value type: |Not a valid subclass of|"
    r"Subclass types expect one of|a class path \(str\)|a dict with|Expected a <class 'NoneType'>"
)
DEBUG = "traceback: VISADAPT_DEBUG=1"
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
    sub: type
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


def refuse_null_groups(config: Any, where: str) -> None:
    """A class never runs without a group of options that it needs; jsonargparse would call it all the same.

    Args:
        config: ``class_path`` and ``init_args``, or None.
        where: Key of ``config``.

    Raises:
        UserError: One of the groups is null.
    """
    options = config.get("init_args") if config else None
    if options is None or None not in vars(options).values():
        return
    module, _, name = config["class_path"].rpartition(".")
    types: dict[str, Any] = {}
    for cls in reversed(getattr(import_module(module), name).__mro__[:-1]):
        types |= get_type_hints(cls.__init__)
    for key, value in vars(options).items():
        if value is None and isinstance(types.get(key), type) and is_dataclass(types[key]):
            known = ", ".join(field.name for field in fields(types[key]))
            raise UserError(f"{where}.{key}", f"{name} cannot do without it", f"leave it out, or give some of: {known}")


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
        return UserError(key, "there is no such key", close(key, known["options"]) or _beside(parent, known["options"]))
    if match := re.search(r"^the following arguments are required: (.+)", message):
        keys = re.sub(r"\b(fit|validate|test|predict)\.", "", match[1]).split(", ")
        are = "this is" if len(keys) == 1 else "these are"
        return UserError(
            ", ".join(keys), f"{are} required and missing", f"give --config FILE with it, or --{keys[0]} …"
        )
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
    owner = class_path.rpartition(".")[2]
    if match := re.search(r"Option '([^']+)' is not accepted", everything):
        return _unknown_option(where, match[1].split(".")[0], class_path, text)
    if match := re.search(r"following arguments are required: (.+)", text):
        key = f"{where}.{match[1]}"
        return UserError(key, f"{owner} requires it and it is missing", f"give it in the file or as --{key} …")
    if match := re.search(MISSING_FILE, everything):
        return UserError(where, f"there is no file '{match[1]}'", nearby(match[1]))
    if match := re.search(r"No module named '([^']+)'", everything):
        return UserError(where, f"there is no module '{match[1]}'", close(owner, known["classes"]))
    if match := re.search(r"Expected a dot import path string: (\S+)", everything):
        return UserError(where, f"there is no class '{match[1]}'", one_of(match[1], known["classes"]))
    if match := re.search(r"Importing '([^']+)' is not allowed", everything):
        return UserError(where, f"a configuration must not import '{match[1]}'")
    return _wrong_value(where, text, everything, given(text) or given(message))


MISSING_FILE = r"(?:Expected a path but|File does not exist:) '?([^\s']+\.(?:ya?ml|json))"


def _unknown_option(where: str, option: str, class_path: str, text: str) -> UserError:
    inner = re.search(r"Namespace\(class_path='([^']+)'", text)  # optimisers name their class here
    owner = inner[1] if inner else class_path
    options = options_of(owner)
    hint = one_of(option, options) if options else "say which class: class_path: …"
    return UserError(f"{where}.{option}", f"{owner.rpartition('.')[2] or 'this'} has no option '{option}'", hint)


def _wrong_value(where: str, text: str, everything: str, value: str) -> UserError:
    """A value of the wrong type, or none of those that are allowed."""
    got = f", got {value!r}" if value else ""
    choices = [c for group in re.findall(r"Expected a typing\.Literal\[(.+?)\]", everything) for c in _words(group)]
    if choices:
        hint = close(value, choices) if value else ""
        return UserError(where, f"expected one of {', '.join(choices)}{got}", hint)
    types = re.findall(r"Expected a <class '([\w.]+)'>", everything)
    if types:
        return UserError(where, f"expected {' or '.join(dict.fromkeys(types))}{got}")
    return UserError(where, " ".join(text.split())[:200])


def _words(group: str) -> list[str]:
    return [word.strip(" '\"") for word in group.split(",")]


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


def purposeful(error: BaseException) -> BaseException | None:
    """The error that visadapt raised itself, to tell the user something; its message is enough then.

    The innermost line of its traceback is a ``raise`` of ours. The error of a constructor arrives inside one
    of jsonargparse, which is looked through. Anything else may be a defect: None, show it whole.
    """
    ours = Path(__file__).resolve().parents[1]
    found: BaseException | None = error
    while found is not None:
        frames = traceback.extract_tb(found.__traceback__)
        last = frames[-1] if frames else None
        if last and Path(last.filename).is_relative_to(ours):
            return found if (last.line or "").startswith("raise ") else None
        if last is None or "jsonargparse" not in last.filename:
            return None
        found = found.__cause__ or found.__context__
    return None


def told(error: BaseException, place: Callable[[Sequence[str]], str]) -> UserError:
    """A `UserError` from the message of another error: it begins with a key, or ``place`` finds the key.

    Args:
        error: What `purposeful` returned.
        place: Finds the key that holds one of the values quoted in the message; empty if none does.
    """
    text = str(error.args[0] if error.args else error)
    head, _, rest = text.partition(": ")
    if rest and re.fullmatch(r"(model|data|trainer)(\.\w+)+", head):
        return UserError(head, rest, DEBUG)
    return UserError(place(re.findall(r"'([^']+)'", text)), text, DEBUG)


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
