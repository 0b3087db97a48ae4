"""Where Stable Diffusion's networks lie: which base a name means, and the target presets of its layers."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any, Literal

from torch import nn

TINY = "tiny_sd"
SHIPPED = Path(__file__).parent / "tiny" / TINY
Layout = Literal["sd", "sdxl"]

_PIPELINES: dict[str, Layout] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_UNET: dict[str, list[str]] = {
    "unet.attention": [f"unet.*.attn{i}.{leaf}" for i in (1, 2) for leaf in _ATTENTION],
    "unet.self": [f"unet.*.attn1.{leaf}" for leaf in _ATTENTION],
    "unet.cross": [f"unet.*.attn2.{leaf}" for leaf in _ATTENTION],
    "unet.ff": ["unet.*.ff.net.0.proj", "unet.*.ff.net.2"],
    "unet.convs": ["unet.*.resnets.*.conv1", "unet.*.resnets.*.conv2", "unet.*samplers.*.conv"],
    "unet.proj": ["unet.*.attentions.*.proj_in", "unet.*.attentions.*.proj_out"],
    "unet.time": ["unet.*.time_emb_proj", "unet.time_embedding.linear_?", "unet.add_embedding.linear_?"],
    "unet": ["unet.*"],
}
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_TEXT_MLP = ("mlp.fc1", "mlp.fc2")


def presets(model: Any) -> dict[str, list[str]]:
    """Target presets of a Stable Diffusion: those of its UNet and text encoders that match something.

    ``unet.content`` and ``unet.style`` are the attentions of two blocks, whose choice is B-LoRA's for SDXL: the
    first and the second transformer of ``up_blocks.0`` (Frenkel et al. 2024, arXiv 2403.14572, code:
    github.com/yardenfren1996/B-LoRA). SD 1.x and 2.x have no attention in ``up_blocks.0``; that the first two
    transformers of their first up block with attention play these parts is our choice, and no paper's.

    Args:
        model: Has the children ``unet`` and ``text_encoder``, for SDXL ``text_encoder_2``, and ``layout``.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    up = next((i for i, block in enumerate(model.unet.up_blocks) if hasattr(block, "attentions")), None)
    found = dict(_UNET)
    for block, name in enumerate(() if up is None else ("content", "style")):
        path = f"unet.up_blocks.{up}.attentions.{block}"
        found[f"unet.{name}"] = [f"{path}.*.attn{i}.{leaf}" for i in (1, 2) for leaf in _ATTENTION]
    found |= text_presets(model)
    kept = {name: [p for p in patterns if fnmatch.filter(layers, p)] for name, patterns in found.items()}
    return {name: patterns for name, patterns in kept.items() if patterns}


def text_presets(model: Any) -> dict[str, list[str]]:
    """Target presets of the CLIP text encoders of a model."""
    blocks = text_blocks(model)
    attention = [f"{block}.self_attn.{leaf}" for block in blocks for leaf in _TEXT_ATTENTION]
    mlp = [f"{block}.{leaf}" for block in blocks for leaf in _TEXT_MLP]
    return {"text.attention": attention, "text.mlp": mlp, "text": attention + mlp}


def text_blocks(model: Any) -> list[str]:
    """Paths of the transformer blocks of the text encoders that a gradient reaches.

    SDXL conditions on the last but one hidden state, so the last block of its first encoder computes nothing that is
    used; that of the second feeds the pooled embedding.
    """
    found = []
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(model, part, None)
        if encoder is None:
            continue
        path = next(name for name, _ in encoder.named_modules() if name.endswith("encoder.layers"))
        unused = 1 if model.layout == "sdxl" and part == "text_encoder" else 0
        layers = len(encoder.get_submodule(path)) - unused
        found += [f"{part}.{path}.{i}" for i in range(layers)]
    return found


def weights_place(name: str) -> tuple[str, bool]:
    """What diffusers shall open for a base's name, and whether that is a single file.

    Returns:
        A folder, a file or a hub id; True for a file.

    Raises:
        FileNotFoundError: A path that does not exist, or the shipped base is missing.
        ValueError: A folder without ``model_index.json``, or a file of another kind.
    """
    if name == TINY:
        if not (SHIPPED / "model_index.json").is_file():
            raise FileNotFoundError(
                f"the weights of {TINY} are missing from this installation ('{TINY}/'); "
                "reinstall visadapt, or name another base"
            )
        return str(SHIPPED), False
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in (".safetensors", ".ckpt"):
            raise ValueError(f"backbone name: '{name}' is no .safetensors or .ckpt file; give one, or a folder")
        return str(path), True
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"backbone name: '{name}' has no model_index.json, so it is no pipeline in diffusers' layout; "
                "give the folder that `save_pretrained` wrote (its parent, if this is one part of it)"
            )
        return str(path), False
    if path.suffix in (".safetensors", ".ckpt") or path.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"backbone name: there is no file or folder '{name}'")
    if name.count("/") != 1:
        raise FileNotFoundError(
            f"backbone name: there is no folder '{name}', and a hub id has the form 'owner/name'; "
            f"the base shipped with visadapt is '{TINY}'"
        )
    return name, False


def check_kind(kind: str | None, name: str) -> Layout:
    """The layout of a pipeline by the class that its ``model_index.json`` names.

    Raises:
        ValueError: It is no text-to-image Stable Diffusion.
    """
    if kind not in _PIPELINES:
        raise ValueError(f"'{name}' is a {kind}; StableDiffusion takes {', '.join(sorted(_PIPELINES))}")
    return _PIPELINES[kind]


def layout_of(pipeline: Any) -> Layout:
    """Which layout a loaded pipeline has.

    Raises:
        ValueError: It is no Stable Diffusion that takes text alone, or its projections are fused.
    """
    layout = check_kind(type(pipeline).__name__, "the pipeline")
    unet = pipeline.unet
    if unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise ValueError(
            f"the UNet takes {unet.config.in_channels} channels, the VAE has {pipeline.vae.config.latent_channels}: "
            "this is an inpainting or otherwise conditioned base; give one that takes text alone"
        )
    if any(getattr(module, "fused_projections", False) for module in unet.modules()):
        raise ValueError(
            "`fuse_qkv_projections` has been called: adapters on to_q, to_k and to_v would never run; "
            "call `unfuse_qkv_projections` first"
        )
    return layout
