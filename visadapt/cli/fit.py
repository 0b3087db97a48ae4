"""``visadapt fit|validate|test|predict``: LightningCLI with our classes known and its mistakes explained."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry

from visadapt.cli import predict, prompts, refuse, rundir, sheets, yaml_files
from visadapt.cli.errors import Friendly, UserError, close, nearby, purposeful, refuse_null_groups, subclasses, told
from visadapt.cli.main import option

PLUGINS = ("methods", "backbones", "data", "tasks", "callbacks")


def import_plugins() -> None:
    """Import each module of the packages that hold classes, so that a short name finds its class."""
    for name in PLUGINS:
        package = import_module(f"visadapt.{name}")
        for module in iter_modules(package.__path__):
            import_module(f"visadapt.{name}.{module.name}")


class FriendlyParser(Friendly, LightningArgumentParser):
    """The parser of the training commands."""

    def classes(self) -> Iterator[str]:
        """Names of all classes that a configuration of ours may name."""
        from lightning.pytorch.loggers import Logger

        from visadapt.backbones.base import Backbone
        from visadapt.core.adapter import Adapter
        from visadapt.data.base import BaseData
        from visadapt.tasks.base import BaseTask

        scheduler = torch.optim.lr_scheduler.LRScheduler
        for base in (
            Adapter,
            Backbone,
            BaseTask,
            BaseData,
            Callback,
            Logger,
            torch.optim.Optimizer,
            scheduler,
        ):
            yield from (cls.__name__ for cls in subclasses(base) if not cls.__name__.startswith("_"))


class SaveConfig(SaveConfigCallback):
    """Save the resolved configuration without the keys that belong to one run alone.

    With `ckpt_path` or `run_dir` inside, a second run from the file would resume or overwrite the first.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        config = config.clone()
        for key in ("ckpt_path", "run_dir", "adapter", "images"):
            if key in config:
                config[key] = None
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Not yet: the model may still turn out to be impossible, and then no folder should be left behind."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Save, on all ranks together."""
        super().setup(trainer, pl_module, "fit")


class Bar(RichProgressBar):
    """The progress bar without Lightning's version number: the run directory says which run it is."""

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """The metrics logged with ``prog_bar=True``."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


class CLI(LightningCLI):
    """LightningCLI with a run directory, adapter files, pictures to predict, and default callbacks."""

    run_dir_now: Path | None = None  # of the latest instance: one that fails in its constructor is never returned
    predicts = ""  # what `predict` makes: "classes", "masks", "pictures" or "videos"

    def __init__(self) -> None:
        from visadapt.data.base import BaseData
        from visadapt.tasks.base import BaseTask

        super().__init__(
            BaseTask,
            BaseData,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"use_distributed_sampler": False},  # our loaders shard, shuffle and resume
            seed_everything_default=0,
            parser_kwargs={"default_env": True, "env_prefix": "VISADAPT", "allow_abbrev": False},
            parser_class=FriendlyParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The command of the command line alone: parsers for all four would take four times as long."""
        every = LightningCLI.subcommands()
        return {sys.argv[1]: every[sys.argv[1]]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of every command, and the number of classes from the data to the model."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            help="Folder for all that the command writes (default: runs/<name of the configuration>/<time>).",
        )
        for given in ("num_classes", "task_classes"):
            parser.link_arguments(f"data.{given}", f"model.init_args.{given}", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            several: dict[str, Any] = {"type": str, "nargs": "+"} if subcommand == "predict" else {"type": str | None}
            more = "; several act together" if subcommand == "predict" else ""
            parser.add_argument("--adapter", **several, help=f"Adapter file to use instead of a checkpoint{more}.")
        if subcommand == "predict":
            parser.add_argument(
                "--strength",
                type=float | dict[str, float] | None,
                help="How far adapters act: 0 is the base, 1 what was trained. --strength.NAME for one set.",
            )
            parser.add_argument(
                "--images",
                type=str | list[str] | None,
                help="Folder, image or list of them, instead of data.",
            )
            sheets.add_options(parser)
            prompts.add_options(parser)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Check the files that are named, and leave the configuration alone.

        The method of LightningCLI lets the hyper-parameters in a checkpoint beat the command line.
        """
        config = self.config[self.config["subcommand"]]
        if (path := config.get("ckpt_path")) is not None:
            check_checkpoint(path)
        for path in self._adapters(config):
            if not Path(path).exists():
                raise UserError("--adapter", f"there is no file '{path}'", nearby(path))

    @staticmethod
    def _adapters(config: Any) -> list[str]:
        """The adapter files of the command line."""
        given = config.get("adapter") or []
        return [rundir.adapter_file(path) for path in ([given] if isinstance(given, str) else given)]

    def before_instantiate_classes(self) -> None:
        """Choose the run directory; point `predict` at the images of the command line."""
        command = str(self.subcommand)
        config = self.config[command]
        for part in ("model", "data"):
            refuse_null_groups(config.get(part), part)
        refuse.negative(config)
        files = option(sys.argv[1:], "-c", "--config")
        made_by_run = next(iter(self._adapters(config)), None) or config.get("ckpt_path")
        chosen = config.get("run_dir") or config.get("output")
        name = config["model"]["class_path"].rpartition(".")[2].lower()
        self.run_dir = Path(chosen) if chosen else rundir.new_run_dir(command, files, made_by_run, name)
        refuse.place(command, self.run_dir, config.get("ckpt_path"))
        CLI.run_dir_now = self.run_dir
        if self.subcommand != "fit":
            self.save_config_callback = None  # the run has its configuration already
        if self._adapters(config) and "start" in config["model"]["init_args"]:
            config["model"]["init_args"]["start"] = None  # the file brings what the run has made of it
        if command == "predict":
            self.predicts = sheets.kind(config)
            self._choose_data(config, made_by_run or files)

    def _choose_data(self, config: Any, run_file: str | None) -> None:
        """Predict the images of the command line; a segmentation takes those of its data where there are none."""
        if self.predicts in prompts.RENDERED:
            prompts.use_prompts(config)
            return
        prompts.refuse(config)
        masks = self.predicts == "masks"
        if masks and config.get("images") is None and config.get("data"):
            config["images"] = config["data"]["init_args"].get("images")
        if config.get("images") is not None:
            predict.use_images(config, run_file)
        elif masks:
            raise UserError("--images", "this is required and missing", "name pictures to segment, or their folder")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer, with our loggers in the run directory unless the configuration names others."""
        from visadapt.report.clip_renders import ClipReport
        from visadapt.report.predictions import PredictionReport
        from visadapt.report.renders import RenderReport
        from visadapt.report.run import RunReport

        config = self.config_init[self.subcommand]
        trainer = config["trainer"]
        if trainer.get("logger") in (None, True):
            kwargs["logger"] = rundir.loggers(self.run_dir, str(self.subcommand))
        if trainer.get("default_root_dir") is None:
            kwargs["default_root_dir"] = str(self.run_dir)
        bars = [c for c in trainer.get("callbacks") or () if isinstance(c, ProgressBar)]
        bar = not bars and trainer.get("enable_progress_bar") is not False
        masks = self.predicts == "masks"
        callbacks: list[Callback] = [Bar()] if bar and not masks else []
        name = rundir.config_name(option(sys.argv[1:], "-c", "--config"))
        callbacks.append(RunReport(str(self.run_dir), name))
        if masks:  # which show a bar per sheet, and there can be one only
            callbacks.append(sheets.report(config, self.run_dir, bar))
            kwargs["enable_progress_bar"] = bool(bars)
        elif self.predicts in prompts.RENDERED:
            made_by = self._adapters(config) or [str(config["ckpt_path"])] * bool(config.get("ckpt_path"))
            report = ClipReport if self.predicts == "videos" else RenderReport
            callbacks.append(report(str(self.run_dir), made_by))
        else:
            callbacks.append(PredictionReport(str(self.run_dir)))
        if adapters := self._adapters(config):
            callbacks.append(predict.LoadAdapter(adapters))
        if config.get("strength") is not None:
            callbacks.append(predict.Strength(config["strength"]))
        self.trainer_defaults["callbacks"] = callbacks
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise trainer_error(error, trainer) from error


def trainer_error(error: Exception, settings: Any) -> UserError:
    """Name the option of the trainer that Lightning refuses, and what there is instead."""
    text = " ".join(str(error).split())
    text = text.partition(" Find a complete list")[0].partition(" Example choices")[0]
    for key in ("strategy", "devices", "accelerator", "precision"):
        if re.search(rf"{key}\b", text):
            known = {"strategy": [*StrategyRegistry], "accelerator": [*AcceleratorRegistry, "gpu"]}.get(key)
            hint = close(str(settings[key]), known) if known else ""
            return UserError(f"trainer.{key}", text, hint or _machine())
    return UserError("trainer.accelerator", text, _machine())


def _machine() -> str:
    return f"this machine has {torch.cuda.device_count()} CUDA devices and {os.cpu_count()} CPU cores"


def check_checkpoint(path: str) -> None:
    """Raise a `UserError` unless ``path`` is a checkpoint that Lightning can read.

    The names that Lightning resolves itself (``last``, ``best``, …) pass.
    """
    if path in refuse.RESOLVED:
        return
    if not path:
        raise UserError("--ckpt_path", "the name of the file is empty", "name a checkpoint, or leave the option out")
    if "://" in path:
        raise UserError("--ckpt_path", f"'{path}' is not a local file", "download the checkpoint first")
    if not Path(path).exists():
        raise UserError("--ckpt_path", f"there is no file '{path}'", nearby(path))
    if Path(path).is_dir():
        if not any((Path(path) / name).is_file() for name in (".metadata", "meta.pt")):  # those of a sharded one
            last = Path(path) / "checkpoints" / "last.ckpt"
            hint = f"--ckpt_path {last}" if last.is_file() else "name the .ckpt file in it"
            raise UserError("--ckpt_path", f"'{path}' is a folder, and no checkpoint", hint)
        return
    if not zipfile.is_zipfile(path):
        raise UserError(
            "--ckpt_path", f"'{path}' is no checkpoint, or it is cut off", "an adapter file goes to --adapter"
        )
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError("--ckpt_path", f"'{path}' cannot be read", reason) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError("--ckpt_path", f"'{path}' holds no training state", "an adapter file goes to --adapter")


def quiet() -> None:
    """Silence what no reader can act on: Lightning's advertisements and its advice on tiny data."""
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logger = logging.getLogger(f"lightning.pytorch.{name}")
        if _worth_reading not in logger.filters:
            logger.addFilter(_worth_reading)
    for text in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The dirpath has changed from.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
    ):
        warnings.filterwarnings("ignore", text)


def _worth_reading(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(text in message for text in ("Tip:", "TPU available", "`weights_only` was not set"))


def run() -> int:
    """Run the training command in ``sys.argv``; 0, or 2 after the one message of a mistake."""
    from jsonargparse import set_parsing_settings

    command = sys.argv[1]
    debug = os.environ.get("VISADAPT_DEBUG", "") not in ("", "0")
    try:
        set_parsing_settings(import_path_denylist=[])  # enforce the default list: configurations are shared
    except TypeError:  # jsonargparse < 4.50 has no such list
        pass
    quiet()
    sys.path.append(os.getcwd())  # class_path: my_module.MyMethod
    try:
        for file in yaml_files.files(sys.argv[1:]):
            yaml_files.check(file)
        import_plugins()
        CLI()
    except UserError as error:
        if debug:
            raise
        error.show(command)
        return 2
    except Exception as error:
        ours = purposeful(error)
        if debug or ours is None:
            raise
        told(ours, lambda quoted: yaml_files.where(quoted, sys.argv[1:])).show(command)
        if CLI.run_dir_now is not None:
            rundir.discard(CLI.run_dir_now)
        return 2
    return 0
