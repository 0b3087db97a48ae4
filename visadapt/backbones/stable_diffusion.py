"""Stable Diffusion 1.x, 2.x and XL as a backbone: diffusers' own modules under fixed names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visadapt.backbones.base import Backbone
from visadapt.backbones.precision import at_least_float32
from visadapt.backbones.sd_layout import TINY, Layout, check_kind, layout_of, presets, weights_place
from visadapt.backbones.sd_lean import lean_unet
from visadapt.backbones.sd_notices import no_progress_bars
from visadapt.backbones.sd_schedule import Prediction, schedulers
from visadapt.backbones.sd_text import recompute_text

MISSING = "Stable Diffusion needs diffusers and transformers: pip install 'visadapt[diffusion]'"


class Diffusion(nn.Module):
    """The networks of a pipeline as children ``unet``, ``vae``, ``text_encoder`` and, for SDXL, ``text_encoder_2``.

    Attributes:
        tokenizer: Of ``text_encoder``; ``tokenizer_2`` is that of the second, or None.
        scheduler: The noise schedule that training follows (its ``alphas_cumprod``, number of steps).
        sampler: The scheduler of inference, with the same noise schedule and prediction.
        prediction: What the UNet predicts: "epsilon", "v_prediction" or "flow".
        layout: "sd" or "sdxl".
        base: Name of the base.
        zeros_for_empty: Whether "no prompt" is zeros rather than the empty caption.
        attention_slicing: Whether pictures are rendered with sliced attention.
        adapter_presets: Target preset → patterns.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any

    def __init__(self, pipeline: Any, base: str, prediction: Prediction | None = None, zero_snr: bool = False) -> None:
        super().__init__()
        self.layout: Layout = layout_of(pipeline)
        self.unet, self.vae, self.text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
        self.tokenizer, self.tokenizer_2 = pipeline.tokenizer, None
        if self.layout == "sdxl":
            self.text_encoder_2, self.tokenizer_2 = pipeline.text_encoder_2, pipeline.tokenizer_2
            if pipeline.tokenizer is None or self.text_encoder is None:
                raise ValueError(f"'{base}' has one text encoder only: this is SDXL's refiner; give the base model")
        self.scheduler, self.sampler, self.prediction = schedulers(pipeline.scheduler, prediction, zero_snr)
        self.zeros_for_empty = bool(pipeline.config.get("force_zeros_for_empty_prompt", False))
        self.base = base
        self.attention_slicing = False
        self.adapter_presets = presets(self)

    def forward(self, noisy: Tensor, times: Tensor, text: dict[str, Tensor], sizes: Tensor | None = None) -> Tensor:
        """The UNet's prediction (B, C, h, w), in at least float32.

        Args:
            noisy: Noisy latents (B, C, h, w).
            times: What the UNet is told of the time (B,): the step 0 … T−1, for flow matching u · T.
            text: What ``sd_text.encode_prompts`` gives.
            sizes: SDXL's micro-conditioning (B, 6): original height and width, crop top and left, target height
                and width (Podell et al. 2023, arXiv 2307.01952, section 2.2). None: uncropped at the latents' size.
        """
        dtype = self.unet.conv_in.weight.dtype
        extra = None
        if self.layout == "sdxl":
            sizes = self._whole(noisy) if sizes is None else sizes
            extra = {"text_embeds": text["pooled"].to(dtype), "time_ids": sizes.to(noisy.device, dtype)}
        found = self.unet(
            noisy.to(dtype), times, text["embeddings"].to(dtype), added_cond_kwargs=extra, return_dict=False
        )[0]
        return at_least_float32(found)

    def _whole(self, noisy: Tensor) -> Tensor:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = noisy.shape[-2] * factor, noisy.shape[-1] * factor
        return torch.tensor([[height, width, 0, 0, height, width]]).expand(len(noisy), -1)


class StableDiffusion(Backbone):
    """Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752) and SDXL (Podell et al. 2023, arXiv 2307.01952).

    Presets: ``unet.attention`` (``unet.self`` and ``unet.cross``), ``unet.ff``, ``unet.convs`` (residual blocks and
    samplers), ``unet.proj``, ``unet.time``, ``unet`` (every Linear and convolution of it), ``unet.content`` and
    ``unet.style`` (see ``sd_layout.presets``), ``text.attention``, ``text.mlp``, ``text``.

    Args:
        name: "tiny_sd", the small base shipped with visadapt; a folder in diffusers' layout; a hub id ("owner/name");
            or one .safetensors or .ckpt file with all weights.
        revision: Branch, tag or commit of a hub id.
        variant: Which weights of a folder or hub id, such as "fp16".
        config: For a single file: folder or hub id that holds the configuration and tokenizers; None lets diffusers
            recognise the model and fetch them.
        base_dtype: Precision of the frozen networks; adapters and what trains are float32, and so is SDXL's VAE.
        grad_checkpointing: Recompute the blocks' activations in backward: less memory, more time.
        channels_last: Keep the convolutions' weights channels last, which GPUs compute faster with bf16.
        attention_slicing: Render pictures with attention in slices: less memory, slower.
        prediction: What the UNet predicts; None takes what the base's scheduler says. "flow" is rectified flow.
        zero_snr: Rescale the noise schedule so that the last step is pure noise (Lin et al. 2023,
            arXiv 2305.08891), in training and in sampling; needs "v_prediction".
        lean: Make norms, activations and the inputs of adapted layers again in backward where that costs little,
            instead of keeping them; outputs and gradients stay the same.
    """

    def __init__(
        self,
        name: str = TINY,
        revision: str | None = None,
        variant: str | None = None,
        config: str | None = None,
        base_dtype: Literal["float32", "bfloat16"] = "float32",
        grad_checkpointing: bool = False,
        channels_last: bool = False,
        attention_slicing: bool = False,
        prediction: Prediction | None = None,
        zero_snr: bool = False,
        lean: bool = True,
    ) -> None:
        self.name = name
        self.revision, self.variant, self.config = revision, variant, config
        self.base_dtype = base_dtype
        self.grad_checkpointing, self.channels_last = grad_checkpointing, channels_last
        self.attention_slicing = attention_slicing
        self.prediction: Prediction | None = prediction
        self.zero_snr, self.lean = zero_snr, lean

    def build(self, num_classes: int | None = None, class_names: Sequence[str] | None = None) -> Diffusion:
        """Load the pipeline and take its networks; there are no classes, so the arguments change nothing.

        Raises:
            ValueError: not loadable (a hub id without network, damaged files), a pipeline of another kind, or options
                that contradict each other.
            FileNotFoundError: the folder or file does not exist.
            ImportError: diffusers or transformers is missing.
        """
        model: Any = Diffusion(self._load(), self.name, self.prediction, self.zero_snr)
        dtype = getattr(torch, self.base_dtype)
        for part in model.children():  # Module.to: diffusers' own advises against itself
            nn.Module.to(part, torch.float32 if part is model.vae and model.vae.config.force_upcast else dtype)
        if self.channels_last:
            model.unet.to(memory_format=torch.channels_last)
            model.vae.to(memory_format=torch.channels_last)
        if self.lean:
            lean_unet(model.unet)
        if self.grad_checkpointing:
            model.unet.enable_gradient_checkpointing()  # non-reentrant: frozen inputs still give gradients
            for name, part in model.named_children():
                if name.startswith("text_encoder"):
                    recompute_text(part)
        model.attention_slicing = self.attention_slicing
        return model

    def hparams(self) -> dict[str, Any]:
        """The constructor's arguments, which a checkpoint keeps to build the same again."""
        return dict(vars(self))

    def preprocess(self, train: bool) -> Callable[[Any], Tensor]:
        """Give the conversion of a PIL image to (3, H, W) in -1 … 1; sizes are the data module's affair."""
        return to_signed

    def _load(self) -> Any:
        place, single = weights_place(self.name)
        try:
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise ImportError(f"{MISSING} ({error})") from error
        try:
            with no_progress_bars():
                if single:
                    return self._single(place)
                options = {"revision": self.revision, "variant": self.variant}
                kind = DiffusionPipeline.load_config(place, revision=self.revision).get("_class_name")
                options |= _NO_CHECKER if check_kind(kind, self.name) == "sd" else {}
                return DiffusionPipeline.from_pretrained(place, **options)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            hint = _NEEDS_CONFIG if single and self.config is None else ""
            raise ValueError(f"backbone name: '{self.name}' cannot be loaded: {reason}{hint}") from error

    def _single(self, place: str) -> Any:
        """A single file: its tensors tell the model, its configuration and tokenizers come from ``config``."""
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
        from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

        kind = infer_diffusers_model_type(load_single_file_checkpoint(place))
        if kind == "xl_base":
            return StableDiffusionXLPipeline.from_single_file(place, config=self.config)
        if kind not in ("v1", "v2"):
            raise ValueError(f"it holds a {kind}; StableDiffusion takes the base models of SD 1.x, 2.x and SDXL")
        return StableDiffusionPipeline.from_single_file(place, config=self.config, **_NO_CHECKER)


_NEEDS_CONFIG = (
    "; a single file holds weights alone: without network give `config`, a folder in diffusers' layout of the same "
    "kind of model, whose configuration and tokenizers are used (its weights may be missing)"
)
_NO_CHECKER: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def to_signed(image: Any) -> Tensor:
    """A PIL image, or a uint8 tensor (3, H, W), as float (3, H, W) in -1 … 1."""
    from torchvision.transforms.functional import pil_to_tensor

    pixels = image if isinstance(image, Tensor) else pil_to_tensor(image.convert("RGB"))
    return pixels.float() / 127.5 - 1


def pipeline(model: Diffusion) -> Any:
    """The stock pipeline made of these very modules: what acts in them, acts in it.

    Returns:
        A ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline`` with a fresh sampler.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder, "tokenizer": model.tokenizer}
    parts["scheduler"] = type(model.sampler).from_config(model.sampler.config)
    made: Any
    if model.layout == "sdxl":
        parts |= {"text_encoder_2": model.text_encoder_2, "tokenizer_2": model.tokenizer_2}
        made = StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=model.zeros_for_empty, add_watermarker=False
        )
    else:
        made = StableDiffusionPipeline(**parts, **_NO_CHECKER)
    made.set_progress_bar_config(disable=True)
    return made
