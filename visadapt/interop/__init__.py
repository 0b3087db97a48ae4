"""Files of other tools: written so that those tools load them, and read back.

Nothing here imports torch before a function is called: `visadapt inspect` uses `interop.keys` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from torch import nn

Model = TypeVar("Model", bound="nn.Module")
Format = Literal["peft", "diffusers", "kohya", "lycoris", "comfyui"]

__all__ = ["Format", "export", "load"]


def load(model: Model, path: str | Path, strict: bool = False, name: str | None = None) -> Model:
    """Rebuild the adapters of a file or folder on a model, whichever tool wrote it.

    Args:
        model: the base.
        path: `adapter.safetensors` of visadapt; a PEFT folder (for a diffusion model also one folder per part:
            `unet/`, `text_encoder/` …); `pytorch_lora_weights.safetensors` of diffusers or the folder with it; a
            single file of kohya, LyCORIS or ComfyUI.
        strict: refuse a base that is not the one it was trained on, instead of warning (visadapt's own files; those
            of other tools do not say).
        name: name of the set.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the file is of another kind or does not fit the model.
    """
    from visadapt.core.state import load_native
    from visadapt.interop.diffusers_file import FILE
    from visadapt.interop.peft import import_peft
    from visadapt.interop.read import import_lora, is_lora_file

    path = Path(path)
    if path.is_dir() and (path / FILE).is_file():
        path = path / FILE
    if path.is_dir():
        return import_peft(model, path, name or "default")
    if is_lora_file(path):
        return import_lora(model, path, name or "default")
    return load_native(model, path, strict, name)


def export(model: nn.Module, path: str | Path, format: Format = "peft", rank: int | None = None) -> float:
    """Write the adapters in the format of another tool.

    Args:
        model: the adapted model; for all but "peft" a diffusion model or its UNet.
        path: folder ("peft"; "diffusers" takes a folder or a .safetensors file) or .safetensors file to write.
        format: "peft": a folder for stock PEFT. "diffusers": `pipe.load_lora_weights`. "kohya": one file of plain
            LoRA, which every tool reads. "lycoris": one file with DoRA, LoHa, LoKr and Tucker cores as they are, for
            LyCORIS and sd-scripts. "comfyui": the same for ComfyUI, which divides DoRA by another norm.
        rank: rank of the SVD for changes that the format cannot hold as they are; None refuses them.

    Returns:
        The largest relative error of a layer's update; 0.0 if all are exact.

    Raises:
        ValueError: an unknown format, or a change that the format cannot hold.
    """
    from visadapt.interop.video import check_layers

    check_layers(model, format)
    if format == "peft":
        from visadapt.interop.peft import export_peft

        return export_peft(model, path, rank)
    if format == "diffusers":
        from visadapt.interop.diffusers_file import export_diffusers

        return export_diffusers(model, path, rank)
    if format in ("kohya", "lycoris", "comfyui"):
        from visadapt.interop.kohya import export_kohya

        return export_kohya(model, path, rank, reader=format)
    raise ValueError(f"format {format!r} is not written; there is 'peft', 'diffusers', 'kohya', 'lycoris', 'comfyui'")
