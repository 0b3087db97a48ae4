"""Each `visadapt …` line of the pages is one that the command line takes: options, configurations, classes."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from functools import cache, wraps

import pytest

from tests.docs import pages
from visadapt.cli import app, main, tools
from visadapt.cli.main import option

ANY_CONFIG = "configs/quickstart.yaml"  # stands for `-c …`, and for the config.yaml of a run `runs/…`
INCOMPLETE = re.compile(r"required and missing|expected at least one argument")  # which a mention in the text may be


class Ready(Exception):
    """The parser is made; nothing else of LightningCLI is wanted."""


@cache
def training_parser(command):
    """The parser of a training command, as `visadapt.cli.fit` makes it."""
    from visadapt.cli import fit

    class Front(fit.CLI):
        def parse_arguments(self, parser, args):
            raise Ready(parser)

    fit.import_plugins()
    before, sys.argv = sys.argv, ["visadapt", command]
    try:
        Front()
    except Ready as ready:
        return ready.args[0]
    finally:
        sys.argv = before


def parse_training(command, args):
    args = [
        ANY_CONFIG if before in ("-c", "--config") and "…" in arg else arg for before, arg in zip(["", *args], args)
    ]
    if option(args, "--backbone") is not None:
        args = main.with_run_config(command, args)
    elif command != "fit" and option(args, "-c", "--config") is None:
        args = ["--config", ANY_CONFIG, *args]
    training_parser(command).parse_args([command, *args])


def parse_tool(command, args):
    """Through `tools.run` itself, with the tool replaced by one that does nothing."""
    tool = tools.TOOLS[command]

    @wraps(tool)
    def nothing(**given):
        return 0

    tools.TOOLS[command] = nothing
    try:
        if tools.run(command, args) != 0:
            raise SystemExit(2)
    finally:
        tools.TOOLS[command] = tool


def parse_app(args):
    named = app.parser().parse_args(args).name
    if named is not None and named.islower() and named not in app.apps():
        raise SystemExit(f"there is no app '{named}'")


def parse(words):
    """Raise SystemExit unless the command line takes these words."""
    command, args = words[1], words[2:]
    if command.startswith("-"):
        known = ("--help", "--version", "-h", "-V")
        return None if command in known else sys.exit(f"visadapt has no option {command}")
    if command == "…":
        return None  # any of them
    if command not in main.COMMANDS:
        sys.exit(f"there is no command {command}")
    if not args or "--help" in args:
        return None  # a mention
    if command in main.TRAINING:
        return parse_training(command, args)
    if command in tools.TOOLS:
        return parse_tool(command, args)
    return parse_app(args) if command == "app" else None


def complaint(words):
    """What the command line says against these words; empty if nothing."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse(words)
    except SystemExit as exit:
        return f"{said.getvalue()}{exit.code if isinstance(exit.code, str) else ''}" or "refused"
    except app.UserError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(pages.ROOT)


WITH_COMMANDS = [page for page in pages.PAGES if any(pages.commands(page, "visadapt"))]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=pages.name)
def test_commands_parse(page):
    wrong = []
    for line, words, mention in pages.commands(page, "visadapt"):
        said = complaint(words)
        if said and not (mention and INCOMPLETE.search(said)):
            wrong.append(f"line {line}: {' '.join(words)}\n{said}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_modules_of_commands_exist(page):
    for line, words, _ in pages.commands(page, "python"):
        if words[1:2] == ["-m"] and words[2].partition(".")[0] in ("benchmarks", "configs", "visadapt"):
            place = pages.ROOT / words[2].replace(".", "/")
            assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), f"line {line}: {words[2]}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("visadapt fit --config configs/quickstart.yaml --data.rot photos", "rot"),
        ("visadapt fit --config configs/quickstrat.yaml", "quickstrat"),
        ("visadapt fit --config configs/quickstart.yaml --data ImageFoldr", "ImageFolder"),
        ("visadapt predict --adapter runs/…/adapter.safetensors --imags a", "imags"),
        ("visadapt export runs/…/adapter.safetensors --format onnx", "onnx"),
        ("visadapt merge a.safetensors --outputs b", "outputs"),
        ("visadapt app classfy --adapter a", "classfy"),
        ("visadapt fti --config configs/quickstart.yaml", "fti"),
    ],
)  # fmt: skip
def test_a_wrong_command_would_be_seen(line, said):
    (words,) = pages.split(line)
    assert said in complaint(words)


def test_commands_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\nSay `visadapt methods` or `visadapt`.\n\n```bash\nA=1 visadapt fit \\\n  --config x.yaml && "
        "visadapt test -c 'a b'  # why\npip install x\n```\n\n```python\nvisadapt fit\n```\n"
    )
    assert [words for _, words, _ in pages.commands(page, "visadapt")] == [
        ["visadapt", "fit", "--config", "x.yaml"], ["visadapt", "test", "-c", "a b"], ["visadapt", "methods"],
    ]  # fmt: skip
