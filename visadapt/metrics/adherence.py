"""Whether pictures show what their captions ask for, in the closed world of `visadapt.data.scenes`.

A small convolutional network, trained on renders and shipped with its validation (``judge.json``: accuracy on held-out
renders, on blurred and noisy ones, on reconstructions by the tiny Stable Diffusion's autoencoder), names the shape, its
colour and the background, and says whether the subject and the style are present. Blobs, chimeras of two shapes and
empty pictures were among its training data under the name "no known shape", so that a picture gets no credit for
something that is merely nearest to what was asked; and near misses of subject and style (parts missing, other colours,
no hatching), so that these have to be there as a whole. Half of all pictures went through that autoencoder, which
never saw subject or style: a render can show no more than it lets through.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILE = Path(__file__).parent / "judge.safetensors"
SIDE = 32
NAMED = ("shape", "colour", "background")
PRESENT = ("subject", "style")


class Judge(nn.Module):
    """Seven convolutions and five heads.

    Args:
        classes: Number of shapes, colours and backgrounds it knows; one more shape is "no known shape".
        widths: Channels at full, half, quarter and eighth resolution.
    """

    def __init__(self, classes: Sequence[int], widths: Sequence[int] = (24, 48, 80, 112)) -> None:
        super().__init__()
        self.classes, self.widths = list(classes), list(widths)
        layers: list[nn.Module] = []
        before = 3
        for depth, width in enumerate(widths):
            strides = (1,) if depth == 0 else (2, 1)
            for stride in strides:
                layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
                before = width
        self.features = nn.Sequential(*layers)
        outputs = dict(zip(NAMED, classes)) | dict.fromkeys(PRESENT, 1)
        outputs["shape"] += 1
        self.heads = nn.ModuleDict({name: nn.Linear(2 * before, count) for name, count in outputs.items()})

    def describe(self, images: Tensor) -> Tensor:
        """Features (B, 2 · last width) that the heads read: means and maxima of the last maps.

        Args:
            images: (B, 3, H, W) in [-1, 1]; other sizes than 32 × 32 are resized.
        """
        if images.shape[-2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        maps = self.features(images)
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of every head: (B, classes) of what is named, (B,) of what is present; images as for `describe`."""
        pooled = self.describe(images)
        found = {name: head(pooled) for name, head in self.heads.items()}
        return found | {name: found[name][:, 0] for name in PRESENT}


@lru_cache(maxsize=1)
def judge() -> Judge:
    """The shipped judge, in evaluation mode.

    Raises:
        FileNotFoundError: Its files are missing from the installation.
    """
    from safetensors.torch import load_file

    if not FILE.is_file():
        raise FileNotFoundError(f"{FILE}: the judge of adherence is missing; reinstall visadapt")
    known = json.loads(FILE.with_suffix(".json").read_text(encoding="utf-8"))
    network = Judge([len(known["classes"][name]) for name in NAMED], known["widths"])
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(FILE).items()}, strict=False)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def judged(images: Tensor, network: Judge | None = None, batch_size: int = 256) -> dict[str, Tensor]:
    """What pictures show.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        network: The judge; None takes the shipped one.
        batch_size: Pictures at a time.

    Returns:
        Class numbers (B,) of shape (-1: no known shape), colour and background; booleans (B,) for subject and style.
    """
    network = network or judge()
    place = next(network.parameters()).device
    parts: dict[str, list[Tensor]] = {name: [] for name in (*NAMED, *PRESENT)}
    for chunk in images.detach().split(batch_size):
        logits = network(chunk.to(place, torch.float32))
        for name in NAMED:
            parts[name].append(logits[name].argmax(1).cpu())
        for name in PRESENT:
            parts[name].append(logits[name].cpu() > 0)
    found = {name: torch.cat(part) for name, part in parts.items()}
    found["shape"][found["shape"] == network.classes[0]] = -1
    return found


def adherence(
    images: Tensor, labels: Mapping[str, Tensor | Sequence[int]], network: Judge | None = None
) -> dict[str, float]:
    """Prompt adherence by the judge.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        labels: What was asked for: class numbers (B,) for "shape", "colour" and "background" as `scenes` gives them;
            -1 asks for nothing. What isn't named in it is not asked for.
        network: The judge; None takes the shipped one.

    Returns:
        The share of pictures in which "shape", "colour" and "background" are as asked for (of those where one is asked
        for; left out where none is), "all": all that was asked for at once; and of all pictures the share that shows
        the "subject" and the "style": adherence if they were asked for, leakage if they were not.
    """
    found = judged(images, network)
    figures, every, asked_any = (
        {},
        torch.ones(len(images), dtype=torch.bool),
        torch.zeros(len(images), dtype=torch.bool),
    )
    for name in NAMED:
        asked = torch.as_tensor(labels[name]).cpu() if name in labels else torch.full((len(images),), -1)
        given, right = asked >= 0, found[name] == asked
        every &= right | ~given
        asked_any |= given
        if given.any():
            figures[name] = float(right[given].float().mean())
    if asked_any.any():
        figures["all"] = float(every[asked_any].float().mean())
    return figures | {name: float(found[name].float().mean()) for name in PRESENT}
