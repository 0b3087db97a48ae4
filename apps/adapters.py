"""Drop an adapter file: what it is, where it loads, how much it changes each layer; convert it and take it along."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from apps import _runs, _safety, _server
from apps._spectra import picture, spectra
from visadapt.cli import files
from visadapt.cli.errors import UserError, purposeful
from visadapt.cli.inspect import Description, describe

OWN = "visadapt"
FORMATS = (OWN, "peft", "diffusers", "kohya", "lycoris", "comfyui")
STATED = "the one that the file names"


# --- handlers ---------------------------------------------------------------------------
def looked_at(uploads: Sequence[str] | None, folder: Path) -> Description:
    """What an upload is.

    Raises:
        UserError: nothing was uploaded, or it is no adapter, or not what it claims.
    """
    if not uploads:
        raise UserError("", "there is no file yet", "drop one: visadapt, PEFT (.zip or both files), diffusers, kohya")
    path = _safety.adapter(uploads, folder)
    try:
        found = describe(path)
    except UserError as error:
        raise UserError(Path(uploads[0]).name, error.what, error.hint) from None
    except RecursionError:  # lists in lists in lists
        raise UserError(Path(uploads[0]).name, "its description is broken: no tool of ours wrote it so") from None
    if not found.tensors:
        raise UserError(Path(uploads[0]).name, "there is no tensor in it")
    return found


def facts(found: Description) -> list[list[str]]:
    """Rows of what a file is, for a table."""
    numbers = sum(tensor.size for tensor in found.tensors)
    rows = [["kind", found.kind], *([key.strip(), str(value)] for key, value in found.facts)]
    return [*rows, ["tensors", f"{len(found.tensors)}, {numbers:,} numbers"]]


def norms(found: Description) -> tuple[np.ndarray | None, str]:
    """Picture (h, w, 3) of norms and ranks, and what is to be said of it; no picture where no layer tells."""
    try:
        known, silent = spectra(found.path)
    except (KeyError, RuntimeError, TypeError, ValueError):
        return None, "The tensors of this file do not fit together, so there are no norms."
    note = f"{len(silent)} layers hold no factors whose product is ΔW; of them there is no norm." if silent else ""
    if not known:
        return None, note or "There are no factors in it, so no norms."
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(picture(known))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy(), note


def converted(found: Description, name: str, format: str, base: str, rank: int, folder: Path) -> tuple[Path, str]:
    """The adapter in another format, and what the conversion says of itself.

    Args:
        found: What was uploaded.
        name: Name of the upload, for that of the result.
        format: One of `FORMATS`.
        base: One of the shipped bases, or `STATED`.
        rank: Rank of the SVD for what the format cannot hold exactly; 0 refuses that.
        folder: Folder for the result.

    Raises:
        UserError: the base is not known, or the format cannot hold the adapter.
    """
    if format not in FORMATS or base not in (STATED, *_runs.BASES):
        raise UserError("", f"there is no format '{format}' or no base '{base}'")
    chosen = _runs.base_of(found.path) if base == STATED else base
    if chosen is None:  # a file of a run has its base beside it, an upload has not
        raise UserError(name, "it does not name its base", "choose one")
    single = format in ("kohya", "lycoris", "comfyui", OWN)
    output = folder / f"{Path(name).stem}_{format}{'.safetensors' if single else ''}"
    told = io.StringIO()
    try:
        with redirect_stdout(told), warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always", UserWarning)
            if format == OWN:
                files.import_file(found.path, output, None, chosen, None)
            else:
                files.export_file(found.path, output, format, rank or None, 1e-4, None, chosen, None)  # type: ignore[arg-type]
    except UserError:
        raise
    except Exception as error:
        if purposeful(error) is None:
            raise
        raise UserError(name, str(error).replace(f"{found.path}", name)) from None
    lines = [line for line in told.getvalue().splitlines() if not line.startswith("load it:")]
    lines += [str(w.message) for w in noted if issubclass(w.category, UserWarning)]
    if output.is_dir():
        output = Path(shutil.make_archive(str(output), "zip", output))
    text = "\n".join(lines).replace(f"{folder}/", "").replace(str(found.path), name)
    return output, text


# --- page -------------------------------------------------------------------------------
def build(adapters: Sequence[str | Path] = ()) -> Any:
    """The page.

    Args:
        adapters: A file that is there from the start; none takes the newest of the runs below ``runs/``.
    """
    gr = _server.gradio()
    samples = _samples(_runs.given(adapters) or _runs.newest(("Classification",))[:1])
    with gr.Blocks(title="visadapt adapters", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown("# Adapters\nWhat a file is, where it loads, how much it changes. Nothing in a file is ever run.")
        with gr.Row():
            with gr.Column():
                upload = gr.File(
                    label="Adapter file, zipped PEFT folder, or its two files", file_count="multiple",
                    file_types=_safety.ADAPTERS, type="filepath", height=130,
                )  # fmt: skip
                sample = gr.Button("Take the adapter of the last run", visible=bool(samples), elem_id="sample")
                go = gr.Button("Inspect", variant="primary")
                gr.Markdown("### Convert")
                format = gr.Radio(list(FORMATS), value="peft", label="Format")
                base = gr.Radio([STATED, *_runs.BASES], value=STATED, label="Base")
                rank = gr.Slider(0, 128, 0, step=1, label="Rank of the SVD, where it is not exact (0: refuse)")
                change = gr.Button("Convert")
            with gr.Column(scale=2):
                table = gr.Dataframe(
                    headers=["what", "value"],
                    interactive=False,
                    wrap=True,
                    elem_id="facts",
                    column_widths=["25%", "75%"],
                )
                image = gr.Image(
                    label="Norm and ranks",
                    interactive=False,
                    format="png",
                    elem_id="norms",
                    buttons=["download", "fullscreen"],
                )
                note = gr.Markdown(elem_id="note")
                result = gr.File(label="Download", interactive=False, elem_id="result")
        _wire(gr, upload, go, change, [format, base, rank], table, image, note, result)
        upload.keep_in_cache.update(map(str, samples))  # else Gradio deletes it an hour after it was taken
        if samples:
            sample.click(lambda: [str(path) for path in samples], None, upload, api_visibility="private")
    return blocks


def _samples(adapters: Sequence[Path]) -> list[Path]:
    """A copy of the first adapter where Gradio may serve it; empty without one."""
    if not adapters:
        return []
    if adapters[0].is_dir():
        to = Path(shutil.make_archive(str(_server.examples() / adapters[0].name), "zip", adapters[0]))
    else:
        to = _server.examples() / adapters[0].name
        shutil.copyfile(adapters[0], to)
    return [to]


def _wire(
    gr: Any, upload: Any, go: Any, change: Any, options: list[Any], table: Any, image: Any, note: Any, result: Any
) -> None:
    def inspect(uploads: list[str] | None) -> Any:
        found = looked_at(uploads, _server.workplace())
        shown, told = norms(found)
        return facts(found), shown, told

    def convert(uploads: list[str] | None, format: str, base: str, rank: float) -> Any:
        folder = _server.workplace()
        found = looked_at(uploads, _server.workplace())
        names = [Path(path).name for path in uploads or ()]
        output, text = converted(found, names[0], format, base, int(rank), folder)
        return str(output), f"```\n{text}\n```"

    inputs = [upload, *options]
    go.click(_server.told(inspect, _of), upload, [table, image, note], api_name="inspect")
    upload.upload(_server.told(inspect, _of), upload, [table, image, note], api_visibility="private")
    change.click(_server.told(convert, _of), inputs, [result, note], api_name="convert")


def _of(uploads: list[str] | None, *rest: Any) -> list[str]:
    return list(uploads or ())
