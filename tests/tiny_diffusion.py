"""Random Stable-Diffusion-shaped pipelines, small enough to be built, saved and run within a test."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

POSITIONS = 24
"""Positions of the text encoders."""
WIDTH = 32
"""Hidden size of the text encoders."""


@cache
def _vocabulary() -> tuple[str, ...]:
    """Byte-level tokens, each also as the end of a word, then the start and end tokens."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [256 + position for position in range(256 - len(visible))]
    letters = [chr(code) for code in [*visible, *moved]]
    return (*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>")


def tokenizer() -> Any:
    """A CLIP tokenizer of single bytes, which encodes and decodes any text."""
    from transformers import CLIPTokenizer

    words = {word: index for index, word in enumerate(_vocabulary())}
    return CLIPTokenizer(vocab=words, merges=[], model_max_length=POSITIONS)


def _text(projection: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(_vocabulary())
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        projection_dim=WIDTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        hidden_act="gelu" if projection else "quick_gelu",
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _unet(layout: str) -> Any:
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {"cross_attention_dim": WIDTH}
    if layout == "sd2":
        options["use_linear_projection"] = True
    if layout == "sdxl":
        options |= {
            "cross_attention_dim": 2 * WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
        }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8 if layout == "sd" else (4, 8),
        norm_num_groups=8,
        **options,
    )


def _vae(layout: str) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.13025 if layout == "sdxl" else 0.18215,
        force_upcast=layout == "sdxl",
        mid_block_add_attention=False,
    )


def shake(module: nn.Module, seed: int) -> nn.Module:
    """Moves every weight off zero (biases and zero-initialised layers too), by a fixed seed."""
    generator = torch.Generator().manual_seed(seed)

    def small(like: Tensor) -> Tensor:
        value = torch.randn(like.shape, generator=generator)
        return 0.02 * (value + value.sign() * 0.1)

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1 + small(parameter) if bool((parameter == 1).all()) else parameter + small(parameter))
    return module.eval()


def tiny_pipeline(folder: Path, layout: str = "sd", **scheduler: Any) -> Path:
    """Saves a random pipeline in diffusers' layout: images of 32x32, latents of 8x8, 24 text positions.

    Args:
        folder: Where to save it.
        layout: `sd` (one text encoder), `sd2` (the same with linear projections, as SD 2.x has) or `sdxl` (two, pooled
            text and time ids).
        scheduler: Entries of the scheduler's configuration, such as `prediction_type="v_prediction"`.

    Returns:
        The folder.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts: dict[str, Any] = {"unet": _unet(layout), "vae": _vae(layout), "text_encoder": _text(False)}
        if layout == "sdxl":
            parts["text_encoder_2"] = _text(True)
    for seed, part in enumerate(parts.values(), 1):
        shake(part, seed)
    noise: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    noise |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    parts |= {"tokenizer": tokenizer(), "scheduler": DDIMScheduler(**(noise | scheduler))}
    pipeline: Any
    if layout == "sdxl":
        pipeline = StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer(), add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    return folder
