"""``visadapt predict --images FOLDER``: pictures from anywhere, classes from the run of the adapter."""

from __future__ import annotations

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from torch.utils.data import Dataset

from visadapt.cli import sheets
from visadapt.cli.errors import UserError, close
from visadapt.cli.rundir import set_names
from visadapt.data.base import BaseData, Stage
from visadapt.data.image_folder import PictureSet
from visadapt.data.images import find_images, unreadable
from visadapt.report.facts import read_facts
from visadapt.report.results import network
from visadapt.tasks.start import load_file


class Pictures(BaseData):
    """Images without labels, for ``predict`` alone.

    Args:
        images: Folders and files.
        class_names: Names of the classes, in the order of the model's outputs.
        batch_size: Images per batch on each device.
        num_workers: Processes that load data ahead.
    """

    def __init__(self, images: list[str], class_names: list[str], batch_size: int = 32, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.class_names = class_names
        self.images = images
        self.unreadable: list[str] = []

    def dataset(self, stage: Stage) -> Dataset:
        """The readable images; messages about the others go to ``unreadable``."""
        if stage != "predict":
            raise NotImplementedError("these images have no labels: only predict can use them")
        paths = find_images(self.images)
        broken = unreadable(paths, decode=True)
        self.unreadable = list(broken.values())
        good = [(str(path), -1) for path in paths if path not in broken]
        if not good:
            raise ValueError(f"none of {len(paths)} files could be read; the first: {self.unreadable[0]}")
        return PictureSet(good, self.preprocess(train=False))


class LoadAdapter(Callback):
    """Put the adapters of files on the model before it is used.

    Args:
        paths: Adapter files; each of several becomes a set with the name of its file.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def _load(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        import visadapt as va

        model = network(pl_module)
        if va.adapters(model):  # those of the configuration: untrained, the file brings its own
            va.remove(model)
        for path, name in zip(self.paths, set_names(self.paths), strict=True):
            load_file(model, path, name)
        getattr(pl_module, "use", int)()  # the strengths that the task takes for its sets
        pl_module.to(pl_module.device)
        pl_module.eval()

    on_validation_start = on_test_start = on_predict_start = _load


class Strength(Callback):
    """Set how far the adapters act in ``predict``: all alike, or set by set.

    Args:
        strength: One number, or name of a set → number; 0 is the base, 1 what was trained.

    Raises:
        UserError: The model has no set of such a name.
    """

    def __init__(self, strength: float | dict[str, float]) -> None:
        self.strength = strength

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The adapters of files are there by now."""
        import visadapt as va

        model = network(pl_module)
        if isinstance(self.strength, dict):
            known = sorted({adapter.name for adapter in va.adapters(model).values()})
            for name in self.strength:
                if name not in known:
                    has = f"it has {', '.join(known)}" if known else "it has none"
                    raise UserError(
                        f"--strength.{name}", f"the model has no set of that name; {has}", close(name, known)
                    )
            va.strength(model, None, **self.strength)
        else:
            va.strength(model, self.strength)


def use_images(config: Namespace, run_file: str | None) -> None:
    """Replace the data of a configuration by the images that ``--images`` names.

    Args:
        config: Parsed configuration of ``predict``; changed in place.
        run_file: A file of the run that trained the model: its ``run.json`` knows the classes.

    Raises:
        UserError: there are no images.
    """
    images = config["images"]
    images = [images] if isinstance(images, str) else list(images)
    try:
        find_images(images)
    except FileNotFoundError as error:
        raise UserError("--images", str(error)) from None
    names = read_facts(run_file).get("class_names") if run_file else None
    settings = config["data"]["init_args"] if config.get("data") else Namespace()
    if names is None:
        names = _names_from_data(config)
    chosen = Namespace(images=images, class_names=names)
    if sheets.kind(config) == "masks":
        chosen["tiles"] = settings.get("batch_size", 8)
        config["data"] = Namespace(class_path="visadapt.cli.sheets.Sheets", init_args=chosen)
        return
    chosen["batch_size"] = settings.get("batch_size", 32)
    chosen["num_workers"] = settings.get("num_workers", 0)
    config["data"] = Namespace(class_path="visadapt.cli.predict.Pictures", init_args=chosen)


def _names_from_data(config: Namespace) -> list[str]:
    """Class names from the data of the configuration, where no run has written them down."""
    from importlib import import_module

    module, _, name = config["data"]["class_path"].rpartition(".")
    data = getattr(import_module(module), name)(**config["data"]["init_args"].as_dict())
    return list(data.class_names)
