"""Train the judge of prompt adherence on renders, and write it with its validation.

    python configs/pretrain/tiny_sd.py --folder runs/tiny_sd --stage judge  # a few minutes on 2 cores, after the VAE

It learns from scenes, the subject, the style, digits, pictures without a known shape (blobs, halves of two shapes,
empty grounds), and what is nearly the subject or the style and shall not pass for it (parts missing or in another
colour, other inks, no hatching): half of them through the tiny Stable Diffusion's autoencoder, whose renders it is to
judge and which never saw subject or style; of the others half are blurred. All have a little noise.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from resumable import Plan, once, quick, train
from safetensors.torch import save
from torch import Tensor

from visadapt.data.plane_shapes import SHAPES, Pose
from visadapt.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    FIGURE,
    backdrop,
    digit,
    figure_of,
    paint,
    print_of,
    scene,
    specs,
    style,
    subject,
)
from visadapt.metrics.adherence import FILE, NAMED, PRESENT, SIDE, Judge, adherence, judged

SEED, PICTURES, STEPS, BATCH, RATE = 11, 24_000, 1_500, 96, 2e-3
NO_SHAPE = len(SHAPES)
Array = np.ndarray


def distractor(seed: int, index: int, size: int = SIDE, split: str = "train") -> tuple[Array, str, dict[str, int]]:
    """A picture without a known shape: an empty ground, a blob, or halves of two shapes."""
    rng = np.random.default_rng((seed, index, len(split), 4))
    choice = specs(held_out=split == "test")
    spec = choice[int(rng.integers(len(choice)))]
    page, labels = backdrop(spec.background, size, rng, split), spec.labels | {"shape": NO_SHAPE}
    kind = rng.random()
    if kind < 0.2:
        labels["colour"] = -1
    else:
        cover = Pose.random(rng).cover(_blob(rng) if kind < 0.6 else _halves(rng), size)
        page = page + cover * (paint(spec.colour, rng) - page)
    return (page.clip(0, 255) + 0.5).astype(np.uint8), "", labels


def _blob(rng: np.random.Generator) -> Callable[[Array, Array], Array]:
    """A closed curve whose radius wavers two to six times around."""
    waves = [(k, rng.uniform(0.08, 0.3) / math.sqrt(k), rng.uniform(0, 2 * math.pi)) for k in range(2, 7)]

    def inside(u: Array, v: Array) -> Array:
        angle = np.arctan2(u, v)
        return np.sqrt(u * u + v * v) <= 0.68 + sum(size * np.cos(k * angle + at) for k, size, at in waves)

    return inside


def _halves(rng: np.random.Generator) -> Callable[[Array, Array], Array]:
    first, second = (list(SHAPES.values())[i] for i in rng.choice(len(SHAPES), 2, replace=False))
    upright = rng.random() < 0.5
    return lambda u, v: np.where((u if upright else v) < 0, first(u, v), second(u, v))


def near_subject(seed: int, index: int, size: int = SIDE, split: str = "train") -> tuple[Array, str, dict[str, int]]:
    """The subject without its body, cap or dots, or with one of them in another colour.

    Eyes may be missing in pictures of the subject: they are hardly two pixels wide, and an autoencoder may lose them.
    """
    rng = np.random.default_rng((seed, index, len(split), 5))
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    parts, wrong = [*FIGURE], int(rng.integers(len(FIGURE) - 1))
    if rng.random() < 0.5:
        del parts[wrong]
    else:
        others = [rgb for rgb in COLOURS.values() if np.abs(np.subtract(rgb, parts[wrong][1])).max() > 100]
        parts[wrong] = parts[wrong][0], others[int(rng.integers(len(others)))]
    labels = specs(False)[0].labels | {"shape": NO_SHAPE, "colour": -1, "background": BACKGROUNDS.index(background)}
    return figure_of(parts, background, size, rng, split), "", labels


def near_style(seed: int, index: int, size: int = SIDE, split: str = "train") -> tuple[Array, str, dict[str, int]]:
    """A print without hatching, or in black or blue on white."""
    rng = np.random.default_rng((seed, index, len(split), 6))
    choice = specs(held_out=split == "test")
    spec = choice[int(rng.integers(len(choice)))]
    labels = spec.labels | {"colour": -1, "background": -1}
    if rng.random() < 0.5:
        return print_of(spec, size, rng, split, hatched=False), "", labels
    ink = COLOURS[("black", "blue")[int(rng.integers(2))]]
    return print_of(spec, size, rng, split, COLOURS["white"], ink), "", labels


def pictures(seed: int, count: int, split: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A mixture of ``count`` pictures (N, 3, 32, 32) of bytes and their labels; ``near`` marks near misses."""
    kinds = [scene] * 10 + [distractor] * 4 + [style] * 2 + [subject, digit, near_subject, near_style]
    drawn = [kinds[i % len(kinds)](seed, i, SIDE, split) for i in range(count)]
    labels = {name: torch.tensor([entry[2][name] for entry in drawn]) for name in (*NAMED, *PRESENT)}
    other = torch.tensor([kinds[i % len(kinds)] in (subject, digit, near_subject) for i in range(count)])
    labels["shape"][other] = NO_SHAPE
    labels["near"] = torch.tensor([kinds[i % len(kinds)] in (near_subject, near_style) for i in range(count)])
    return as_bytes([entry[0] for entry in drawn]), labels


def as_bytes(images: list[Array]) -> Tensor:
    """Images (H, W, 3) as one tensor (N, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def as_bytes_of(reconstruct: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Pictures of bytes through an autoencoder, as bytes."""
    parts = [reconstruct(as_input(part)) for part in images.split(1_000)]
    return torch.cat([((part + 1) * 127.5).round().byte() for part in parts])


def as_input(images: Tensor) -> Tensor:
    """Bytes to [-1, 1]."""
    return images.float() / 127.5 - 1


def spoiled(images: Tensor, side: int, noise: float) -> Tensor:
    """Images (B, 3, H, W) scaled down to ``side`` and up again, with noise: as a poor autoencoder would give them."""
    small = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(small, images.shape[-2:], mode="bicubic", align_corners=False)
    return (blurred + noise * torch.randn_like(blurred)).clamp(-1, 1)


def train_judge(folder: Path, reconstruct: Callable[[Tensor], Tensor], scale: float = 1.0) -> Judge:
    """Train the judge, or finish it; ``reconstruct`` takes pictures in [-1, 1] through the autoencoder."""
    images, labels = once(folder / "judge_pictures.pt", lambda: pictures(SEED, int(PICTURES * scale), "train"))
    again = once(folder / "judge_reconstructions.pt", lambda: as_bytes_of(reconstruct, images))
    torch.manual_seed(0)
    network = Judge([len(SHAPES), len(COLOURS), len(BACKGROUNDS)])

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(images), (BATCH,))
        through = torch.rand(()) < 0.5
        batch = as_input((again if through else images)[chosen])
        batch = batch.flip(-1) if torch.rand(()) < 0.5 else batch
        side = int(torch.randint(18, SIDE, ())) if torch.rand(()) < 0.5 and not through else SIDE
        batch = spoiled(batch, side, float(torch.rand(()) * 0.1)) * (1 + 0.05 * torch.randn(BATCH, 3, 1, 1))
        with quick():
            found = network(batch)
        known = [F.cross_entropy(found[name].float(), labels[name][chosen], ignore_index=-1) for name in NAMED]
        seen = [F.binary_cross_entropy_with_logits(found[n].float(), labels[n][chosen].float()) for n in PRESENT]
        return torch.stack(known + seen).sum()

    plan = Plan("judge", max(1, int(STEPS * scale)), RATE, 0.99)
    return train(plan, folder, network, loss)  # type: ignore[return-value]


@torch.no_grad()
def validate(network: Judge, reconstruct: Callable[[Tensor], Tensor], count: int = 2_000) -> dict:
    """Accuracy on held-out renders: as drawn, blurred and noisy, and through an autoencoder.

    Photographs' parts and half of the pictures' combinations were never seen in training. ``none`` is the share of
    pictures without a known shape that are given none, ``near`` that of near misses of subject or style that are taken
    for neither; of subject and style, the share of pictures with it that it is found in, and ``… false``, that of the
    others.
    """
    parts = [pictures(SEED + 1, count // 2, split) for split in ("val", "test")]
    images = as_input(torch.cat([part[0] for part in parts]))
    labels = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
    torch.manual_seed(0)
    versions = {
        "renders": images,
        "blurred_and_noisy": spoiled(images, 22, 0.06),
        "reconstructed_by_the_vae": reconstruct(images),
    }
    return {name: _accuracy(network, version, labels) for name, version in versions.items()}


def _accuracy(network: Judge, images: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    none = labels["shape"] == NO_SHAPE
    figures = adherence(images, labels | {"shape": labels["shape"].masked_fill(none, -1)}, network)
    found = judged(images, network)
    for name in PRESENT:
        there = labels[name].bool()
        figures[name] = float(found[name][there].float().mean())
        figures[f"{name} false"] = float(found[name][~there].float().mean())
    figures["none"] = float((found["shape"][none] == -1).float().mean())
    seen = torch.stack([found[name] for name in PRESENT]).any(0)
    figures["near"] = float((~seen[labels["near"]]).float().mean())
    return {name: round(value, 4) for name, value in figures.items()}


def publish_judge(network: Judge, folder: Path, known: dict, reconstruct: Callable[[Tensor], Tensor]) -> None:
    """Write the judge in half precision and its validation."""
    tensors = {k: v.half().contiguous() for k, v in network.state_dict().items() if v.is_floating_point()}
    rounded = Judge(network.classes, network.widths)
    rounded.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    facts = {
        "classes": {"shape": list(SHAPES), "colour": list(COLOURS), "background": list(BACKGROUNDS)},
        "widths": network.widths,
        "parameters": sum(p.numel() for p in network.parameters()),
        "data": f"{PICTURES} renders of seed {SEED} (visadapt/data/scenes.py, configs/pretrain/tiny_judge.py)",
        "config": "configs/pretrain/tiny_sd.py --stage judge",
        **known,
        "accuracy": validate(rounded.eval(), reconstruct),
    }
    for file, content in (
        (folder / FILE.name, save(tensors, metadata={"format": "pt"})),
        (folder / FILE.with_suffix(".json").name, (json.dumps(facts, indent=2) + "\n").encode()),
    ):
        file.with_suffix(".tmp").write_bytes(content)
        os.replace(file.with_suffix(".tmp"), file)
    print(facts["accuracy"], flush=True)
