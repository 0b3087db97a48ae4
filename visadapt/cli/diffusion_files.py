"""Exporting and merging adapters of diffusion models: what is written is loaded by stock code and compared."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visadapt.cli.errors import UserError
from visadapt.interop import Format, export

if TYPE_CHECKING:
    from visadapt.backbones.stable_diffusion import Diffusion, StableDiffusion
    from visadapt.backbones.video_diffusion import VideoDiffusion, VideoModel
    from visadapt.report.certificate import Certificate

USE = {
    "diffusers": 'pipe.load_lora_weights("{folder}", weight_name="{name}")',
    "kohya": 'diffusers: pipe.load_lora_weights("{folder}", weight_name="{name}"); ComfyUI: models/loras',
    "lycoris": "LyCORIS, sd-scripts (--network_module lycoris.kohya)",
    "comfyui": "ComfyUI: models/loras",
    "merged": 'diffusers.DiffusionPipeline.from_pretrained("{folder}")',
}
PEFT_USE = 'peft.PeftModel.from_pretrained(pipe.{part}, "{{folder}}/{part}"), and so for each part'
MARK = "Written by visadapt."
CARD = """---
base_model: {base}
library_name: {library}
pipeline_tag: {task}
tags: [{task}, lora, visadapt]
---
# Adapter of `{base}`

{mark} Load it: `{use}`
"""


def is_diffusion_base(name: str) -> bool:
    """Whether a backbone's name means a Stable Diffusion: the shipped one, a pipeline's folder, a file or a hub id.

    Paths that lead nowhere do, too: timm's models have names, and the diffusion backbone says what is missing.
    """
    from visadapt.backbones.sd_layout import TINY

    path = Path(name).expanduser()
    single = path.suffix in (".safetensors", ".ckpt") and path.is_file()
    hub = name.count("/") == 1 and ":" not in name and not path.exists()  # timm's have "hf-hub:" in front
    nowhere = name.startswith(("/", ".", "~")) and not path.exists()
    return name == TINY or (path / "model_index.json").is_file() or single or hub or nowhere


def is_video_base(name: str) -> bool:
    """Whether a backbone's name means a text-to-video model: folders and hub ids of pipelines say so themselves."""
    from visadapt.backbones.video_diffusion import TINY_VIDEO
    from visadapt.backbones.video_families import FAMILIES

    path = Path(name).expanduser()
    if name == TINY_VIDEO or (path / "motion_adapter").is_dir():
        return True
    kind = _pipeline_class(name)
    video = {pipeline for family in FAMILIES.values() for pipeline in family.pipelines}
    return kind in video and not str(kind).startswith("StableDiffusion")


def _pipeline_class(name: str) -> str | None:
    """The class that a pipeline's folder or hub id names; None where nothing can be read."""
    index = Path(name).expanduser() / "model_index.json"
    if index.is_file():
        found: str | None = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        return found
    if not is_diffusion_base(name) or Path(name).exists() or name.count("/") != 1 or name.startswith(("/", ".", "~")):
        return None  # no hub id: the shipped base, say, of which the Hub must not be asked
    from diffusers import DiffusionPipeline

    try:
        return str(DiffusionPipeline.load_config(name).get("_class_name"))
    except (OSError, ValueError):
        return None  # no network, or nothing there: the backbone will say so


def choose_sets(model: Any, sets: list[str] | None) -> None:
    """Switch off the sets that are not wanted; without a word those of appearance where a motion is beside them.

    Raises:
        UserError: there is no such set.
    """
    import visadapt as va
    from visadapt.backbones.video_diffusion import VideoModel
    from visadapt.tasks.video_sets import MOTION, is_spatial

    names = list(dict.fromkeys(adapter.name for adapter in va.adapters(model).values()))
    if sets is not None:
        if unknown := [name for name in sets if name not in names]:
            raise UserError("--sets", f"there is no set '{unknown[0]}'", f"the file has {', '.join(names)}")
        wanted = set(sets)
    elif isinstance(model, VideoModel) and MOTION in names:
        wanted = {name for name in names if not is_spatial(name)}
    else:
        return
    va.strength(model, None, **{name: 0.0 for name in names if name not in wanted})
    if rest := [name for name in names if name not in wanted]:
        print(f"sets: {', '.join(name for name in names if name in wanted)}; without {', '.join(rest)} (--sets)")


def default_output(format: Format) -> str:
    """Where an export goes if nothing else is said."""
    return {"peft": "peft_adapter", "diffusers": "diffusers_adapter"}.get(format, f"{format}.safetensors")


def export_diffusion(
    recipe: StableDiffusion | VideoDiffusion, model: Any, adapter: Path, output: Path, format: Format,
    rank: int | None, tolerance: float,
) -> None:  # fmt: skip
    """Write an adapter of a diffusion model and its parity certificate.

    Raises:
        UserError: what was written does not do what the trained model does; it is renamed to ``….rejected``.
    """
    from visadapt.backbones.sd_tokens import export_tokens
    from visadapt.interop.diffusers_file import diffusers_path
    from visadapt.report.certificate import certify

    error = export(model, output, format, rank)
    single = output.suffix == ".safetensors"
    tokens = export_tokens(model, output.parent if single else output)
    try:
        certificate = certify(model, recipe.build, output, format, tolerance, tokens)
    except Exception:
        _reject(output, format)
        raise
    if certificate.problems:
        kept = _reject(output, format)
        hint = "--tolerance says how much deviation you accept" if error else f"the file is kept as '{kept}'"
        raise UserError(str(output), "certificate: " + "; ".join(certificate.problems), hint)
    use = USE[format] if format != "peft" else PEFT_USE.format(part="unet" if hasattr(model, "unet") else "transformer")
    _cards(certificate, output, adapter, recipe.name, use)
    how = "exact" if error == 0 else f"largest relative error of a layer {error:.1e}"
    where = diffusers_path(output) if format == "diffusers" else output
    print(f"{output}: {format}, {certificate.tensors} tensors, {how}")
    _tell(certificate)
    for file in tokens:
        print(f'new word: pipe.load_textual_inversion("{file}")')
    print("load it: " + use.format(folder=output if format == "peft" else where.parent, name=where.name))


def _tell(certificate: Certificate) -> None:
    print(
        f"certificate: {certificate.loader} took over {certificate.matched} of {certificate.tensors} tensors; latents "
        f"deviate by {certificate.latents:.1e}, pixels by {certificate.pixels:.1e} (the adapter changes them by "
        f"{certificate.effect:.2g})"
    )


def _cards(certificate: Certificate, output: Path, adapter: Path, base: str, use: str) -> None:
    """The certificate beside the file, in the card of a folder and in that of the adapter's run."""
    from visadapt.report.certificate import write_certificate
    from visadapt.report.facts import FILE, write_text

    card = output / "README.md" if output.is_dir() else None
    if card is not None and (not card.exists() or MARK in card.read_text(encoding="utf-8")):
        library = "peft" if certificate.format == "peft" else "diffusers"
        task = "text-to-video" if certificate.what == "videos" else "text-to-image"
        use = use.format(folder=output, name="pytorch_lora_weights.safetensors")
        write_text(card, CARD.format(mark=MARK, base=base, library=library, task=task, use=use))
    write_certificate(certificate, output, card)
    for folder in list(adapter.resolve().parents)[:3]:
        if (folder / FILE).is_file():
            write_certificate(certificate, output, folder / "README.md")
            break


def _reject(output: Path, format: Format) -> Path:
    """Rename what was written, and nothing else of the folder that it is in."""
    from visadapt.report.certificate import written_files

    kept = output
    for file in written_files(output, format):
        kept = file.with_name(f"{file.name}.rejected")
        os.replace(file, kept)
    return kept


def merge_diffusion(
    recipe: StableDiffusion | VideoDiffusion, model: Any, adapter: Path, output: Path, tolerance: float
) -> None:
    """Write a pipeline's folder with the adapter folded in, and its parity certificate.

    Raises:
        UserError: the output is a file's name, or a folder that holds something else; or what was written does not do
            what the trained model does, and is renamed to ``….rejected``.
    """
    from visadapt.report.certificate import certify_merged

    if output.suffix or (output.exists() and not (output / "model_index.json").is_file() and any(output.iterdir())):
        raise UserError("--output", f"'{output}' should be a new folder: a merged pipeline has a file for each part")

    def write() -> Path:
        _write_merged(model, output)
        return output

    certificate = certify_merged(model, write, recipe.build, lambda path: type(recipe)(str(path)).build(), tolerance)
    if certificate.problems:
        kept = output.with_name(f"{output.name}.rejected")
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(output, kept)
        raise UserError(
            str(output), "certificate: " + "; ".join(certificate.problems), f"the folder is kept as '{kept}'"
        )
    _cards(certificate, output, adapter, recipe.name, USE["merged"])
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: pipeline, {size:,} bytes, {certificate.updates} layers changed")
    _tell(certificate)
    print("load it: " + USE["merged"].format(folder=output))


def _write_merged(model: Diffusion | VideoModel, output: Path) -> None:
    import torch

    import visadapt as va
    from visadapt.backbones.sd_notices import without_notices
    from visadapt.backbones.sd_tokens import bake_tokens
    from visadapt.report.fixed_renders import stock

    va.merge(model)
    bake_tokens(model)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with torch.no_grad(), without_notices():
            stock(model).save_pretrained(temporary)
        for part in ("text_encoder", "text_encoder_2"):
            _old_names(temporary / part / "model.safetensors")
        shutil.rmtree(output, ignore_errors=True)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _old_names(file: Path) -> None:
    """CLIP with `text_model.` in front of each name, which every version of transformers and tool reads."""
    from visadapt.interop.files import read_tensors, replace_tensors
    from visadapt.interop.parts import OLD

    if not file.is_file():
        return
    metadata, tensors = read_tensors(file)
    clip = any(".self_attn.q_proj." in name for name in tensors)
    if clip and not any(name.startswith(OLD) for name in tensors):
        replace_tensors(file, {OLD + name: tensor for name, tensor in tensors.items()}, metadata)
