"""The contract of a data module: one ``dataset(stage)``; loaders, shards and exact resume follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning as L
from torch.utils.data import Dataset, default_collate

from visadapt.data.loader import ExactLoader

Stage = Literal["train", "val", "test", "predict"]


class BaseData(L.LightningDataModule):
    """Data for one task. A subclass states ``dataset(stage)`` and ``class_names``.

    The four loaders are derived: they shuffle the training set from ``seed`` alone, shard it over the
    processes and continue mid-epoch after a kill (see ``visadapt.data.loader``). Samples are drawn under a
    random state seeded by (seed, epoch, index), so ordinary torchvision, timm, numpy or ``random``
    augmentations resume exactly.

    Args:
        batch_size: Samples per batch on each device.
        num_workers: Processes that load data ahead; 0 loads in the training process. The batches do not
            change.
        seed: Source of the order and of the augmentations.
        drop_last: Leave out the last, short training batch of an epoch.
    """

    class_names: Sequence[str] = ()
    task_classes: list[list[int]] | None = None  # groups of classes that come one after the other; None: no sequence
    transform: Callable[[Any], Any] | None = None  # set by a subclass that brings its own, for all stages

    def __init__(self, batch_size: int = 32, num_workers: int = 0, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.drop_last = drop_last

    @property
    def num_classes(self) -> int:
        """Number of classes, known right after construction (the command line links the task to it)."""
        return len(self.class_names)

    def dataset(self, stage: Stage) -> Dataset:
        """The map-style dataset of a stage, with ``self.preprocess(train=stage == "train")`` applied.

        Raises:
            NotImplementedError: if the module has no data for this stage.
        """
        raise NotImplementedError(f"{type(self).__name__} has no data for the stage '{stage}'")

    def collate(self, samples: list[Any]) -> Any:
        """Join samples to a batch; override for samples of unequal shape."""
        return default_collate(samples)

    def preprocess(self, train: bool) -> Callable[[Any], Any] | None:
        """The transform of one image: the module's own, else what the task's backbone asks for, else none."""
        if self.transform is not None or self.trainer is None:
            return self.transform
        task_preprocess = getattr(self.trainer.lightning_module, "preprocess", None)
        return task_preprocess(train) if task_preprocess is not None else None

    def loader(self, dataset: Dataset, train: bool = False) -> ExactLoader:
        """An exact loader over this process' share of ``dataset``; shuffled for training.

        A dataset with ``groups`` (one integer per sample) gets batches of one group each.
        """
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return ExactLoader(
            dataset,
            self.batch_size,
            shuffle=train and not overfits,
            seed=self.seed,
            num_workers=self.num_workers,
            collate=self.collate,
            drop_last=self.drop_last and train,
            groups=getattr(dataset, "groups", None),
            **self._shard(),
        )

    def _shard(self) -> dict[str, int]:
        """This process' share of the data; under tensor parallelism several processes have the same one."""
        kwargs = (self.trainer.distributed_sampler_kwargs or {}) if self.trainer is not None else {}
        return {"rank": kwargs.get("rank", 0), "world_size": kwargs.get("num_replicas", 1)}

    def train_dataloader(self) -> ExactLoader:
        """Shuffled, augmented, resumable."""
        return self.loader(self.dataset("train"), train=True)

    def val_dataloader(self) -> ExactLoader:
        """Every sample once, in order."""
        return self.loader(self.dataset("val"))

    def test_dataloader(self) -> ExactLoader:
        """Every sample once, in order."""
        return self.loader(self.dataset("test"))

    def predict_dataloader(self) -> ExactLoader:
        """Every sample once, in order."""
        return self.loader(self.dataset("predict"))
