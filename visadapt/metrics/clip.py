"""CLIP score from a local CLIP folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=1)
def load_clip(folder: str) -> tuple[Any, Any]:
    """Model and processor of a folder in transformers' layout.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no CLIP.
        ImportError: transformers is missing.
    """
    if not Path(folder).expanduser().is_dir():
        raise FileNotFoundError(f"model.measures.clip: there is no folder '{folder}'")
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise ImportError(f"CLIP needs transformers: pip install 'visadapt[diffusion]' ({error})") from error
    place = str(Path(folder).expanduser())
    try:
        with torch.random.fork_rng(devices=[]):
            model = CLIPModel.from_pretrained(place, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model.measures.clip: '{folder}' cannot be loaded: {reason}") from error
    return model.eval().requires_grad_(False), processor


@torch.no_grad()
def clip_score(images: Tensor, prompts: Sequence[str], folder: str) -> Tensor:
    """100 · max(cos(image, prompt), 0) of CLIP's embeddings (B,).

    Hessel et al. 2021, arXiv 2104.08718 (code: github.com/jmhessel/clipscore), whose factor is 2.5; that of 100 is
    torchmetrics', whose own class fails with transformers 5. A mean of it has no bias at any number of pictures.
    Long prompts are cut at CLIP's 77 tokens.

    Args:
        images: (B, 3, H, W) in 0 … 1.
        prompts: B texts.
        folder: A CLIP model in transformers' layout.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no CLIP.
    """
    model, processor = load_clip(folder)
    pixels = processor.image_processor(list(images.float().cpu()), do_rescale=False, return_tensors="pt")
    texts = processor.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
    output = model.to(images.device)(
        input_ids=texts["input_ids"].to(images.device),
        attention_mask=texts["attention_mask"].to(images.device),
        pixel_values=pixels["pixel_values"].to(images.device),
    )
    return 100 * F.cosine_similarity(output.image_embeds.float(), output.text_embeds.float()).clamp_min(0).cpu()
