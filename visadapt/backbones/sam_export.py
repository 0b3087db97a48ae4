"""An adapted SAM as an official file: what stock ``sam_model_registry`` loads strictly."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

from visadapt.backbones.sam_files import PIXEL_MEAN, PIXEL_STD
from visadapt.backbones.sam_layout import empty, layout_of, recognise
from visadapt.backbones.sam_tables import resize_tables
from visadapt.core.files import replacing
from visadapt.core.model import adapters
from visadapt.core.state import load_native, read

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
_COLOURS = "image_encoder.patch_embed.proj"


def save_official(sam: Sam, path: str | Path) -> list[str]:
    """Write exactly the official keys, in float32, as ``.pth`` or ``.safetensors``; replaced once complete.

    Modules that a task added to the model are left out. Another image side than the official one has its position
    tables interpolated back, which is approximate. Colours that are not normalised as in stock SAM are folded into
    the first convolution, W' = W·σ/σ_SAM per channel, exactly but for the padding of images that are not square.

    Args:
        sam: The model without adapters (``visadapt.merge`` folds them in).
        path: File to write.

    Returns:
        What the file says differently than the model, a sentence each.

    Raises:
        ValueError: adapters are left, the sizes are of no known SAM, or the path has another suffix.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"'{path}' should end in .pth, as SAM's official files do, or in .safetensors")
    if held := adapters(sam):
        raise ValueError(f"{len(held)} adapters are on the model; fold them in with `visadapt.merge` first")
    state = sam.state_dict()
    name = recognise(state)
    if name is None:
        raise ValueError("the sizes of this image encoder are those of no known SAM; save its state dict instead")
    layout = layout_of(name)
    keys = empty(layout).state_dict()
    if missing := [key for key in keys if key not in state]:
        raise ValueError(f"the model lacks {len(missing)} tensors of SAM {name}, the first: {missing[0]}")
    official = {key: state[key].detach().cpu().float() for key in keys}
    notes = _left_out(state, keys) + _stock_colours(official, sam)
    resized = resize_tables(official, layout.side, layout.global_attn_indexes)
    if any(resized[key].shape != official[key].shape for key in official):
        here = sam.image_encoder.img_size
        notes.append(
            f"position tables interpolated from {here} to {layout.img_size} pixels: approximate at either size"
        )
    _write({key: tensor.clone().contiguous() for key, tensor in resized.items()}, path)
    return notes


def load_adapter(sam: Sam, path: str | Path) -> Sam:
    """Put an adapter file on a bare SAM, even if a task had added modules of its own that were trained with it.

    Those modules come back as bare tensors under their names, which compute nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no adapter file, or does not fit.
    """
    _, held = read(path)
    for key, tensor in held.items():
        name = key.removeprefix("trained.")
        if name != key and name.partition(".")[0] not in _PARTS:
            _hold(sam, name, tensor)
    return load_native(sam, path)


def _hold(model: nn.Module, name: str, tensor: Tensor) -> None:
    *folders, leaf = name.split(".")
    for folder in folders:
        if folder not in model._modules:
            model.add_module(folder, nn.Module())
        model = model.get_submodule(folder)
    parameter = nn.Parameter(torch.empty_like(tensor), requires_grad=False)
    if tensor.is_floating_point():
        model.register_parameter(leaf, parameter)
    else:
        model.register_buffer(leaf, parameter.data)


def _left_out(state: Iterable[str], keys: Iterable[str]) -> list[str]:
    extra = sorted({key.partition(".")[0] for key in set(state) - set(keys)})
    return [f"left out, for SAM has no such part: {', '.join(extra)}"] if extra else []


def _stock_colours(state: dict[str, Tensor], sam: Any) -> list[str]:
    """Make the first convolution take images as stock SAM normalises them; changes ``state``."""
    mean, std = sam.pixel_mean.flatten().cpu(), sam.pixel_std.flatten().cpu()
    stock_mean, stock_std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
    turned = sam.image_format == "BGR"
    if turned:  # stock colours in this network's order
        stock_mean, stock_std = stock_mean.flip(0), stock_std.flip(0)
    if not turned and torch.allclose(mean, stock_mean) and torch.allclose(std, stock_std):
        return []
    # z = (x − m)/s and z' = (x − m')/s', so z = z'·s'/s + (m' − m)/s.
    weight, bias = state[f"{_COLOURS}.weight"].double(), state[f"{_COLOURS}.bias"].double()
    shift = ((stock_mean - mean) / std).double()
    bias = bias + (weight.sum((2, 3)) * shift).sum(1)
    weight = weight * (stock_std / std).double()[None, :, None, None]
    state[f"{_COLOURS}.weight"] = (weight.flip(1) if turned else weight).float()
    state[f"{_COLOURS}.bias"] = bias.float()
    return ["colours folded into the patch embedding: stock SAM normalises them its own way"]


def _write(state: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as temporary:
        if path.suffix == ".pth":
            torch.save(state, temporary)
        else:
            temporary.write_bytes(serialise(state, {"format": "pt"}))
