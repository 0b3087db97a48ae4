"""Random video pipelines of every family, small enough to be built, saved and run within a test."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tests.tiny_diffusion import shake, tiny_pipeline

FRAMES = 3  # not the number of channels


def motion_adapter(channels: tuple[int, ...] = (32, 64), longest: int = 8) -> Any:
    """Motion modules that fit the UNet of `tiny_diffusion`."""
    from diffusers import MotionAdapter

    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = MotionAdapter(
            block_out_channels=channels,
            motion_layers_per_block=1,
            motion_num_attention_heads=4,
            motion_norm_num_groups=8,
            motion_max_seq_length=longest,
        )
    return shake(found, 9)


def _animatediff(folder: Path, **scheduler: Any) -> None:
    tiny_pipeline(folder, "sd", **scheduler)
    motion_adapter().save_pretrained(folder / "motion_adapter")


def _unet3d(folder: Path, **scheduler: Any) -> None:
    from diffusers import StableDiffusionPipeline, TextToVideoSDPipeline, UNet3DConditionModel

    parts = StableDiffusionPipeline.from_pretrained(tiny_pipeline(folder, "sd", **scheduler)).components
    with torch.random.fork_rng():
        torch.manual_seed(6)
        unet = UNet3DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    shutil.rmtree(folder)
    TextToVideoSDPipeline(unet=shake(unet, 7), **kept).save_pretrained(folder)


def _t5(kind: str) -> tuple[Any, Any]:
    """A T5 encoder of one layer and its tokenizer of letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words += [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
    size = {"vocab_size": len(words), "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0)
    config, network = (T5Config, T5EncoderModel) if kind == "t5" else (UMT5Config, UMT5EncoderModel)
    return shake(network(config(**size, feed_forward_proj="gated-gelu")), 4), tokenizer


def _latte(folder: Path, video_length: int = FRAMES, **scheduler: Any) -> None:
    from diffusers import LattePipeline, LatteTransformer3DModel, StableDiffusionPipeline

    parts = StableDiffusionPipeline.from_pretrained(tiny_pipeline(folder, "sd", **scheduler)).components
    shutil.rmtree(folder)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        encoder, tokenizer = _t5("t5")
        transformer = LatteTransformer3DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=32,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=video_length,
        )
    LattePipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=parts["vae"],
        transformer=shake(transformer, 8),
        scheduler=parts["scheduler"],
    ).save_pretrained(folder)


def _wan(folder: Path) -> None:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(7)
        encoder, tokenizer = _t5("umt5")
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 1.0, 1.5, 2.0],
        )
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=shake(vae, 5),
        transformer=shake(transformer, 6),
        scheduler=UniPCMultistepScheduler(**flow),
    ).save_pretrained(folder)


_FAMILIES = {"animatediff": _animatediff, "unet3d": _unet3d, "latte": _latte, "wan": _wan}


@cache
def video_base(family: str = "animatediff", **options: Any) -> str:
    """Folder of a random pipeline of a family, made once in a process: clips of 32x32, latents of 8x8.

    Args:
        family: Its name.
        options: Of the scheduler; for "latte" also ``video_length``.
    """
    folder = Path(mkdtemp(prefix=f"tiny_{family}_"))
    _FAMILIES[family](folder, **options)
    return str(folder)
