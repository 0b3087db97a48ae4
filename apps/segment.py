"""Masks of maps and pictures: without prompts where a run has learnt that, by clicks and boxes in any case."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps import _runs, _safety, _server
from apps._masks import Automatic, Clicked, Found, box_of, examples, marked, scenes, smaller, uploaded, written
from visadapt.cli.errors import UserError
from visadapt.data.sheets import open_windows

AUTOMATIC, PROMPTED = ("AutomaticSegmentation", "SemanticSegmentation"), ("PromptedSegmentation",)
MODES = ("object", "background", "box")
COORDINATES = {
    "points": (3, "rows of x, y and 1 (object) or 0 (background)"),
    "box": (4, "left, top, right and bottom, in pixels"),
}  # what programs send -> numbers in a row, and their meaning


# --- handlers ---------------------------------------------------------------------------
def clicked(state: dict[str, Any] | None, x: int, y: int, mode: str) -> dict[str, Any]:
    """The state of a picture with one more click; the third corner of a box begins a new one.

    Raises:
        UserError: there is no picture.
    """
    if not state:
        raise UserError("", "there is no picture yet", "upload one, or choose an example")
    state = dict(state)
    if mode == "box":
        state["corners"] = [*(state["corners"] if len(state["corners"]) < 2 else []), (x, y)]
    else:
        state["points"] = [*state["points"], (x, y, int(mode == "object"))]
    return state


def opened(upload: str | None) -> dict[str, Any]:
    """A new state for an upload: as it is shown, without clicks.

    Raises:
        UserError: it is no picture.
    """
    path = uploaded(upload)
    with open_windows(path) as sheet:
        picture = sheet.read(0, 0, *sheet.size)
    shown = smaller(picture, np.zeros(picture.shape[:2], np.uint8))[0]
    return {"path": str(path), "picture": shown, "size": picture.shape[:2], "points": [], "corners": []}


def drawn(state: dict[str, Any]) -> Any:
    """The picture of a state with its clicks."""
    return marked(state["picture"], state["points"], state["corners"])


def cut_out(model: Clicked, state: dict[str, Any] | None, folder: Path) -> Found:
    """What the clicks and the box of a state mean, as a mask of the size that is shown and of the whole picture.

    Raises:
        UserError: there is no picture, or no click.
    """
    if not state:
        raise UserError("", "there is no picture yet", "upload one, or choose an example")
    box = box_of(state["corners"]) if len(state["corners"]) == 2 else None
    found = model.mask(state["picture"], state["points"], box)
    height, width = state["size"]
    rows, columns = (np.arange(n) * found.shape[i] // n for i, n in enumerate((height, width)))
    path = uploaded(state["path"])
    return written(path, iter([(0, found[rows][:, columns])]), model.names, folder)


# --- page -------------------------------------------------------------------------------
def build(adapters: Sequence[str | Path] = ()) -> Any:
    """The page: a tab for each way that the adapters can be used.

    Args:
        adapters: One adapter file of a segmentation; none takes the newest of the runs below ``runs/``.
    """
    gr = _server.gradio()
    files = _runs.given(adapters)
    for path in files:
        if _runs.task_name(path) not in (*AUTOMATIC, *PROMPTED, ""):
            raise UserError(str(path), f"this belongs to a {_runs.task_name(path)}, not to a segmentation")
    automatic = [p for p in files if _runs.task_name(p) in AUTOMATIC] or _runs.newest(AUTOMATIC) * (not files)
    prompted = [p for p in files if p not in automatic] or _runs.newest(PROMPTED) * (not files)
    sheets = examples(_server.examples())
    with gr.Blocks(title="visadapt segment", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown("# Segment")
        if automatic:
            with gr.Tab("Without prompts"):
                gr.Markdown(
                    f"Adapter `{_runs.told(automatic[0])}`. Pictures larger than the network are tiled, without seams."
                )
                _automatic_tab(gr, Automatic(automatic[0]), sheets)
        with gr.Tab("Clicks and boxes"):
            model = Clicked(prompted[0] if prompted else None)
            gr.Markdown(
                f"SAM `{model.base}`" + (f" with `{_runs.told(prompted[0])}`." if prompted else " as it is shipped.")
            )
            _clicked_tab(gr, model, [*scenes(sheets[0].parent), sheets[1]])
        if not automatic:
            gr.Markdown(
                "Masks without clicks: `visadapt fit --config configs/segmentation/railway_10shot.yaml` leaves an "
                "adapter in `runs/`."
            )
    return blocks


def _input(gr: Any, sheets: Sequence[Path], name: str) -> tuple[Any, Any]:
    upload = gr.File(label="Picture or map", file_types=_safety.PICTURES, type="filepath", height=110)
    gallery = gr.Gallery(
        [str(path) for path in sheets], label="Examples", columns=3, height=170, allow_preview=False, elem_id=name
    )
    return upload, gallery


def _outputs(gr: Any) -> tuple[Any, Any, Any, Any]:
    state = gr.State(None)
    overlay = gr.Image(
        label="Mask", interactive=False, format="png", elem_id="mask", buttons=["download", "fullscreen"]
    )
    opacity = gr.Slider(0, 1, 0.65, step=0.05, label="Opacity of the mask")
    files = gr.File(label="Download", interactive=False, file_count="multiple")

    def blend(found: Found | None, value: float) -> Any:
        return found.blended(value) if found else None

    opacity.release(blend, [state, opacity], overlay, api_visibility="private", show_progress="hidden")
    return state, overlay, opacity, files


def _automatic_tab(gr: Any, model: Automatic, sheets: Sequence[Path]) -> None:
    with gr.Row():
        with gr.Column():
            upload, gallery = _input(gr, sheets, "examples_automatic")
            scale = gr.Slider(0.25, 4, 1, step=0.25, label="Enlarge first (objects are larger or smaller here)")
            overlap = gr.Slider(0, 0.75, 0.25, step=0.05, label="Overlap of the tiles")
            go = gr.Button("Find", variant="primary")
        with gr.Column():
            state, overlay, opacity, files = _outputs(gr)
            note = gr.Markdown()

    def find(
        upload: str | None,
        scale: float,
        overlap: float,
        opacity: float,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:
        found = model.find(
            upload, scale, overlap, _server.workplace(), lambda n, total: progress((n, total), desc="tiles")
        )
        told = f"{found.share:.1%} of the pixels are {' or '.join(model.names[1:])}."
        return found, found.blended(opacity), [str(path) for path in found.files], told

    handler = _server.told(find, lambda path, *rest: _server.one(path))
    go.click(handler, [upload, scale, overlap, opacity], [state, overlay, files, note], api_name="segment")
    _choose(gr, gallery, sheets, upload)


def _clicked_tab(gr: Any, model: Clicked, sheets: Sequence[Path]) -> None:
    clicks = gr.State(None)
    with gr.Row():
        with gr.Column():
            upload, gallery = _input(gr, sheets, "examples_clicked")
            mode = gr.Radio(list(MODES), value="object", label="A click means", info="A box: two corners.")
            canvas = gr.Image(label="Click here", interactive=False, format="png", elem_id="canvas", buttons=[])
            clear = gr.Button("Clear clicks")
        with gr.Column():
            state, overlay, opacity, files = _outputs(gr)
    results = [clicks, canvas, state, overlay, files]

    def start(upload: str | None) -> Any:
        fresh = opened(upload) if upload else None
        return fresh, drawn(fresh) if fresh else None, None, None, None

    def click(clicks: Any, mode: str, opacity: float, event: gr.SelectData) -> Any:
        x, y = (round(v) for v in event.index)
        made = clicked(clicks, x, y, mode)
        if not made["points"] and len(made["corners"]) == 1:  # a box needs its other corner
            return made, drawn(made), None, None, None
        found = cut_out(model, made, _server.workplace())
        return made, drawn(made), found, found.blended(opacity), [str(path) for path in found.files]

    def forget(clicks: Any) -> Any:
        return start(clicks["path"] if clicks else None)

    def by_points(upload: str | None, points: Any, box: Any, opacity: float) -> Any:
        """Segment by clicks [[x, y, 1 or 0], …] and a box [left, top, right, bottom] or null."""
        made = opened(upload)
        made |= _coordinates(points, box)
        found = cut_out(model, made, _server.workplace())
        return found.blended(opacity), [str(path) for path in found.files]

    first = _server.told(start, lambda path: _server.one(path))
    upload.change(first, upload, results, api_visibility="private")
    canvas.select(_server.told(click), [clicks, mode, opacity], results, api_visibility="private")
    clear.click(_server.told(forget), clicks, results, api_visibility="private")
    numbers = [gr.JSON(visible=False, label=label) for label in ("points", "box")]  # for programs, not for people
    gr.Button(visible=False).click(
        _server.told(by_points, lambda path, *rest: _server.one(path)),
        [upload, *numbers, opacity], [overlay, files], api_name="coordinates",
    )  # fmt: skip
    _choose(gr, gallery, sheets, upload)


def _coordinates(points: Any, box: Any) -> dict[str, Any]:
    """Clicks and corners of what a program has sent, as the state of a picture has them."""
    corners = [corner for a, b, c, d in _numbers([box] if box else [], "box") for corner in ((a, b), (c, d))]
    return {"points": _numbers(points or [], "points"), "corners": corners}


def _numbers(rows: Any, name: str) -> list[Any]:
    """Rows of whole numbers that a program has sent.

    Args:
        rows: What it has sent.
        name: One of `COORDINATES`.

    Raises:
        UserError: they are something else.
    """
    width, wanted = COORDINATES[name]
    try:
        array = np.asarray(rows, dtype=np.int64).reshape(len(rows), width)
    except (TypeError, ValueError, OverflowError):
        raise UserError(name, f"this should be {wanted}") from None
    return [tuple(row) for row in array.tolist()]


def _choose(gr: Any, gallery: Any, sheets: Sequence[Path], upload: Any) -> None:
    def choose(event: gr.SelectData) -> str:
        return str(sheets[event.index])

    gallery.select(choose, None, upload, api_visibility="private")
