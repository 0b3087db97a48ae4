"""Adapters that runs have left, and the base, the classes or the whole task that belong to one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visadapt.cli import files
from visadapt.cli.errors import UserError
from visadapt.cli.inspect import describe
from visadapt.cli.main import find_config
from visadapt.cli.rundir import adapter_file, set_names
from visadapt.report.facts import ADAPTER

BASES = ("tiny_digits", "tiny_sam", "tiny_sd", "tiny_video")  # that come with visadapt


def task_name(adapter: Path) -> str:
    """Class of the task whose run wrote an adapter; empty if there is no configuration beside it."""
    import yaml

    found = find_config(str(adapter))
    model = (yaml.safe_load(found.read_text(encoding="utf-8")) or {}).get("model") if found else None
    return str((model or {}).get("class_path", "")).rpartition(".")[2]


def newest(tasks: Sequence[str], root: Path | None = None) -> list[Path]:
    """The last adapter of each run name below ``runs/`` whose task is one of ``tasks``, the newest first.

    Args:
        tasks: Names of classes of tasks.
        root: Folder of the runs; None is ``runs`` in the working directory.
    """
    found: dict[str, Path] = {}
    places = (root or Path("runs")).glob(f"*/*/{ADAPTER}")
    for path in sorted(places, key=lambda path: path.stat().st_mtime, reverse=True):
        name = path.parent.parent.name
        if name not in found and task_name(path) in tasks:
            found[name] = path
    return list(found.values())


def told(path: Path) -> str:
    """What the page calls an adapter: its file, the run's name and time; not where on the machine it lies."""
    return "/".join(path.resolve().parts[-3:])


def given(adapters: Sequence[str | Path]) -> list[Path]:
    """Files of the command line; a run's folder means its adapter.

    Raises:
        UserError: one is not there.
    """
    paths = [Path(adapter_file(str(path))).expanduser() for path in adapters]
    for path in paths:
        if not path.exists():
            raise UserError("--adapter", f"there is no file '{path}'")
    return paths


def base_of(adapter: Path) -> str | None:
    """None where the run's configuration names the base; else the shipped base that the file itself names.

    Raises:
        UserError: neither.
    """
    if find_config(str(adapter)):
        return None
    stated = stated_base(adapter)
    if stated in BASES:
        return stated
    raise UserError(
        adapter.name,
        f"its base is '{stated or 'not named'}', which is not shipped with visadapt",
        f"keep config.yaml of its run beside it, name its base (--base), or use a file on one of: {', '.join(BASES)}",
    )


def stated_base(adapter: Path) -> str:
    """What an adapter file says that its base is called; empty if it does not."""
    return dict(describe(adapter).facts).get("base", "").partition(" ")[0]


def options(adapter: Path) -> dict[str, Any]:
    """Arguments of the task of the run that wrote an adapter, as its configuration has them; empty without one."""
    import yaml

    found = find_config(str(adapter))
    model = (yaml.safe_load(found.read_text(encoding="utf-8")) or {}).get("model") if found else None
    return dict((model or {}).get("init_args") or {})


def certificate(adapter: Path) -> str:
    """What is proved of the exports of an adapter, as Markdown: its own certificate, else that of its run's card."""
    from visadapt.report.certificate import certified

    places = [adapter / "certificate.json", adapter.with_suffix(".certificate.json")]
    places += [adapter.parent / "certificate.json", adapter.parent / "README.md"]
    return next(filter(None, map(certified, places)), "")


def classifier(adapters: Sequence[Path]) -> tuple[Any, Any, list[str]]:
    """Recipe, network with all the sets, and names of the classes.

    Raises:
        UserError: two adapters belong to different bases or classes.
    """
    from visadapt.backbones.timm_vit import TimmViT
    from visadapt.methods import METHODS  # noqa: F401 - a file names methods, their classes must be imported
    from visadapt.tasks.start import load_file

    recipe: Any = (
        files.base_recipe(adapters[0], None, base_of(adapters[0]), None) if adapters else TimmViT("tiny_digits")
    )
    if not isinstance(recipe, TimmViT):
        raise UserError(str(adapters[0]), f"this belongs to a {type(recipe).__name__}, not to a classifier")
    names = files.class_names(adapters[0]) if adapters else []
    for other in adapters[1:]:
        theirs = files.base_recipe(other, None, base_of(other), None)
        if vars(theirs) != vars(recipe) or files.class_names(other) != names:
            raise UserError(str(other), f"this has another base or other classes than '{adapters[0]}'")
    model: Any = recipe.build(len(names) or None, names or None)
    for path, name in zip(adapters, set_names([str(path) for path in adapters]), strict=True):
        load_file(model, path, name)
    names = names or list(recipe.class_names or ()) or [f"class {i}" for i in range(model.num_classes)]
    return recipe, model.eval(), names


def task(adapter: Path) -> tuple[Any, list[str]]:
    """The task of the run that wrote an adapter, with it on the network, and the names of the classes.

    Raises:
        UserError: no configuration lies beside the file.
    """
    import yaml
    from jsonargparse import ArgumentParser

    from visadapt.cli.fit import import_plugins
    from visadapt.report.facts import read_facts
    from visadapt.tasks.base import BaseTask
    from visadapt.tasks.start import load_file

    found = find_config(str(adapter))
    if found is None:
        raise UserError(adapter.name, "no config.yaml beside it says which task it belongs to", "use it in its run")
    import_plugins()
    settings = yaml.safe_load(found.read_text(encoding="utf-8"))["model"]
    names = list(read_facts(adapter).get("class_names", ()))
    options = dict(settings.get("init_args") or {}) | {"adapters": [], "start": None}
    if names:
        options["num_classes"] = len(names)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BaseTask, "model")
    parsed = parser.parse_object({"model": {"class_path": settings["class_path"], "init_args": options}})
    made: Any = parser.instantiate_classes(parsed).model
    made.configure_model()
    load_file(made.model, adapter)
    return made.eval(), names or ["background", *(f"class {i}" for i in range(1, made.num_classes))]


def base_name(adapter: Path) -> str:
    """Name of the base in the configuration of an adapter's run, else in the file itself; empty if neither says."""
    own = options(adapter).get("backbone") or {}
    return str((own.get("init_args") or own).get("name", "")) or stated_base(adapter)


def diffusion(adapters: Sequence[Path], base: str | None) -> Any:
    """Recipe of the Stable Diffusion that adapters belong to.

    Args:
        adapters: Their files; the first one says it. None of them is the shipped base.
        base: Folder, file or hub id of the base, if it is given.

    Raises:
        UserError: the first adapter belongs to another kind of model, or does not say to which.
    """
    from visadapt.backbones.stable_diffusion import StableDiffusion

    if base is not None:
        return StableDiffusion(base)
    if not adapters:
        return StableDiffusion()
    recipe = files.base_recipe(adapters[0], None, base_of(adapters[0]), None)
    if not isinstance(recipe, StableDiffusion):
        raise UserError(str(adapters[0]), f"this belongs to a {type(recipe).__name__}, not to a Stable Diffusion")
    return recipe


def video(adapters: Sequence[Path], base: str | None) -> Any:
    """Recipe of the video network: the given one, else that of the first adapter of a motion, else the shipped one."""
    from visadapt.backbones.video_diffusion import VideoDiffusion

    if base is not None:
        return VideoDiffusion(base)
    motion = next((path for path in adapters if task_name(path) == "TextToVideo"), None)
    if motion is not None:
        return files.base_recipe(motion, None, None, None)
    return VideoDiffusion()
