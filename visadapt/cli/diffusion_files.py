"""Exporting and merging adapters of Stable Diffusion: what is written is loaded by stock code and compared."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visadapt.cli.errors import UserError
from visadapt.interop import Format, export

if TYPE_CHECKING:
    from visadapt.backbones.stable_diffusion import Diffusion, StableDiffusion

USE = {
    "diffusers": 'pipe.load_lora_weights("{folder}", weight_name="{name}")',
    "kohya": 'diffusers: pipe.load_lora_weights("{folder}", weight_name="{name}"); ComfyUI: models/loras',
    "lycoris": "LyCORIS, sd-scripts (--network_module lycoris.kohya)",
    "comfyui": "ComfyUI: models/loras",
    "peft": 'peft.PeftModel.from_pretrained(pipe.unet, "{folder}/unet"), and so for each part',
}
MARK = "Written by visadapt."
CARD = """---
base_model: {base}
library_name: {library}
pipeline_tag: text-to-image
tags: [text-to-image, lora, visadapt]
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


def default_output(format: Format) -> str:
    """Where an export goes if nothing else is said."""
    return {"peft": "peft_adapter", "diffusers": "diffusers_adapter"}.get(format, f"{format}.safetensors")


def export_diffusion(
    recipe: StableDiffusion, model: Any, adapter: Path, output: Path, format: Format, rank: int | None, tolerance: float
) -> None:
    """Write an adapter of Stable Diffusion and its parity certificate.

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
    _cards(certificate, output, adapter, recipe.name, format)
    how = "exact" if error == 0 else f"largest relative error of a layer {error:.1e}"
    where = diffusers_path(output) if format == "diffusers" else output
    print(f"{output}: {format}, {certificate.tensors} tensors, {how}")
    print(
        f"certificate: {certificate.loader} took over {certificate.matched} of {certificate.tensors} tensors; latents "
        f"deviate by {certificate.latents:.1e}, pixels by {certificate.pixels:.1e} (the adapter changes them by "
        f"{certificate.effect:.2g})"
    )
    for file in tokens:
        print(f'new word: pipe.load_textual_inversion("{file}")')
    print("load it: " + USE[format].format(folder=output if format == "peft" else where.parent, name=where.name))


def _cards(certificate: Any, output: Path, adapter: Path, base: str, format: Format) -> None:
    """The certificate beside the file, in the card of a folder and in that of the adapter's run."""
    from visadapt.report.certificate import write_certificate
    from visadapt.report.facts import FILE, write_text

    card = output / "README.md" if output.is_dir() else None
    if card is not None and (not card.exists() or MARK in card.read_text(encoding="utf-8")):
        library = "peft" if format == "peft" else "diffusers"
        use = USE[format].format(folder=output, name="pytorch_lora_weights.safetensors")
        write_text(card, CARD.format(mark=MARK, base=base, library=library, use=use))
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


def merge_diffusion(model: Diffusion, output: Path) -> None:
    """Write a pipeline's folder with the adapter folded in, and say how far the UNet's outputs are apart.

    Raises:
        UserError: the output is a file's name, or a folder that holds something else.
    """
    import torch

    import visadapt as va
    from visadapt.backbones.sd_notices import without_notices
    from visadapt.backbones.sd_tokens import bake_tokens
    from visadapt.backbones.stable_diffusion import pipeline

    if output.suffix or (output.exists() and not (output / "model_index.json").is_file() and any(output.iterdir())):
        raise UserError("--output", f"'{output}' should be a new folder: a merged pipeline has a file for each part")
    before = _probe(model.eval())
    error = float((_probe(va.merge(model)) - before).abs().max() / before.abs().max())
    bake_tokens(model)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with torch.no_grad(), without_notices():
            pipeline(model).save_pretrained(temporary)
        for part in ("text_encoder", "text_encoder_2"):
            _old_names(temporary / part / "model.safetensors")
        shutil.rmtree(output, ignore_errors=True)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: pipeline, {size:,} bytes")
    print(f"the UNet's outputs with the adapter and after merging differ by {error:.1e} (relative, largest)")
    print(f'load it: diffusers.DiffusionPipeline.from_pretrained("{output}")')


def _probe(model: Diffusion) -> Any:
    """What the UNet predicts from noise and the text of a prompt."""
    import torch

    from visadapt.backbones.sd_text import encode_prompts

    generator = torch.Generator().manual_seed(0)
    side = model.unet.config.sample_size
    noise = torch.randn(1, model.unet.config.in_channels, side, side, generator=generator)
    with torch.no_grad():
        return model(noise, torch.tensor([500]), encode_prompts(model, ["a red circle"]))


def _old_names(file: Path) -> None:
    """Text encoders with `text_model.` in front of each name, which every version of transformers and tool reads."""
    from visadapt.interop.files import read_tensors, replace_tensors
    from visadapt.interop.parts import OLD

    if not file.is_file():
        return
    metadata, tensors = read_tensors(file)
    if not any(name.startswith(OLD) for name in tensors):
        replace_tensors(file, {OLD + name: tensor for name, tensor in tensors.items()}, metadata)
