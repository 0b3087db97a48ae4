"""Networks that turn pictures into features for figures such as KID: the shipped judge, or any timm model from a file.

A figure means something only beside its extractor, so every extractor has a title that belongs into the figure's.
Nothing is downloaded: Inception, which FID and KID were defined with, is a timm model as any other here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visadapt.metrics.adherence import judge

JUDGE = "judge"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pth")


@dataclass
class Extractor:
    """Which network makes features of pictures.

    Args:
        name: "judge", the shipped classifier of drawn scenes (224 features, made for 32 × 32 pixels), or a timm model
            such as "vit_small_patch14_dinov2".
        checkpoint: Its weights: a local file, or a folder with model.safetensors or pytorch_model.bin.
    """

    name: str = JUDGE
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.name == JUDGE and self.checkpoint is not None:
            raise ValueError("model.measures.extractor: the judge has its own weights; remove the checkpoint")
        if self.name != JUDGE and self.checkpoint is None:
            raise ValueError(
                f"model.measures.extractor.checkpoint: '{self.name}' needs a local file or folder with its weights"
            )

    def build(self) -> FeatureNet:
        """The network in evaluation mode.

        Raises:
            FileNotFoundError: There are no such weights.
            ValueError: timm knows no such model, or the weights are another's.
        """
        with torch.random.fork_rng(devices=[]):  # layers draw weights before they get theirs
            if self.name == JUDGE:
                network = judge()
                return FeatureNet(network, lambda images: network.describe(images * 2 - 1), JUDGE)
            return _timm(self.name, _weights(Path(self.checkpoint or "").expanduser()))


class FeatureNet(nn.Module):
    """A frozen network with what has to be done to pictures for it.

    Args:
        network: Holds the weights.
        describe: Pictures (B, 3, H, W) in 0 … 1 to features (B, D).
        title: What figures say of it.
    """

    def __init__(self, network: nn.Module, describe: Callable[[Tensor], Tensor], title: str) -> None:
        super().__init__()
        self.network, self.describe, self.title = network, describe, title

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D), float32, on the CPU, of pictures (B, 3, H, W) in 0 … 1."""
        place = next(self.network.parameters()).device
        return self.describe(images.to(place, torch.float32)).float().cpu()


def _weights(path: Path) -> Path:
    found = [path / name for name in _WEIGHTS if (path / name).is_file()] if path.is_dir() else [path]
    if not found or not found[0].is_file():
        what = f"none of {', '.join(_WEIGHTS)}" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"model.measures.extractor.checkpoint: '{path}': {what}")
    return found[0]


def _timm(name: str, file: Path) -> FeatureNet:
    import timm
    from timm.data import resolve_model_data_config
    from timm.models import load_checkpoint

    try:
        network = timm.create_model(name, num_classes=0)
        missing = load_checkpoint(network, str(file), strict=False).missing_keys
    except Exception as error:  # timm raises whatever reading and matching raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model.measures.extractor: '{name}' with '{file}' cannot be loaded: {reason}") from error
    if missing:  # random features would look like an answer
        raise ValueError(
            f"model.measures.extractor: '{file}' lacks {len(missing)} tensors of '{name}', such as {missing[0]}; "
            "give the weights of this very model"
        )
    network.eval().requires_grad_(False)
    data = resolve_model_data_config(network)
    mean, std = (torch.tensor(data[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    side = tuple(data["input_size"][-2:])

    def describe(images: Tensor) -> Tensor:
        images = F.interpolate(images, side, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return network((images - mean.to(images)) / std.to(images))

    return FeatureNet(network, describe, name)
