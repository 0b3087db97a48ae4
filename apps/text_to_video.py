"""A prompt in, a clip out: the base beside a motion and an appearance, each with its strength."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from apps import _prompting, _runs, _server
from apps._prompting import Wish
from apps._studio import Studio, comparable
from visadapt.backbones.video_render import render
from visadapt.report import tiles
from visadapt.report.animation import save_gif, save_webp
from visadapt.report.clip_renders import ClipReport

TASKS, APPEARANCES = ("TextToVideo",), ("TextToImage",)
SIDE = 288  # pixels of a clip on the page
MOST = 81  # frames of a request


def filmed(studio: Studio, wish: Wish, folder: Path, size: Any = None) -> tuple[str, list[str], str]:
    """The animation of the base beside the adapted clip, the files of the clips, and what is to be said of them.

    A clip is written as GIF, as animated WebP, which says how it was made, and as MP4 where PyAV is.

    Args:
        studio: The model.
        wish: What to render; its number is that of the frames.
        folder: Folder for the files.
        size: Side in pixels, or height and width; None is the base's own.
    """

    def clip(strengths: dict[str, float]) -> Tensor:
        with studio.acting(strengths) as model:
            found = render(
                model, [wish.prompt], [wish.seed], wish.number, wish.steps, wish.guidance, size,
                negative=wish.negative or None,
            )  # fmt: skip
        return (found[0] * 255).round().byte()

    rows = {"base": clip({})} | ({"adapted": clip(wish.strengths)} if wish.adapted else {})
    fps, files, report = float(studio.model.fps), [], ClipReport(str(folder))
    shown = folder / "base_and_adapted.webp"
    save_webp(beside({title: frames_of(found) for title, found in rows.items()}), shown, fps)
    for title, found in rows.items():
        path = folder / f"{title}_seed{wish.seed}.webp"
        how = wish.how(studio) | ({"strengths": {}} if title == "base" else {})
        report.save(found, path, how | {"seed": wish.seed, "frames": len(found), "fps": fps})
        save_gif(frames_of(found), path.with_suffix(".gif"), fps)
        files += [str(file) for file in map(path.with_suffix, (".gif", ".mp4", ".webp")) if file.is_file()]
    return str(shown), files, "" if wish.adapted else "No adapter acts, so this is the base alone."


def frames_of(clip: Tensor) -> list[Image.Image]:
    """Frames of bytes (F, 3, H, W)."""
    return [Image.fromarray(np.ascontiguousarray(frame)) for frame in clip.permute(0, 2, 3, 1).numpy()]


def beside(clips: dict[str, list[Image.Image]]) -> list[Image.Image]:
    """Frames of clips of one length beside each other, each below its title."""
    sheets = []
    for number in range(len(next(iter(clips.values())))):
        sheet = Image.new("RGB", (len(clips) * (SIDE + tiles.GAP) + tiles.GAP, SIDE + 40), "white")
        draw = ImageDraw.Draw(sheet)
        for column, (title, frames) in enumerate(clips.items()):
            left = tiles.GAP + column * (SIDE + tiles.GAP)
            draw.text((left + SIDE / 2, 6), title, tiles.INK, tiles.font(15), anchor="ma")
            small = tiles.scaled(np.asarray(frames[number]), SIDE)
            sheet.paste(small, (left + (SIDE - small.width) // 2, 30))
        sheets.append(sheet)
    return sheets


def chosen(adapters: Sequence[Path], base: str | None) -> tuple[Any, list[Path], list[Path]]:
    """Recipe of the base, the adapters to load, and those whose sliders start at 0.

    Without files: the newest motion that a run has left; on the shipped base the newest appearance of text-to-image,
    too, as both have one Stable Diffusion. Runs that trained the base itself are passed over.
    """
    if adapters:
        return _runs.video(adapters, base), list(adapters), []
    motions = comparable(_runs.newest(TASKS))
    recipe = _runs.video(motions, base)
    found = [path for path in motions if _runs.base_name(path) == recipe.name][:1]
    looks = [path for path in comparable(_runs.newest(APPEARANCES)) if _runs.base_name(path) == "tiny_sd"][:1]
    looks = looks if recipe.name == "tiny_video" else []
    return recipe, found + looks, looks


def build(adapters: Sequence[str | Path] = (), base: str | None = None) -> Any:
    """The page.

    Args:
        adapters: Files of motions and appearances; none takes the newest of the runs below ``runs/``.
        base: A video pipeline to put them on; None is that of the motion's run, or the shipped one.

    Raises:
        UserError: Nothing says which base, and none is shipped.
    """
    gr = _server.gradio()
    recipe, files, resting = chosen(_runs.given(adapters), base)
    studio = Studio(recipe, files, resting, apart=True)
    preview: dict[str, Any] = next(filter(None, (_runs.options(path).get("preview") for path in files)), {})
    frames = min(studio.model.spec.most_frames(studio.model.network) or MOST, MOST)
    usual = min(preview.get("frames") or studio.model.frames, frames)
    with gr.Blocks(title="visadapt text_to_video", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# Text to video\n{_prompting.about(studio, files, 'configs/text_to_video/orbit_one_clip.yaml')}")

        def outputs() -> list[Any]:
            animation = gr.Image(
                label="Base and adapted, from the same noise", interactive=False, type="filepath", format="webp",
                elem_id="animation", show_label=False, buttons=["download", "fullscreen"],
            )  # fmt: skip
            note = gr.Markdown(elem_id="note")
            download = gr.File(label="Download", interactive=False, file_count="multiple", elem_id="files", height=190)
            _prompting.certificates(gr, files)
            return [animation, download, note]

        _prompting.form(
            gr, studio, preview, lambda: gr.Slider(1, frames, usual, step=1, label="Frames"), outputs,
            lambda wish: filmed(studio, wish, _server.workplace(), preview.get("size")),
        )  # fmt: skip
    return blocks
