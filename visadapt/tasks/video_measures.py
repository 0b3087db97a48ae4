"""Figures of rendered clips: do they move as the learned ones, and look as asked for rather than as those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import ImageOps
from torch import Tensor

from visadapt.data.moving import DIRECTIONS, motion_of
from visadapt.data.scenes import read
from visadapt.metrics import clips as seen
from visadapt.metrics import flow, motion
from visadapt.metrics.adherence import NAMED
from visadapt.metrics.features import Extractor
from visadapt.metrics.renders import similarity
from visadapt.tasks.measures import spread

if TYPE_CHECKING:
    from visadapt.tasks.text_to_video import TextToVideo

CAPTIONS, LEARNED = 16, 8


@dataclass
class ClipMeasures:
    """Figures of a fixed set of rendered clips, of the base and of what is trained; rendered as ``preview`` says.

    Args:
        prompts: What to render; empty takes up to 16 captions of the held-out clips.
        seeds: Clips of each prompt, with the seeds 0, 1, 2, …
        track: How motion is followed: "centre" of the one thing that stands out from a still background, as in the
            embedded clips; "flow" for any others.
        judge: Ask the shipped judge what frames show; it knows the embedded scenes only.
        extractor: The network whose features are compared.
        clip: Folder of a CLIP model, for the CLIP score of frames.
        base: Measure the base too, before the first step.
    """

    prompts: list[str] = field(default_factory=list)
    seeds: int = 1
    track: Literal["centre", "flow"] = "centre"
    judge: bool = False
    extractor: Extractor = field(default_factory=Extractor)
    clip: str | None = None
    base: bool = True

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"model.measures.seeds: {self.seeds}; at least 1 is needed")


class ClipMeasuring:
    """Renders and measures, for one task and its data.

    Args:
        task: Has ``measures``, ``preview`` and ``render``.
        data: A data module with ``clips(stage)``.

    Raises:
        ValueError: The data have no clips.
    """

    def __init__(self, task: TextToVideo, data: Any) -> None:
        if task.measures is None:
            raise ValueError("model.measures: null; say what to measure")
        if not hasattr(data, "clips"):
            raise ValueError(f"model.measures: {type(data).__name__} has no clips; set it to null")
        self.task, self.options = task, task.measures
        one_of_each = {clip.number: clip for clip in data.clips("train")}
        self.learned = spread(list(one_of_each.values()), LEARNED)
        self.prompts = self.options.prompts or spread(_captions(data), CAPTIONS)

    def __call__(self, before: Tensor | None = None, base: bool = False) -> tuple[dict[str, float], None]:
        """Render with the strengths at hand, and measure.

        Args:
            before: Nothing; see ``measures.Measuring``.
            base: Leave out what is the same for base and trained model.

        Returns:
            Figures by name, and nothing to compare later ones with.
        """
        options = self.options
        every = [prompt for prompt in self.prompts for _ in range(options.seeds)]
        rank_zero_info(f"measures: {len(every)} clips are rendered{' with the base' if base else ''}")
        videos = self.task.render(every, [*range(options.seeds)] * len(self.prompts))
        learned = self._learned(videos)
        network = options.extractor.build().to(self.task.device)
        frames, known = seen.frame_features(network, videos), seen.frame_features(network, learned)
        figures = self._moved(every, videos, learned)
        figures[f"temporal consistency ({network.title})"] = seen.consistency(frames)
        if not base:
            figures[f"temporal consistency of the learned clips ({network.title})"] = seen.consistency(known)
        alike = similarity(frames.flatten(0, 1), known.flatten(0, 1))
        figures[f"similarity to the learned clips ({network.title})"] = alike
        if options.clip is not None:
            figures["CLIP score"] = seen.frame_clip_score(videos.to(self.task.device), every, options.clip)
        return figures | (self._judged(every, videos) if options.judge else {}), None

    def _learned(self, videos: Tensor) -> Tensor:
        """The learned clips (N, F, 3, H, W) in 0 … 1, cut and thinned out to the shape of rendered ones."""
        frames, size = videos.shape[1], (videos.shape[-1], videos.shape[-2])
        found = []
        for clip in self.learned:
            pictures = clip.read((clip.starts - 1) // 2)
            chosen = np.linspace(0, len(pictures) - 1, frames).round().astype(int)
            found.append(np.stack([np.array(ImageOps.fit(pictures[i], size)) for i in chosen]))
        return torch.from_numpy(np.stack(found)).permute(0, 1, 4, 2, 3) / 255

    def _moved(self, prompts: Sequence[str], videos: Tensor, learned: Tensor) -> dict[str, float]:
        """How alike the motion is to that of the learned clips, and to the directions that are asked for."""
        if self.options.track == "flow":
            ways = [flow.tracks(clip) for clip in learned]
            values = [flow.fidelity(mine, other) for mine in map(flow.tracks, videos) for other in ways]
            return {"motion fidelity": float(np.mean(values))}
        found, wanted = motion.centres(videos), motion.centres(learned)
        figures = {
            "motion correlation": torch.stack([motion.correlation(found, way) for way in wanted]).mean().item(),
            "motion deviation": torch.stack([motion.deviation(found, way) for way in wanted]).nanmean().item(),
        }
        asked = [(row, DIRECTIONS[name]) for row, said in enumerate(prompts) if (name := motion_of(said)) in DIRECTIONS]
        if asked:
            rows = [row for row, _ in asked]
            right = motion.directed(found[rows], torch.tensor([direction for _, direction in asked]))
            figures["share that moves as asked"] = right.double().mean().item()
        return figures

    def _judged(self, prompts: Sequence[str], videos: Tensor) -> dict[str, float]:
        """What the judge sees in the frames: what was asked for, and what only the one learned clip has."""
        asked = [read(prompt) for prompt in prompts]
        labels = {name: [said[name] for said in asked] for name in NAMED}
        found = seen.frame_adherence(videos, labels)
        figures = {f"share of frames with the right {name}": found[name] for name in NAMED if name in found}
        if len(self.learned) == 1:
            leaked = seen.leaked_traits(videos, labels, read(self.learned[0].caption))
            figures |= {f"share of frames with the learned clip's {name}": value for name, value in leaked.items()}
        return figures


def _captions(data: Any) -> list[str]:
    """Different captions of the held-out clips, else of those that are learned."""
    for stage in ("test", "val", "train"):
        try:
            return list(dict.fromkeys(data.captions(clip.caption, False) for clip in data.clips(stage)))
        except NotImplementedError:  # the data have no such part
            continue
    raise ValueError(f"model.measures: {type(data).__name__} has no clips; set it to null")
