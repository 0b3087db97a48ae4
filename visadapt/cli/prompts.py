"""``visadapt predict --prompts …``: its options, and prompts as data for a text-to-image or text-to-video model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from visadapt.cli.errors import UserError, nearby
from visadapt.data.captioned_data import CaptionedData
from visadapt.data.text_prompts import TextPrompts

BATCH = 8  # pictures at once, unless the command line says otherwise
PREVIEW = ("steps", "guidance", "size", "negative")  # options that stand for those of the task's preview
BEGINNINGS = ("image", "clip")  # what a video may start from; one of them at most
OF_VIDEOS = ("frames", *BEGINNINGS, "share")
RENDERED = ("pictures", "videos")  # kinds of tasks that render prompts
OPTIONS = ("prompts", "seeds", *PREVIEW, *OF_VIDEOS, "batch_size", "backbone")


def add_options(parser: ArgumentParser) -> None:
    """Options of ``predict`` that matter to models of text alone; what is not given is as in the run's preview."""
    group = parser.add_argument_group("Pictures and videos: prompts for a text-to-image or text-to-video model")
    group.add_argument(
        "--prompts", type=str, nargs="+",
        help="Texts, or .txt files with one in each line (default: the captions of the held-out data).",
    )  # fmt: skip
    group.add_argument("--seeds", type=int, nargs="+", help="Seeds of each prompt, a picture each.")
    group.add_argument("--steps", type=int | None, help="Steps of the sampler.")
    group.add_argument("--guidance", type=float | None, help="Scale of classifier-free guidance; 1 is off.")
    group.add_argument("--size", type=int, nargs="+", help="Side in pixels, or height and width.")
    group.add_argument("--negative", type=str | None, help="Negative prompt.")
    group.add_argument("--batch_size", type=int | None, help=f"Pictures or videos at once (default: {BATCH}).")
    group.add_argument(
        "--backbone", type=str | None,
        help="Model to render with, instead of a configuration: tiny_sd, tiny_video, a pipeline's folder, a hub id.",
    )  # fmt: skip
    group.add_argument("--frames", type=int | None, help="Frames of a video.")
    group.add_argument("--image", type=str | None, help="Picture that a video brings to motion.")
    group.add_argument("--clip", type=str | None, help="Video or folder of frames whose noise a video starts from.")
    group.add_argument("--share", type=float | None, help="Share of the noise of --image or --clip; the rest is new.")


def with_backbone(args: list[str], name: str) -> list[str]:
    """The arguments with what makes a task of a diffusion model, for adapter files without a run."""
    from visadapt.cli.diffusion_files import is_video_base

    if any(arg.startswith("--model.backbone.motion_adapter") for arg in args) or is_video_base(name):
        made = ["--model=TextToVideo", "--model.backbone=VideoDiffusion", "--model.paths.mode=single"]
    else:
        made = ["--model=TextToImage", "--model.backbone=StableDiffusion"]
    return [*made, f"--model.backbone.name={name}", "--data=TextPrompts", *args]


def refuse(config: Namespace) -> None:
    """Say that options for prompts do not suit another task.

    Raises:
        UserError: One is given.
    """
    for option in OPTIONS:
        if config.get(option) is not None:
            raise UserError(
                f"--{option}",
                "only a text-to-image or text-to-video model renders prompts",
                "this model takes --images",
            )


def use_prompts(config: Namespace) -> None:
    """Replace the data of a configuration by prompts, and the settings of its preview by those of the command line.

    Args:
        config: Parsed configuration of ``predict``; changed in place.

    Raises:
        UserError: No prompts and no data with captions, a file that is missing, or images.
    """
    preview = config["model"]["init_args"]["preview"]
    videos = "frames" in preview
    if config.get("images") is not None:
        more = ", and --image PICTURE to start from one" if videos else ""
        raise UserError("--images", "this model renders prompts", f"give --prompts TEXT …{more}")
    for prompt in config.get("prompts") or ():
        if prompt.lower().endswith(".txt") and not Path(prompt).is_file():
            raise UserError("--prompts", f"there is no file '{prompt}'", nearby(prompt))
    if videos and any(config.get(option) is not None for option in BEGINNINGS):
        preview["image"] = preview["clip"] = preview["share"] = None  # it takes the place of the configuration's
    elif videos and config.get("share") is not None and preview["image"] is None and preview["clip"] is None:
        raise UserError("--share", "there is no picture or clip to share noise with", "give --image or --clip, too")
    for option in (*PREVIEW, *OF_VIDEOS):
        if config.get(option) is None:
            continue
        if option in OF_VIDEOS and not videos:
            raise UserError(f"--{option}", "only a text-to-video model takes this", "leave it out")
        if option in BEGINNINGS and not Path(config[option]).exists():
            raise UserError(f"--{option}", f"there is no file '{config[option]}'", nearby(config[option]))
        preview[option] = config[option]
    chosen: dict[str, Any] = {"prompts": None, "source": None, "seeds": config.get("seeds")}
    chosen["batch_size"] = config.get("batch_size") or BATCH
    data = config.get("data")
    if config.get("prompts"):
        chosen["prompts"] = config["prompts"]
    elif _is(data, CaptionedData):
        chosen["source"] = data
    elif _is(data, TextPrompts) and data["init_args"].get("prompts"):
        own = {key: value for key, value in data["init_args"].items() if value is not None}
        chosen = own | {key: config[key] for key in ("batch_size", "seeds") if config.get(key) is not None}
    else:
        raise UserError("--prompts", "this is required and missing", "give texts, or .txt files with one in each line")
    config["data"] = Namespace(class_path="visadapt.data.text_prompts.TextPrompts", init_args=Namespace(**chosen))
    config["return_predictions"] = False  # they are written as they come


def _is(data: Namespace | None, kind: type) -> bool:
    if data is None:
        return False
    module, _, name = data["class_path"].rpartition(".")
    return issubclass(getattr(import_module(module), name), kind)
