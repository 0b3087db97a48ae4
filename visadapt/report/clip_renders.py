"""What ``predict`` of a text-to-video model writes: an animated WebP for each prompt and seed, a table, one sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from visadapt.report import evaluate, tiles
from visadapt.report.animation import save_mp4, save_webp
from visadapt.report.renders import RenderReport

FRAMES = 4  # of a clip, in the sheet


class ClipReport(RenderReport):
    """Writes clips as they come, with MP4 beside them where PyAV is; at the end ``videos.csv``, ``contact_sheet.png``.

    Each WebP says how it was made, as JSON in EXIF's description.
    """

    what, suffix = "videos", "webp"

    def save(self, pixels: Tensor, path: Path, how: dict[str, Any]) -> None:
        """Write bytes (F, 3, H, W) as an animation."""
        frames = [Image.fromarray(np.ascontiguousarray(frame)) for frame in pixels.permute(0, 2, 3, 1).numpy()]
        save_webp(frames, path, how["fps"], json.dumps(how, ensure_ascii=False))
        save_mp4(frames, path.with_suffix(".mp4"), how["fps"])

    def first(self, path: Path) -> Image.Image:
        """Some frames of a clip, two by two."""
        with Image.open(path) as file:
            chosen = evaluate.spread(getattr(file, "n_frames", 1), FRAMES)
            sheet = Image.new("RGB", (2 * file.width, 2 * file.height), "white")
            for place, number in enumerate(chosen):
                file.seek(number)
                sheet.paste(file.convert("RGB"), (place % 2 * file.width, place // 2 * file.height))
        sheet.thumbnail((2 * tiles.SIDE, 2 * tiles.SIDE))
        return sheet

    def _settings(self, task: Any) -> dict[str, Any]:
        preview = task.preview
        begun = {"image": preview.image, "clip": preview.clip, "share": preview.share}
        begun = begun if preview.image or preview.clip else {}
        return super()._settings(task) | {"frames": preview.frames or task.model.frames, "fps": task.model.fps} | begun
