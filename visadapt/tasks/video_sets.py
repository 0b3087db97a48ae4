"""The sets of adapters of text-to-video: one of motion, and one of appearance for all clips or for each."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from visadapt.core.model import Adaptation
from visadapt.tasks.diffusion_options import Paths

APPEARANCE, MOTION = "spatial", "temporal"  # names of sets


def of_clip(number: int) -> str:
    """The name of a clip's own set of appearance."""
    return f"{APPEARANCE}-{number}"


def is_spatial(name: str) -> bool:
    """Whether a set is one of appearance: `spatial`, or `spatial-0` of the first clip."""
    return name.partition("-")[0] == APPEARANCE


def check_names(names: set[str], paths: Paths, train: str) -> None:
    """Raise unless a mode has the sets that it trains."""
    if paths.mode == "single":
        return
    wanted = {"temporal": {MOTION}, "spatial": {APPEARANCE}}.get(paths.mode or "", {APPEARANCE, MOTION})
    has = names | ({MOTION} if train == "temporal" else set())
    told = paths.mode or "dual or sequential"
    if has != wanted:
        listed = " and ".join(f"'{name}'" for name in sorted(wanted))
        raise ValueError(
            f"model.adapters: the sets {', '.join(sorted(names)) or '(none)'}; model.paths.mode {told} trains "
            f"{listed}: name them so, or choose another mode"
        )


def one_per_clip(
    adaptations: Sequence[Adaptation], rates: dict[str, float], clips: int
) -> tuple[list[Adaptation], dict[str, float]]:
    """Sets, and learning rates by name, with a spatial set for each clip in the place of the one for all."""
    names = [of_clip(number) for number in range(clips)]
    sets: list[Adaptation] = []
    for adaptation in adaptations:
        sets += [replace(adaptation, name=name) for name in names] if adaptation.name == APPEARANCE else [adaptation]
    rest = {name: rate for name, rate in rates.items() if name != APPEARANCE}
    return sets, rest | (dict.fromkeys(names, rates[APPEARANCE]) if APPEARANCE in rates else {})


def sources(clip: Tensor | None, count: int, names: Collection[str], clips: int) -> Iterator[tuple[str, Tensor]]:
    """The spatial sets that a batch needs, and the rows of their clips.

    Args:
        clip: The number of each clip's source (B,); it is read where clips have sets of their own.
        count: B.
        names: All sets.
        clips: Clips that have a set of their own.

    Raises:
        ValueError: A clip has no spatial set, or the batch does not tell the clips apart.
    """
    if of_clip(0) not in names:
        yield APPEARANCE, torch.arange(count)
        return
    if clip is None:
        raise ValueError(f"model.clips: {clips}, but the batches have no 'clip' (B,), the number of each clip's source")
    numbers = clip.cpu()
    if int(numbers.max()) >= clips:
        raise ValueError(
            f"model.clips: {clips}, but the data have a clip number {int(numbers.max())}, counted from 0; "
            "set model.clips to the number of clips, or to 1 for one spatial set"
        )
    for number in numbers.unique().tolist():
        yield of_clip(number), (numbers == number).nonzero()[:, 0]
