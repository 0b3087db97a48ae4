"""What the diffusion benchmark measures: random Stable Diffusions, our training step, and diffusers' with PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visadapt as va
from benchmarks._cases import RANK, Case, wake
from benchmarks._hosts import freeze, share
from visadapt.backbones import StableDiffusion
from visadapt.core.train import parameter_groups, penalty
from visadapt.optim.flat import flatten
from visadapt.tasks.text_to_image import TextToImage

BATCH, LR, CLIP = 2, 1e-4, 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
_SCHEDULE: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
_SCHEDULE["steps_offset"] = 1
_NAMES: Any = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}


@dataclass(frozen=True)
class Size:
    """Widths of the networks, all with SD 1.5's blocks; latents are ``side`` × ``side``, images eight times that."""

    unet: tuple[int, ...]
    side: int
    vae: tuple[int, ...]
    text: int
    layers: int


SIZES = {
    "full": Size((320, 640, 1280, 1280), 64, (128, 256, 512, 512), 768, 12),
    "half": Size((160, 320, 640, 640), 32, (64, 128, 256, 256), 384, 12),
    "tiny": Size((32, 32, 64, 64), 16, (32, 32, 32, 32), 64, 1),
}


@dataclass(frozen=True)
class Setting:
    """An adapter and where it goes, in our words and in PEFT's."""

    method: str
    targets: tuple[str, ...]
    peer: list[str] | str


_LEAVES = ["to_q", "to_k", "to_v", "to_out.0"]
_EVERYWHERE = (
    ("unet.attention", "unet.ff", "unet.convs", "unet.proj"),
    r".*\.(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|resnets\.\d+\.conv[12]|.*samplers\.\d+\.conv|proj_in|proj_out)",
)
SETTINGS = {
    "LoRA attention": Setting("LoRA", ("unet.attention",), _LEAVES),
    "LoRA everywhere": Setting("LoRA", *_EVERYWHERE),
    "DoRA everywhere": Setting("DoRA", *_EVERYWHERE),
}


class RandomStableDiffusion(StableDiffusion):
    """Stable Diffusion with random weights, on networks that several cases share."""

    def __init__(self, parts: dict[str, nn.Module], **options: Any) -> None:
        super().__init__("random", **options)
        self._parts = parts

    def hparams(self) -> dict[str, Any]:
        """Without the networks themselves."""
        return {key: value for key, value in vars(self).items() if key != "_parts"}

    def _load(self) -> Any:
        from diffusers import DDPMScheduler, StableDiffusionPipeline
        from transformers import CLIPTokenizer

        words = {"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
        return StableDiffusionPipeline(
            **{name: share(part) for name, part in self._parts.items()},  # type: ignore[arg-type]
            tokenizer=CLIPTokenizer(vocab=words, merges=[], model_max_length=77),
            scheduler=DDPMScheduler(**_SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def networks(size: Size, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The frozen networks, in SD 1.5's layout."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=size.text,
        intermediate_size=4 * size.text,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.text // 64),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.device(device):
        parts = {
            "unet": UNet2DConditionModel(
                sample_size=size.side,
                block_out_channels=size.unet,
                cross_attention_dim=size.text,
                attention_head_dim=8,
            ),
            "vae": AutoencoderKL(
                block_out_channels=size.vae,
                down_block_types=("DownEncoderBlock2D",) * len(size.vae),
                up_block_types=("UpDecoderBlock2D",) * len(size.vae),
                layers_per_block=2,
            ),
            "text_encoder": CLIPTextModel(text),
        }
    return {name: nn.Module.to(freeze(part), dtype).train() for name, part in parts.items()}


class Whole(nn.Module):
    """A UNet as a function of the noisy latents alone, with fixed times and text."""

    def __init__(self, unet: nn.Module, text: Tensor, autocast: bool = False) -> None:
        super().__init__()
        self.unet, self.autocast = unet, autocast
        self.register_buffer("times", torch.linspace(900, 100, len(text), device=text.device).long())
        self.register_buffer("text", text)

    def forward(self, x: Tensor) -> Tensor:
        """The prediction."""
        with torch.autocast(x.device.type, torch.bfloat16) if self.autocast else nullcontext():
            return self.unet(x, self.times, self.text, return_dict=False)[0]


@dataclass
class Step:
    """A whole training step of a case."""

    case: Case
    forward: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None

    def backward(self, loss: Tensor) -> None:
        """Backward, clipping, optimiser, and gradients away."""
        loss.backward()
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.case.trained, CLIP)
            self.optimizer.step()
        for parameter in self.case.trained:
            parameter.grad = None

    def train(self) -> None:
        """One step."""
        self.backward(self.forward())


class Bench:
    """The networks, the data of a batch, and the cases on them."""

    def __init__(self, size: str, device: str = "cpu", dtype: str = "fp32") -> None:
        self.size, self.device, self.dtype = SIZES[size], device, dtype
        self.parts = networks(self.size, device, DTYPES[dtype])
        exact = torch.float64 if dtype == "fp64" else torch.float32
        generator = torch.Generator().manual_seed(0)
        side, width = self.size.side, self.size.text
        draw = partial(torch.randn, generator=generator)
        self.latents = draw(BATCH, 4, side, side).to(device, exact)
        self.text = draw(BATCH, 77, width).to(device, exact)
        self.images = draw(BATCH, 3, 8 * side, 8 * side).clamp(-1, 1).to(device, exact)
        self.captions = ["a " * 20] * BATCH

    # --- cases -------------------------------------------------------------------------
    def task(self, setting: Setting, **options: Any) -> TextToImage:
        """Our task with its model built and adapted."""
        recipe = RandomStableDiffusion(self.parts, base_dtype=_NAMES[self.dtype], **options)
        adapters = [va.Adaptation(va.METHODS[setting.method](rank=RANK), list(setting.targets))]
        task = TextToImage(recipe, adapters)
        task.configure_model()
        wake([p for p in task.parameters() if p.requires_grad])
        return task.train()

    def ours(self, name: str, variant: str = "", kept: Sequence[str] = ("latents", "text"), **options: Any) -> Step:
        """A step of our task: times, noise, UNet, loss, penalty, backward, clipping and AdamW in flat buffers.

        Args:
            name: The setting.
            variant: What differs from the defaults.
            kept: What comes from the cache; the VAE and the text encoder make the rest.
            options: Of the backbone.
        """
        task = self.task(SETTINGS[name], **options)
        unet: Any = task.model.unet
        generator = torch.Generator().manual_seed(1)
        batch: dict[str, Any] = {"captions": self.captions}
        batch |= {"latents": self.latents} if "latents" in kept else {"images": self.images}
        batch |= {"text": {"embeddings": self.text}} if "text" in kept else {}
        case = Case(
            SETTINGS[name].method, "visadapt", variant, Whole(unet, self._typed(self.text)), _trained(unet), name
        )
        optimizer = flatten(torch.optim.AdamW(parameter_groups(task.model, LR, 1e-2)))

        def loss() -> Tensor:
            return task._training_loss(batch, task.latents(batch), generator) + penalty(task.model)

        return Step(case, loss, optimizer)

    def peer(self, name: str, variant: str = "", checkpointing: bool = False) -> Step:
        """A step as diffusers' train_text_to_image_lora takes it: PEFT's adapter in the UNet, AdamW, clipping."""
        from diffusers import DDPMScheduler
        from peft import LoraConfig

        setting = SETTINGS[name]
        unet: Any = share(self.parts["unet"])
        dora = setting.method == "DoRA"
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, use_dora=dora, target_modules=setting.peer))
        trained = _trained(unet)
        for parameter in trained:
            parameter.data = parameter.data.to(self.latents.dtype)
        wake(trained)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        half = self.dtype == "bf16"
        case = Case(setting.method, "peft", variant, Whole(unet, self._typed(self.text), half), trained, name)
        scheduler = DDPMScheduler(**_SCHEDULE)
        latents, text = self._typed(self.latents), self._typed(self.text)

        def loss() -> Tensor:
            noise = torch.randn_like(latents)
            times = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
            noisy = scheduler.add_noise(latents, noise, times)
            with torch.autocast(latents.device.type, torch.bfloat16) if half else nullcontext():
                found = unet(noisy, times, text, return_dict=False)[0]
                return F.mse_loss(found.float(), noise.float(), reduction="mean")

        return Step(case, loss, torch.optim.AdamW(trained, lr=LR, weight_decay=1e-2))

    def frozen(self, variant: str = "") -> Step:
        """The frozen UNet, its gradient crossing all of it, with nothing to train but the first bias."""
        unet: Any = share(self.parts["unet"])
        unet.conv_in.bias = nn.Parameter(unet.conv_in.bias.detach().clone())
        case = Case("frozen", "A", variant, Whole(unet, self._typed(self.text)), [unet.conv_in.bias])
        latents = self._typed(self.latents)
        return Step(case, lambda: case.model(latents).float().square().mean(), None)

    def _typed(self, tensor: Tensor) -> Tensor:
        return tensor.to(DTYPES[self.dtype])


def _trained(unet: nn.Module) -> list[nn.Parameter]:
    return [p for p in unet.parameters() if p.requires_grad]
