"""The tasks of the comparison of methods: the classes that the command line has, small enough for a thousand runs."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

import visadapt as va
from visadapt.backbones import TimmViT
from visadapt.backbones.sam import SAM
from visadapt.backbones.stable_diffusion import StableDiffusion
from visadapt.data.base import BaseData
from visadapt.data.captioned_scenes import Scenes
from visadapt.data.digits import Digits
from visadapt.data.map_tiles import MapTiles
from visadapt.tasks.automatic import AutomaticSegmentation
from visadapt.tasks.base import BaseTask
from visadapt.tasks.classification import Classification
from visadapt.tasks.diffusion_options import Loss
from visadapt.tasks.text_to_image import TextToImage

Stage = Literal["val", "test"]


@dataclass(frozen=True)
class Trains:
    """What a row trains besides its adapters.

    Args:
        what: Nothing but what the task always trains, the head or decoder alone, or the whole network.
        pretrained: Start from the base rather than from random weights.
    """

    what: Literal["adapters", "head", "all"] = "adapters"
    pretrained: bool = True


WITHOUT_ADAPTERS = {
    "head alone": Trains("head"),
    "from scratch": Trains("all", pretrained=False),
    "full fine-tuning": Trains("all"),
}


class Kept:
    """A backbone that is loaded once in a process; each task gets a copy of its network."""

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self._built: nn.Module | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def __deepcopy__(self, memo: Any) -> Kept:
        return self  # hyper-parameters are copied

    def build(self, *args: Any) -> nn.Module:
        """A copy of what the backbone builds."""
        if self._built is None:
            self._built = self._backbone.build(*args)
        return copy.deepcopy(self._built)


class Contest:
    """One task: how a run is made, and how it is scored.

    Attributes:
        name: On the command line.
        heading: Of the column.
        better: 1 where a higher score is better, -1 where a lower one is.
        targets: Layers that get an adapter.
        steps: Of each training.
        references: Titles of the rows without adapters.
        ensembles: Whether the score asks the network for one tensor, which an ensemble can average.
    """

    name = ""
    heading = ""
    better = 1
    targets: tuple[str, ...] = ()
    steps = 0
    references: ClassVar[dict[str, Trains]] = {}
    ensembles = True

    def __init__(self, steps: int | None = None) -> None:
        self.steps = steps or self.steps

    def task(self, adapters: list[va.Adaptation], trains: Trains, rate: float, seed: int) -> BaseTask:
        """A fresh task; its start depends on the seed."""
        torch.manual_seed(seed)
        optimizer = functools.partial(torch.optim.AdamW, lr=rate, weight_decay=0.05)
        task = self.made(adapters, trains, optimizer)
        task.configure_model()
        return task

    def made(self, adapters: list[va.Adaptation], trains: Trains, optimizer: Any) -> BaseTask:
        raise NotImplementedError

    def data(self, seed: int) -> BaseData:
        """The data module: the seed draws what is trained on; what is scored never changes."""
        raise NotImplementedError

    def score(self, task: BaseTask, stage: Stage, callbacks: Sequence[L.Callback] = ()) -> float:
        """The figure of a trained task on what the stage shows."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What a stored run must agree with."""
        return {"contest": self.name, "steps": self.steps, "targets": list(self.targets)}


def evaluated(task: BaseTask, callbacks: Sequence[L.Callback], verb: str, **data: Any) -> dict[str, float]:
    """Metrics of `trainer.validate` or `trainer.test`."""
    return getattr(quiet(callbacks=list(callbacks)), verb)(task, verbose=False, **data)[0]


def quiet(**options: Any) -> L.Trainer:
    """A Trainer that computes on one CPU and writes nothing."""
    silent = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", devices=1, logger=False, num_sanity_val_steps=0, **silent, **options)


@functools.cache
def base(name: str) -> Kept:
    """The shipped base of a contest."""
    makers = {"digits": lambda: TimmViT("tiny_digits"), "maps": lambda: SAM(img_size=64), "style": StableDiffusion}
    return Kept(makers[name]())


@functools.cache
def batches(name: str, stage: Stage) -> DataLoader:
    """What a stage of a contest shows, drawn once in a process."""
    data = CONTESTS[name]().data(0)
    return DataLoader(list(data.loader(data.dataset(stage))), batch_size=None)  # a list would be several loaders


class DigitsContest(Contest):
    """Digits in black on white for a ViT that knows white on black, ten images a class."""

    name = "digits"
    heading = "digits, accuracy %"
    targets = ("attention", "mlp")
    steps = 120
    references: ClassVar[dict[str, Trains]] = WITHOUT_ADAPTERS

    def made(self, adapters: list[va.Adaptation], trains: Trains, optimizer: Any) -> BaseTask:
        backbone: Any = base(self.name) if trains.pretrained else TimmViT("tiny_digits", pretrained=False)
        what = trains.what if adapters or trains.what != "adapters" else "head"
        return Classification(backbone, 10, adapters, train=what, label_smoothing=0.1, optimizer=optimizer)

    def data(self, seed: int) -> BaseData:
        found = Digits("inverted", None, shots=10, batch_size=16, seed=seed, drop_last=True)
        found.transform = base(self.name).preprocess(False)
        return found

    def score(self, task: BaseTask, stage: Stage, callbacks: Sequence[L.Callback] = ()) -> float:
        found = evaluated(task, callbacks, "validate", dataloaders=batches(self.name, stage))
        return 100 * found["val/accuracy"]


class MapsContest(Contest):
    """Vineyards on ten tiles of drawn maps, 64 pixels, by MapSAM on the small SAM; the mask decoder trains along."""

    name = "maps"
    heading = "map tiles, IoU %"
    targets = ("encoder.attention", "encoder.mlp")
    steps = 40
    references: ClassVar[dict[str, Trains]] = WITHOUT_ADAPTERS
    ensembles = False

    def made(self, adapters: list[va.Adaptation], trains: Trains, optimizer: Any) -> BaseTask:
        backbone: Any = base(self.name) if trains.pretrained else SAM(img_size=64, pretrained=False)
        what: Any = "all" if trains.what == "all" else "decoder"
        return AutomaticSegmentation(backbone, 2, adapters, train=what, optimizer=optimizer)

    def data(self, seed: int) -> BaseData:
        found = MapTiles("vineyard", shots=10, tile=64, batch_size=5, seed=seed)
        found.transform = base(self.name).preprocess(False)
        return found

    def score(self, task: BaseTask, stage: Stage, callbacks: Sequence[L.Callback] = ()) -> float:
        return 100 * evaluated(task, callbacks, "validate", dataloaders=batches(self.name, stage))["val/iou"]


class StyleContest(Contest):
    """A hatched print in sepia from 20 pictures, on the tiny Stable Diffusion: its loss at fixed times and noise.

    The score is relative to the base's loss on the same pictures.
    """

    name = "style"
    heading = "style, loss / base"
    better = -1
    targets = ("unet.attention", "unet.ff")
    steps = 30
    references: ClassVar[dict[str, Trains]] = {"full fine-tuning": Trains("all")}

    def made(self, adapters: list[va.Adaptation], trains: Trains, optimizer: Any) -> BaseTask:
        what: Any = "all" if trains.what == "all" else "adapters"
        backbone: Any = base(self.name)
        return TextToImage(backbone, adapters, what, loss=Loss(snr_gamma=5.0), val_times=2, optimizer=optimizer)

    def data(self, seed: int) -> BaseData:
        return Scenes("style", val_size=24, test_size=24, cache=_cache(), batch_size=4, seed=seed)

    def score(self, task: BaseTask, stage: Stage, callbacks: Sequence[L.Callback] = ()) -> float:
        return self._loss(task, stage, callbacks) / self._of_base(stage)

    def _loss(self, task: BaseTask, stage: Stage, callbacks: Sequence[L.Callback] = ()) -> float:
        verb = "validate" if stage == "val" else "test"
        return evaluated(task, callbacks, verb, datamodule=self.data(0))[f"{stage}/loss"]

    @functools.cache  # noqa: B019 - a contest lives as long as its process
    def _of_base(self, stage: Stage) -> float:
        return self._loss(self.task([], Trains(), 0.0, 0), stage)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="visadapt-methods-")


def _cache() -> str:
    """Where a process keeps latents and encoded captions; gone with it."""
    return str(Path(_folder().name))


CONTESTS: dict[str, type[Contest]] = {c.name: c for c in (DigitsContest, MapsContest, StyleContest)}
