"""Latte: a transformer whose blocks look within frames and across them in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from visadapt.backbones.precision import at_least_float32
from visadapt.backbones.video_family import Family, per_frame

_POSITIONS = 120  # of the stock pipeline


class Latte(Family):
    """Latte (Ma et al. 2024, arXiv 2401.03048, code: github.com/Vchitect/Latte): ``LatteTransformer3DModel``.

    The stock pipeline cuts a single prompt, and the empty one beside it, to the prompt's length; several at once it
    pads with zeros that are attended to. Here the padding is masked, which gives what a single prompt gives, and clips
    are rendered one prompt at a time.
    """

    name = "latte"
    pipelines = ("LattePipeline",)
    network = "transformer"
    entry = "pos_embed.proj"
    parts = ("transformer", "vae", "text_encoder")
    spatial = r"transformer_blocks\.\d+"
    temporal = r"temporal_transformer_blocks\.\d+"
    second = clip = False
    frames_argument = "video_length"
    prompts_at_once = False

    def stock(self, parts: Mapping[str, Any]) -> Any:
        """The ``LattePipeline`` of these parts."""
        from diffusers import LattePipeline

        return LattePipeline(**parts)

    def predict(self, network: Any, noisy: Tensor, times: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The prediction, the first half of what the network gives; the other half is a variance."""
        frames, known = noisy.shape[2], self.most_frames(network)
        if frames not in (1, known):
            raise ValueError(f"clips of {frames} frames: this base has positions for {known}, or for single pictures")
        bias = per_frame((1 - text["mask"][:, None].to(noisy)) * -10000, frames)
        found: Tensor = network(noisy, times, text["embeddings"].to(noisy), bias, return_dict=False)[0]
        return found[:, : noisy.shape[1]]

    def most_frames(self, network: Any) -> int:
        """As many as it has positions in time for."""
        return int(network.config.video_length)

    def refused(self, model: Any, frames: int) -> str:
        """It adds all its positions in time, to clips of that length only; to single pictures it adds none."""
        known = self.most_frames(model.transformer)
        return "" if frames in (1, known) else f"'{model.base}' takes {known} frames, no more and no fewer (or 1)"

    def few_frames(self, model: Any, most: int) -> int:
        """Its only number."""
        return self.most_frames(model.transformer)

    def encode_text(self, model: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5's hidden states (B, N, C), and which of them are no padding (B, N), 1 or 0."""
        from visadapt.backbones.video_diffusion import pipeline

        states = pipeline(model).encode_prompt(list(prompts), False, mask_feature=False)[0]
        cleaned = [prompt.lower().strip() for prompt in prompts]  # as the pipeline does
        tokens = model.tokenizer(
            cleaned, padding="max_length", max_length=_POSITIONS, truncation=True, return_tensors="pt"
        )
        return {"embeddings": at_least_float32(states), "mask": tokens.attention_mask.to(states.device).float()}

    def sampling(self, model: Any, prompts: list[str], negative: str | None) -> dict[str, Any]:
        """As other families; captions are taken as they are, whatever packages are there to clean them."""
        return {"prompt": prompts, "negative_prompt": negative or "", "clean_caption": False}
