"""What the apps share of Gradio: how errors are told, where files live, and a launch with its limits."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from apps import _safety
from visadapt.cli.errors import UserError, purposeful

WAITING = 16  # requests in the queue; more are told to come back
KEPT = 3600.0  # seconds that uploads and results are kept
_place: dict[str, Path] = {}


def gradio() -> Any:
    """The module, with analytics off and its uploads in the folder of this process.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", GRADIO_TEMP_DIR=str(temporary()))
    try:
        import gradio
    except ImportError as error:
        raise ImportError("apps need Gradio 6: pip install 'visadapt[apps]'") from error
    return gradio


def temporary() -> Path:
    """The folder for all uploads and results of this process; it is removed at its end."""
    if "folder" not in _place or not _place["folder"].is_dir():
        _place["folder"] = Path(tempfile.mkdtemp(prefix="visadapt-app-"))
        atexit.register(shutil.rmtree, _place["folder"], ignore_errors=True)
    return _place["folder"]


def workplace() -> Path:
    """A new folder for the results of one request; those of requests long ago are removed."""
    root = temporary() / "results"
    root.mkdir(exist_ok=True)
    for old in root.iterdir():
        if time.time() - old.stat().st_mtime > KEPT:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=root))


def examples() -> Path:
    """A new folder for what an app offers from its start on; it stays until the app stops."""
    root = temporary() / "examples"
    root.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(dir=root))


def told(handler: Callable[..., Any], uploads: Callable[..., Sequence[str]] = lambda *given: ()) -> Callable[..., Any]:
    """The handler with mistakes of the user as Gradio's message, whose uploads are deleted.

    Args:
        handler: Function of the app.
        uploads: Paths of the uploads among its arguments.
    """
    gr = gradio()

    @wraps(handler)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            if not isinstance(error, UserError) and purposeful(error) is None:
                raise
            offered = (temporary() / "examples").resolve()  # a visitor's mistake must not take these from the others
            given = [path for path in uploads(*args) if not Path(path).resolve().is_relative_to(offered)]
            _safety.discard(given, temporary())
            raise gr.Error(message(error), duration=None, print_exception=False) from None
        finally:  # gr.File leaves an empty file behind for each request
            for path in temporary().iterdir():
                if path.is_file() and path.stat().st_size == 0:
                    path.unlink(missing_ok=True)

    return guarded


def message(error: BaseException) -> str:
    """One line of where, what and what to do."""
    if not isinstance(error, UserError):
        return str(error)
    head = f"{error.where}: {error.what}" if error.where else error.what
    return f"{head}. {error.hint[:1].upper()}{error.hint[1:]}." if error.hint else f"{head}."


def one(path: str | None) -> list[str]:
    """The upload of an input for one file."""
    return [path] if path else []


def _blocked() -> list[str]:
    """The working directory; where results lie below it, as in /tmp, all else that it holds."""
    here = Path.cwd()
    if not temporary().resolve().is_relative_to(here):
        return [str(here)]
    return [str(path) for path in here.iterdir() if not temporary().resolve().is_relative_to(path.resolve())]


def launch(
    blocks: Any, port: int | None = None, auth: tuple[str, str] | None = None, block: bool = True
) -> tuple[Any, str]:
    """Serve an app on this machine alone.

    Args:
        blocks: What ``build`` gave.
        port: Port; None takes the first free one from 7860 on.
        auth: User and password that a visitor has to give.
        block: Wait until the server is stopped.

    Returns:
        The blocks, and the address.
    """
    gr = gradio()
    _safety.stay_on_this_machine()
    blocks.queue(max_size=WAITING, default_concurrency_limit=1)
    _, address, _ = blocks.launch(
        server_name="127.0.0.1", server_port=port, share=False, auth=auth, ssr_mode=False, prevent_thread_lock=True,
        max_file_size=_safety.MOST_BYTES, quiet=True, inbrowser=False, allowed_paths=[], blocked_paths=_blocked(),
        footer_links=[], theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        enable_monitoring=False, mcp_server=False, pwa=False, state_session_capacity=100,
    )  # fmt: skip
    if block:
        print(f"{blocks.title}: {address}  (this machine only; Ctrl+C stops it)", flush=True)
        blocks.block_thread()
    return blocks, address
