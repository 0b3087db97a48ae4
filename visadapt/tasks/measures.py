"""Figures of what a text-to-image model renders: is the concept there when asked for, and only then."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import ImageOps
from torch import Tensor

from visadapt.backbones.sd_tokens import extended
from visadapt.core.model import strength
from visadapt.data.scenes import read
from visadapt.metrics import renders
from visadapt.metrics.adherence import NAMED, PRESENT, adherence
from visadapt.metrics.clip import clip_score
from visadapt.metrics.features import Extractor, FeatureNet

if TYPE_CHECKING:
    from visadapt.tasks.text_to_image import TextToImage

CAPTIONS, PICTURES, CHUNK = 16, 256, 8


@dataclass
class Measures:
    """Figures of a fixed set of renders, of the base and of what is trained; rendered as ``preview`` says.

    The real pictures to compare with are the data's held-out ones: those of "test", else of "val".

    Args:
        prompts: Prompts that ask for what is learned; empty takes up to 16 captions of the real pictures.
        others: Prompts that do not ask for it: what they show tells leakage, and drift from the base.
        seeds: Pictures of each prompt, with the seeds 0, 1, 2, …
        judge: What the shipped judge looks for: "shape", "colour", "background", "subject", "style". It knows the
            embedded scenes only; leave it empty for other pictures.
        extractor: The network whose features are compared.
        clip: Folder of a CLIP model, for the CLIP score.
        fid: Also report FID, which needs thousands of pictures to mean something.
        base: Measure the base too, before the first step; without it there is no drift from the base.
    """

    prompts: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    seeds: int = 4
    judge: list[str] = field(default_factory=list)
    extractor: Extractor = field(default_factory=Extractor)
    clip: str | None = None
    fid: bool = False
    base: bool = True

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"model.measures.seeds: {self.seeds}; at least 1 is needed")
        if unknown := set(self.judge) - {*NAMED, *PRESENT}:
            raise ValueError(
                f"model.measures.judge: '{sorted(unknown)[0]}' is not one of {', '.join((*NAMED, *PRESENT))}"
            )


@dataclass(frozen=True)
class Shown:
    """What renders of prompts show.

    Attributes:
        prompts: The prompt of each picture.
        features: (N, D).
        images: (N, 3, H, W) in −1 … 1, if the judge is asked.
        clip: CLIP scores (N,), if asked for.
    """

    prompts: list[str]
    features: Tensor
    images: Tensor | None
    clip: Tensor | None


class Measuring:
    """Renders and measures, for one task and its data.

    Args:
        task: Has ``measures``, ``preview`` and ``render``.
        data: A data module with ``pictures(stage)``.

    Raises:
        ValueError: The data have no pictures with captions.
    """

    def __init__(self, task: TextToImage, data: Any) -> None:
        if task.measures is None:
            raise ValueError("model.measures: null; say what to measure")
        self.task, self.options = task, task.measures
        self.real = _held_out(data)
        captions = [data.captions(picture.caption, False) for picture in self.real]
        self.prompts = self.options.prompts or spread(list(dict.fromkeys(captions)), CAPTIONS)
        self.known = {data.captions(picture.caption, False) for picture in data.pictures("train")}

    def __call__(self, before: Tensor | None = None, base: bool = False) -> tuple[dict[str, float], Tensor | None]:
        """Render and measure.

        Args:
            before: Features (N, D) of the base's renders of the other prompts, for the drift.
            base: Leave out what is the same for base and trained model.

        Returns:
            Figures by name, and the features of the renders of the other prompts.
        """
        options = self.options
        count = (len(self.prompts) + len(options.others)) * options.seeds
        rank_zero_info(f"measures: {count} pictures are rendered{' with the base' if base else ''}")
        network = options.extractor.build().to(self.task.device)
        asked = self._shown(self.prompts, network)
        real = self._real(network)
        figures = self._judged(asked) | self._compared(asked, real, network.title)
        if not base and len(real) > 1:
            figures[f"similarity among the pictures ({network.title})"] = renders.among(real)
        if not options.others:
            return figures, None
        other = self._shown(options.others, network)
        figures |= self._leaked(other, real, network.title)
        if before is not None and before.shape == other.features.shape:
            drift = renders.drift(other.features, before)
            figures[f"drift from the base, not asked for ({network.title})"] = drift
        return figures, other.features

    def _shown(self, prompts: Sequence[str], network: FeatureNet) -> Shown:
        """Render each prompt with each seed, a few at a time: large pictures are not kept."""
        options, every = self.options, [prompt for prompt in prompts for _ in range(self.options.seeds)]
        seeds = [*range(options.seeds)] * len(prompts)
        features, images, scores = [], [], []
        for start in range(0, len(every), CHUNK):
            texts = every[start : start + CHUNK]
            found = self.task.render(texts, seeds[start : start + CHUNK])
            self.side = (found.shape[-1], found.shape[-2])
            features.append(network(found))
            if options.judge:
                images.append(found * 2 - 1)
            if options.clip is not None:
                scores.append(clip_score(found.to(self.task.device), texts, options.clip))
        return Shown(
            every,
            torch.cat(features),
            torch.cat(images) if images else None,
            torch.cat(scores) if scores else None,
        )

    def _real(self, network: FeatureNet) -> Tensor:
        """Features of the real pictures, cut in the middle to the size of the renders."""
        features = []
        for picture in spread(self.real, PICTURES):
            pixels = np.array(ImageOps.fit(picture.read(), self.side))
            features.append(network(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255))
        return torch.cat(features)

    def _judged(self, shown: Shown) -> dict[str, float]:
        """What the judge sees in renders of prompts that ask for the concept."""
        if shown.images is None:
            return {}
        found = _adherence(shown.prompts, shown.images)
        figures = {f"share with the {name}, asked for": found[name] for name in PRESENT if name in self.options.judge}
        unseen = torch.tensor([prompt not in self.known for prompt in shown.prompts])
        parts = {"": found}
        if unseen.any() and not unseen.all():
            new = [prompt for prompt in shown.prompts if prompt not in self.known]
            parts[", prompts that no training picture has"] = _adherence(new, shown.images[unseen])
        for where, part in parts.items():
            named = [name for name in NAMED if name in self.options.judge and name in part]
            figures |= {f"share with the right {name}{where}": part[name] for name in named}
        return figures

    def _compared(self, shown: Shown, real: Tensor, title: str) -> dict[str, float]:
        figures = {f"similarity to the pictures ({title})": renders.similarity(shown.features, real)}
        if self.options.seeds > 1:
            by_prompt = shown.features.unflatten(0, (-1, self.options.seeds))
            figures[f"diversity ({title})"] = renders.diversity(by_prompt)
        if min(len(real), len(shown.features)) > 1:
            figures[f"KID ({title})"] = renders.kid(shown.features, real)
            if self.options.fid:
                figures[f"FID ({title})"] = renders.fid(shown.features, real)
        return figures | ({} if shown.clip is None else {"CLIP score": float(shown.clip.mean())})

    def _leaked(self, shown: Shown, real: Tensor, title: str) -> dict[str, float]:
        figures = {}
        if shown.images is not None:
            found = _adherence(shown.prompts, shown.images)
            seen = [name for name in PRESENT if name in self.options.judge]
            figures = {f"share with the {name}, not asked for": found[name] for name in seen}
            figures |= {"share of other prompts followed": found["all"]} if "all" in found else {}
        return figures | {
            f"similarity to the pictures, not asked for ({title})": renders.similarity(shown.features, real)
        }


def report(task: Any) -> None:
    """Log the figures of a model that is validated or tested on its own, and the base's where adapters make it.

    In a fit they are the run's report, once at its end.

    Args:
        task: Has ``measures``, ``measuring(data)`` and ``what``.
    """
    if task.measures is None or task.trainer.state.fn not in (TrainerFn.VALIDATING, TrainerFn.TESTING):
        return
    measuring = task.measuring(task.trainer.datamodule)
    features = None
    if task.measures.base and task.what == "adapters" and not list(extended(task.model)):
        with strength(task.model, 0.0):
            figures, features = measuring(base=True)
        task.log_dict({f"{key(name)}_base": value for name, value in figures.items()})
    task.log_dict({key(name): value for name, value in measuring(features)[0].items()})


def key(figure: str) -> str:
    """A figure's name in metrics.csv and TensorBoard."""
    return "measures/" + re.sub(r"[^a-z0-9]+", "_", figure.lower()).strip("_")


def _adherence(prompts: Sequence[str], images: Tensor) -> dict[str, float]:
    asked = [read(prompt) for prompt in prompts]
    return adherence(images, {name: [labels[name] for labels in asked] for name in NAMED})


def _held_out(data: Any) -> Sequence[Any]:
    if not hasattr(data, "pictures"):
        raise ValueError(f"model.measures: {type(data).__name__} has no pictures with captions; set it to null")
    for stage in ("test", "val"):
        try:
            return data.pictures(stage)
        except NotImplementedError:  # the data have no such part
            continue
    raise ValueError(f"model.measures: {type(data).__name__} holds no pictures back; set it to null")


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many items, evenly from first to last."""
    return [items[i] for i in sorted({int(i) for i in np.linspace(0, len(items) - 1, min(most, len(items)))})]
