"""``visadapt app NAME``: start a demo of the folder ``apps/``, which the repository has and the package has not."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from visadapt.cli.errors import UserError, close, purposeful, told

ROOT = Path(__file__).resolve().parents[2]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("", message, "visadapt app --help says what it takes")


def parser() -> argparse.ArgumentParser:
    """The options of ``visadapt app``."""
    made = _Parser(prog="visadapt app", description="Start a demo in the browser; without NAME, list them.")
    made.add_argument("name", nargs="?", metavar="NAME", help="Which one.")
    made.add_argument(
        "--adapter", nargs="+", action="extend", default=[], metavar="FILE",
        help="Adapter files or folders of runs (default: the newest that runs have left below runs/).",
    )  # fmt: skip
    made.add_argument(
        "--base", metavar="BASE",
        help="Base of a diffusion model: a pipeline's folder, a single file or a hub id (default: as the adapter's run "
        "says, or the shipped one).",
    )  # fmt: skip
    made.add_argument("--port", type=int, help="Port (default: the first free one from 7860 on).")
    made.add_argument("--auth", metavar="USER:PASSWORD", help="What a visitor has to give.")
    return made


def apps() -> dict[str, str]:
    """Names of the apps and what they show.

    Raises:
        UserError: there is no folder of apps beside the package.
    """
    if not (ROOT / "apps" / "__init__.py").is_file():
        raise UserError(
            "apps",
            "the apps are in the repository of visadapt, and this installation has the package alone",
            "clone the repository and install it there: pip install -e '.[apps]'",
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    package: Any = import_module("apps")
    if Path(package.__file__).resolve().parent != ROOT / "apps":
        raise UserError("apps", f"another package has this name: '{package.__file__}'", f"run it in {ROOT}")
    found: dict[str, str] = package.APPS
    return found


def run(args: list[str]) -> int:
    """Start the app that the arguments name, or list them; 2 after the one message of a mistake."""
    try:
        options = parser().parse_args(args)
        known = apps()
        if options.name is None:
            width = max(map(len, known)) + 2
            print("\n".join(["usage: visadapt app NAME", "", *(f"  {n:<{width}}{t}" for n, t in known.items())]))
            return 0
        if options.name not in known:
            hint = close(options.name, known) or f"there are: {', '.join(known)}"
            raise UserError(options.name, "there is no such app", hint)
        user, colon, password = (options.auth or "").partition(":")
        if options.auth is not None and not (user and colon and password):
            raise UserError("--auth", "this should be USER:PASSWORD")
        _start(options.name, options.adapter, options.base, options.port, (user, password) if user else None)
    except UserError as error:
        error.show("app")
    except Exception as error:
        ours = purposeful(error)
        if os.environ.get("VISADAPT_DEBUG", "") not in ("", "0") or ours is None:
            raise
        told(ours, lambda quoted: "").show("app")
    else:
        return 0
    return 2


def _start(
    name: str, adapters: list[str], base: str | None, port: int | None, auth: tuple[str, str] | None
) -> None:  # fmt: skip
    server: Any = import_module("apps._server")
    try:
        server.gradio()
    except ImportError as error:
        raise UserError("gradio", str(error)) from None
    build = import_module(f"apps.{name}").build
    if base is not None and "base" not in signature(build).parameters:
        raise UserError("--base", f"the app '{name}' takes none", "the run of its adapter says which base it has")
    blocks = build(adapters) if base is None else build(adapters, base)
    try:
        server.launch(blocks, port, auth)
    except OSError as error:  # Gradio's, where the port is taken
        raise UserError("--port", " ".join(str(error).split())) from None
