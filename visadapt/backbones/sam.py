"""Segment Anything as a backbone: official weights from a file, or the small shipped base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from visadapt.backbones.base import Backbone
from visadapt.backbones.precision import cast_base
from visadapt.backbones.sam_files import PIXEL_MEAN, PIXEL_STD, load_sam, set_pixels
from visadapt.backbones.sam_layout import SHIPPED, TINY, layout_of, stock

_TRANSFORMER = "mask_decoder.transformer"
# Hypernetworks and IoU head are in no preset: which of them are reached depends on the task.
PRESETS: dict[str, list[str]] = {
    "encoder.attention": ["image_encoder.blocks.*.attn.qkv", "image_encoder.blocks.*.attn.proj"],
    "encoder.qv": ["image_encoder.blocks.*.attn.qkv:q", "image_encoder.blocks.*.attn.qkv:v"],
    "encoder.mlp": ["image_encoder.blocks.*.mlp.lin1", "image_encoder.blocks.*.mlp.lin2"],
    "encoder": ["image_encoder.*"],
    "neck": ["image_encoder.neck.*"],
    "decoder.attention": [f"{_TRANSFORMER}.*_proj"],
    "decoder.mlp": [f"{_TRANSFORMER}.layers.*.mlp.lin1", f"{_TRANSFORMER}.layers.*.mlp.lin2"],
    "decoder.upscaling": ["mask_decoder.output_upscaling.*"],
    "decoder": [f"{_TRANSFORMER}.*", "mask_decoder.output_upscaling.*"],
    "all": ["image_encoder.*", f"{_TRANSFORMER}.*", "mask_decoder.output_upscaling.*"],
}


class SAM(Backbone):
    """Segment Anything (Kirillov et al. 2023, arXiv 2304.02643), made of the modules of ``segment_anything``.

    State dicts have the official keys. Position tables are interpolated for another image side; windowed blocks
    stay as they are.

    Args:
        name: "vit_b", "vit_l" or "vit_h" with an official file, or "tiny_sam", the small base shipped with visadapt
            (128 pixels, patches of 8).
        checkpoint: An official .pth file, or the same tensors as .safetensors.
        img_size: Input side in pixels, a multiple of the patch size; None keeps the network's own.
        pretrained: Load weights. False, without a checkpoint, starts from random ones.
        base_dtype: Precision of the frozen image encoder and mask decoder; adapters and what trains are float32.
        grad_checkpointing: Recompute the blocks of the image encoder in backward: less memory, more time.
        normalise: Subtract SAM's mean colour, divide by its deviation; False passes colours in 0 … 1, as MapSAM does.
        bgr: Channels in the order blue, green, red, as MapSAM reads them.
    """

    def __init__(
        self,
        name: Literal["tiny_sam", "vit_b", "vit_l", "vit_h"] = "tiny_sam",
        checkpoint: str | None = None,
        img_size: int | None = None,
        pretrained: bool = True,
        base_dtype: Literal["float32", "bfloat16"] = "float32",
        grad_checkpointing: bool = False,
        normalise: bool = True,
        bgr: bool = False,
    ) -> None:
        self.name = name
        self.checkpoint = checkpoint
        self.layout = layout_of(name).at(img_size)
        self.img_size = self.layout.img_size
        self.pretrained = pretrained
        self.base_dtype = base_dtype
        self.grad_checkpointing = grad_checkpointing
        self.normalise = normalise
        self.bgr = bgr

    def build(self, num_classes: int | None = None, class_names: Sequence[str] | None = None) -> nn.Module:
        """Make the stock ``Sam``; masks have no classes, so the arguments change nothing.

        Raises:
            ValueError: no file is named for a SAM that is not shipped, or the file does not fit.
            FileNotFoundError: the file does not exist.
            ImportError: ``segment_anything`` is not installed.
        """
        path = self._weights_file()
        sam: Any = stock(self.layout) if path is None else load_sam(path, self.name, self.layout)
        if self.base_dtype == "bfloat16":
            cast_base(sam, torch.bfloat16)
        set_pixels(sam, *self._pixels())
        sam.image_format = "BGR" if self.bgr else "RGB"
        sam.adapter_presets = {preset: list(patterns) for preset, patterns in PRESETS.items()}
        sam.grad_checkpointing = self.grad_checkpointing
        return sam

    def preprocess(self, train: bool) -> Callable[[Tensor], Tensor]:
        """Give the colour normalisation of an image (3, H, W) in uint8; the size is the data module's affair."""
        mean, std = (np.asarray(values, np.float32) / 255 for values in self._pixels())
        return Normalise(self.img_size, mean, std, self.bgr)

    def _pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation in units of 0 … 255, in the network's channel order."""
        if not self.normalise:
            return (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)
        return (PIXEL_MEAN[::-1], PIXEL_STD[::-1]) if self.bgr else (PIXEL_MEAN, PIXEL_STD)

    def _weights_file(self) -> Path | None:
        if self.checkpoint is not None:
            return Path(self.checkpoint).expanduser()
        if not self.pretrained:
            return None
        if self.name != TINY:
            raise ValueError(
                f"backbone checkpoint: SAM {self.name} is not shipped; give the path of its official file as "
                "`checkpoint` (github.com/facebookresearch/segment-anything lists them), or set `pretrained: false`"
            )
        path = SHIPPED / f"{TINY}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"the weights of {TINY} are missing from this installation ('{path.name}'); "
                "reinstall visadapt, or name another base"
            )
        return path


class Normalise:
    """uint8 (3, H, W), red first → float (3, H, W) in the network's colours: (x/255 − mean) / std.

    Attributes:
        size: Side in pixels that the network takes.
        mean: Mean colour in units of 0 … 1, in the network's channel order.
        std: Deviation, likewise.
        bgr: Whether that order is blue, green, red.
    """

    def __init__(self, size: int, mean: np.ndarray, std: np.ndarray, bgr: bool = False) -> None:
        self.size = size
        self.mean = mean
        self.std = std
        self.bgr = bgr

    def __call__(self, image: Tensor) -> Tensor:
        """The network's input for an image."""
        image = image.flip(0) if self.bgr else image
        mean, std = (torch.from_numpy(values)[:, None, None] for values in (self.mean, self.std))
        return (image.float() / 255 - mean) / std

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, mean={self.mean}, std={self.std}, bgr={self.bgr})"
