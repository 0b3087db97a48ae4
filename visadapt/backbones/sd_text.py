"""Prompts → embeddings, as the stock pipelines of SD and SDXL make them for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visadapt.backbones.precision import at_least_float32


def encode_prompts(model: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Text conditions of a ``Diffusion``; the gradient reaches its text encoders.

    SD 1.x and 2.x: the last hidden state, after the final norm. SDXL (Podell et al. 2023, arXiv 2307.01952): the
    last but one hidden states of both encoders side by side, and the second's projected embedding. Prompts that are
    too long are cut; a token of several vectors (see ``sd_tokens``) is spelt out.

    Args:
        model: What ``StableDiffusion.build`` made.
        prompts: B texts.

    Returns:
        ``embeddings`` (B, N, C) and, for SDXL, ``pooled`` (B, D), in at least float32.
    """
    if model.layout == "sd":
        states = model.text_encoder(token_ids(model, model.tokenizer, prompts)).last_hidden_state
        return {"embeddings": at_least_float32(states)}
    parts, pooled = [], None
    for tokenizer, encoder in ((model.tokenizer, model.text_encoder), (model.tokenizer_2, model.text_encoder_2)):
        output = encoder(token_ids(model, tokenizer, prompts), output_hidden_states=True)
        parts.append(output.hidden_states[-2])
        pooled = getattr(output, "text_embeds", None)
    assert pooled is not None  # the second encoder has a projection
    return {"embeddings": at_least_float32(torch.cat(parts, -1)), "pooled": at_least_float32(pooled)}


def token_ids(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token numbers (B, N) on the device of the model, padded and cut to the length of the tokenizer."""
    spelt = [spelt_out(tokenizer, prompt) for prompt in prompts]
    found = tokenizer(
        spelt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return found.input_ids.to(model.unet.conv_in.weight.device)


def spelt_out(tokenizer: Any, prompt: str) -> str:
    """The prompt with ``<name>`` as ``<name> <name>_1 …`` where the tokenizer has such further vectors.

    The stock pipelines do the same (``TextualInversionLoaderMixin.maybe_convert_prompt``).
    """
    added = tokenizer.get_added_vocab()
    for token in added:
        if f"{token}_1" in added and token in prompt:
            count = 1
            while f"{token}_{count}" in added:
                count += 1
            prompt = prompt.replace(token, " ".join([token, *(f"{token}_{i}" for i in range(1, count))]))
    return prompt


def null_text(model: Any) -> dict[str, Tensor]:
    """The condition (1, …) that inference takes for "no prompt", to drop captions by.

    That is the empty caption, or zeros where the pipeline's configuration says so (SDXL's
    ``force_zeros_for_empty_prompt``).
    """
    found = encode_prompts(model, [""])
    return {key: torch.zeros_like(value) for key, value in found.items()} if model.zeros_for_empty else found


def recompute_text(encoder: Any) -> None:
    """Turn gradient checkpointing of a text encoder on; non-reentrant, so frozen inputs still give gradients."""
    how = {"use_reentrant": False}
    if hasattr(encoder, "activation_checkpointing_enable"):  # its name from transformers 5 on
        encoder.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
