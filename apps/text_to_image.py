"""A prompt in, pictures out: the base against the adapted model on the same seeds, with adapters at strengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from apps import _prompting, _runs, _server
from apps._prompting import Wish
from apps._studio import Studio, comparable
from visadapt.backbones.sd_render import render
from visadapt.report import tiles
from visadapt.report.described import save_png

TASKS = ("TextToImage",)
MOST, OFFERED = 8, 4  # pictures of a request; runs whose newest adapters are offered
SIDE = 192  # pixels of a picture in the sheet
PROMPTS = [
    "a red star on bricks",
    "a blue circle on a yellow background",
    "a green heart on wood",
]  # of tiny_sd's world


def painted(studio: Studio, wish: Wish, folder: Path, size: Any = None) -> tuple[str, list[str], str]:
    """The sheet of base and adapted pictures, its file and those of the pictures, and what is to be said of them.

    Args:
        studio: The model.
        wish: What to render; its number is that of the pictures, of the seeds from the first one on.
        folder: Folder for the files.
        size: Side in pixels, or height and width; None is the base's own.
    """
    seeds = [wish.seed + i for i in range(wish.number)]

    def pictures(strengths: dict[str, float]) -> Tensor:
        with studio.acting(strengths) as model:
            found = render(
                model, [wish.prompt] * len(seeds), seeds, wish.steps, wish.guidance, size, wish.negative or None
            )
        return (found * 255).round().byte()

    rows = {"base": pictures({})} | ({"adapted": pictures(wish.strengths)} if wish.adapted else {})
    shown = [
        tiles.Tile(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()), title, f"seed {seed}")
        for title, found in rows.items()
        for seed, picture in zip(seeds, found, strict=True)
    ]
    sheet = folder / "base_and_adapted.png"
    tiles.save(tiles.sheet(shown, tiles.fitted(wish.prompt, 15, 600), len(seeds), SIDE), sheet)
    files = [str(sheet)]
    for title, found in rows.items():
        how = wish.how(studio) | ({"strengths": {}} if title == "base" else {})
        for seed, picture in zip(seeds, found, strict=True):
            files.append(str(folder / f"{title}_seed{seed}.png"))
            save_png(picture.permute(1, 2, 0).numpy(), Path(files[-1]), how | {"seed": seed})
    return str(sheet), files, "" if wish.adapted else "No adapter acts, so this is the base alone."


def chosen(adapters: Sequence[Path], base: str | None) -> tuple[Any, list[Path], list[Path]]:
    """Recipe of the base, the adapters to load, and those whose sliders start at 0.

    Without files: the newest that runs have left on one base; runs that trained the base itself are passed over.
    """
    if adapters:
        return _runs.diffusion(adapters, base), list(adapters), []
    newest = comparable(_runs.newest(TASKS))
    recipe = _runs.diffusion(newest, base)
    found = [path for path in newest if _runs.base_name(path) == recipe.name][:OFFERED]
    return recipe, found, found[1:]


def build(adapters: Sequence[str | Path] = (), base: str | None = None) -> Any:
    """The page.

    Args:
        adapters: Adapter files of one base, all at strength 1; none offers the newest of the runs below ``runs/``.
        base: A Stable Diffusion to put them on; None is that of the first adapter's run, or the shipped one.
    """
    gr = _server.gradio()
    recipe, files, resting = chosen(_runs.given(adapters), base)
    studio = Studio(recipe, files, resting)
    preview = _runs.options(files[0]).get("preview") or {} if files else {}
    settings = {"prompts": PROMPTS if recipe.name == "tiny_sd" else [], **preview}
    with gr.Blocks(title="visadapt text_to_image", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# Text to image\n{_prompting.about(studio, files, 'configs/text_to_image/subject.yaml')}")

        def outputs() -> list[Any]:
            sheet = gr.Image(
                label="Base and adapted, on the same seeds", interactive=False, format="png", elem_id="sheet",
                show_label=False, buttons=["download", "fullscreen"],
            )  # fmt: skip
            note = gr.Markdown(elem_id="note")
            download = gr.File(label="Download", interactive=False, file_count="multiple", elem_id="files", height=190)
            _prompting.certificates(gr, files)
            return [sheet, download, note]

        _prompting.form(
            gr, studio, settings, lambda: gr.Slider(1, MOST, 4, step=1, label="Pictures"), outputs,
            lambda wish: painted(studio, wish, _server.workplace(), preview.get("size")),
        )  # fmt: skip
    return blocks
