"""What depends on the kind of task in the report of a run; everything else is in `visadapt.report.run`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch.utils.data import Subset

from visadapt.report import results


class Kind(ABC):
    """Predicts held-out samples before and after adaptation, measures and draws them.

    A task says which kind it is by its attribute ``report_kind``, the ``name`` of a subclass.

    Args:
        images: Samples in the picture of predictions; None takes the kind's own number.
        samples: Most held-out samples to predict, spread evenly; None takes the kind's own number.
    """

    name: ClassVar[str]
    images: int
    samples: int

    def __init__(self, images: int | None = None, samples: int | None = None) -> None:
        self.images = self.images if images is None else images
        self.samples = self.samples if samples is None else samples
        self.before: dict[str, Any] = {}
        self._held_out: Subset | None = None

    def held_out(self, trainer: Any) -> Subset | None:
        """The samples that are predicted; None where the data hold none back."""
        if self._held_out is None:
            self._held_out = results.samples(trainer, self.samples)
        return self._held_out

    @abstractmethod
    def look(self, trainer: Any, task: Any) -> dict[str, Any]:
        """What to remember of the model before its first step, as plain data and tensors for a checkpoint."""

    @abstractmethod
    def figures(self, trainer: Any, task: Any) -> dict[str, float]:
        """Figures of the model as it is now, beside those of ``self.before``; keeps the predictions."""

    @abstractmethod
    def levels(self, figures: dict[str, float]) -> dict[str, float]:
        """Figures before adaptation by the name of the metric, for the learning curves."""

    @abstractmethod
    def draw(self, trainer: Any, run_dir: Path, names: Sequence[str]) -> Image.Image | None:
        """Write the pictures of what ``figures`` has predicted; the one for TensorBoard is returned."""

    def keeps(self, task: Any) -> str | None:
        """Name of an adapter file of the model as a validation has just found it; None keeps none."""
        return None

    @abstractmethod
    def picture(self, trainer: Any, task: Any) -> Image.Image | None:
        """Predictions of the model as it is now, for TensorBoard."""


def kind_of(task: Any, images: int | None = None, samples: int | None = None) -> Kind:
    """The report of a task, by its ``report_kind``.

    Raises:
        ValueError: There is no such kind.
    """
    from visadapt.report.classes import Classes
    from visadapt.report.masks import Masks
    from visadapt.report.pictures import Pictures
    from visadapt.report.sequence import Sequence as TaskSequence
    from visadapt.report.videos import Videos

    every = (Classes, Masks, Pictures, Videos, TaskSequence)
    kinds: dict[str, type[Kind]] = {kind.name: kind for kind in every}
    wanted = getattr(task, "report_kind", Classes.name)
    if wanted not in kinds:
        raise ValueError(f"{type(task).__name__}.report_kind: '{wanted}' is none of {', '.join(kinds)}")
    return kinds[wanted](images, samples)
