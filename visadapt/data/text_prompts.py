"""Prompts with seeds: what ``visadapt predict`` renders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from visadapt.data.base import BaseData, Stage
from visadapt.data.captioned_data import CaptionedData
from visadapt.data.captions import warn_of_long
from visadapt.data.clip_data import ClipData


class PromptSet(Dataset):
    """Samples ``{"number", "caption", "seed"}``, one for each picture, prompt by prompt."""

    def __init__(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        self.prompts, self.seeds = list(prompts), list(seeds)

    def __len__(self) -> int:
        return len(self.prompts) * len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, seed = divmod(index, len(self.seeds))
        return {"number": prompt, "caption": self.prompts[prompt], "seed": self.seeds[seed]}


class TextPrompts(BaseData):
    """Prompts to render, for ``predict`` alone. A batch is a dict of lists: ``numbers``, ``captions``, ``seeds``.

    Args:
        prompts: Texts; a name that ends in .txt is a file with one in each line. None takes the captions of ``source``.
        seeds: Seeds of each prompt, a picture each; None takes those of the task's preview.
        source: Captioned data whose held-out captions, each once, serve where there are no prompts.
        batch_size: Pictures that are rendered at once.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        seeds: list[int] | None = None,
        source: CaptionedData | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(batch_size=batch_size)
        if batch_size < 1:
            raise ValueError(f"data.batch_size: {batch_size}; at least one picture is rendered at once")
        if seeds is not None and (not seeds or min(seeds) < 0 or max(seeds) >= 2**63 or len({*seeds}) < len(seeds)):
            raise ValueError(f"data.seeds: {seeds}; give different whole numbers from 0 to 2⁶³ − 1")
        if prompts is None and source is None:
            raise ValueError("data.prompts: give texts or a .txt file with one in each line, or data.source")
        self.prompts = None if prompts is None else texts(prompts)
        self.seeds, self.source = seeds, source

    def dataset(self, stage: Stage) -> PromptSet:
        """The pictures to render.

        Raises:
            NotImplementedError: The stage is another than "predict".
        """
        if stage != "predict":
            raise NotImplementedError("prompts have no pictures to learn from: only predict can use them")
        prompts = self._captions() if self.prompts is None else self.prompts
        task = None if self.trainer is None else self.trainer.lightning_module
        warn_of_long([(prompt[:60], prompt) for prompt in prompts], getattr(task, "model", None), "data.prompts")
        seeds = self.seeds
        if seeds is None:
            preview = getattr(task, "preview", None)
            seeds = [0] if preview is None else list(preview.seeds)
        return PromptSet(prompts, seeds)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Lists of what the samples hold."""
        return {f"{key}s": [sample[key] for sample in samples] for key in samples[0]}

    def _captions(self) -> list[str]:
        assert self.source is not None  # by the constructor
        self.source.setup("test")
        shown = self.source.clips("test") if isinstance(self.source, ClipData) else self.source.pictures("test")
        captions = [self.source.captions(one.caption, False) for one in shown]
        return list(dict.fromkeys(captions))


def texts(prompts: Sequence[str]) -> list[str]:
    """The prompts, those of .txt files line by line; empty lines do not count.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no prompt at all, an empty one, or a file is no text.
    """
    found: list[str] = []
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError("data.prompts: a prompt is empty; leave it out")
        found += _lines(Path(prompt)) if prompt.lower().endswith(".txt") else [prompt.strip()]
    if not found:
        raise ValueError(f"data.prompts: there is none in {', '.join(prompts) or 'the list'}; write one in each line")
    return found


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"data.prompts: there is no file '{path}'")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.prompts: '{path}' is no text ({error}); save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
