"""Pre-train the tiny SAM that ships with visadapt, on drawn scenes, and write it with its figures.

    python configs/pretrain/tiny_sam.py --folder runs/tiny_sam            # hours on 2 cores
    python configs/pretrain/tiny_sam.py --folder runs/tiny_sam --publish  # visadapt/backbones/tiny/tiny_sam.*

Every step prompts four objects in each of 24 scenes with a box, one click or three clicks; SAM's single mask and the
best of its three learn by Dice and cross-entropy, the predicted IoU by squared error. In half of the steps a quarter
of the objects get one correction click with the mask so far. In the first half of the run the image embedding also
has to tell objects and edges from the background by itself: without that nothing but empty masks is learned for
hundreds of steps. Line drawings join in the second phase; the third is the second once more. Interrupted, it goes on
from the last 250 steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from resumable import quick
from safetensors.torch import save
from torch import Tensor, nn

from visadapt.backbones.sam import SAM
from visadapt.backbones.sam_forward import decode, encode, prompt
from visadapt.data.drawings import draw_plan
from visadapt.data.shapes import draw_scene
from visadapt.losses.masks import dice_loss
from visadapt.tasks.prompts import boxes, clicks, corrections

SCENES, PLANS, SEED, SIDE = 24_000, 16_000, 7, 128
BATCH, OBJECTS, EASY = 24, 4, 400
# Steps, first learning rate of a cosine, share of line drawings.
PHASES = ((2600, 1.5e-3, 0.0), (2000, 1.0e-3, 0.5), (2000, 1.2e-3, 0.5))
Pool = tuple[np.ndarray, np.ndarray, np.ndarray]
Scene = tuple[np.ndarray, np.ndarray, np.ndarray]


# --- scenes ------------------------------------------------------------------------------
def pool(file: Path, draw: Callable[[int], Scene], count: int) -> Pool:
    """Images, object ids and styles of all scenes with objects; drawn once and kept."""
    if not file.exists():
        drawn = [scene for i in range(count) if (scene := draw(i))[1].any()]
        styles = [np.pad(style, (0, 12 - len(style)), constant_values=255) for _, _, style in drawn]
        np.savez(file, images=[s[0] for s in drawn], ids=[s[1] for s in drawn], styles=styles)
    kept = np.load(file)
    return kept["images"], kept["ids"], kept["styles"]


def plan(seed: int, index: int) -> Scene:
    """A line drawing, a function of its seed and number."""
    return draw_plan(np.random.default_rng((seed, index, 2)), SIDE)


def phase(step: int) -> tuple[float, float]:
    """Learning rate of a step and share of line drawings."""
    start = 0
    for steps, rate, share in PHASES:
        if step < start + steps or (steps, rate, share) == PHASES[-1]:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - start) / steps))
            return rate * min(1, (step - start + 1) / 150) * (0.02 + 0.98 * cosine), share
        start += steps
    raise AssertionError("the last phase returns")


def augmented(scenes: Pool, rng: np.random.Generator, least: int) -> Scene:
    """A random scene, turned and recoloured, that has an object of so many pixels at least."""
    while True:
        number = rng.integers(len(scenes[0]))
        image, ids, style = (part[number] for part in scenes)
        quarter, flip = rng.integers(4), rng.random() < 0.5
        image, ids = np.rot90(image, quarter), np.rot90(ids, quarter)
        image, ids = (image[:, ::-1], ids[:, ::-1]) if flip else (image, ids)
        if rng.random() < 0.3:
            image = image[..., rng.permutation(3)]
        if rng.random() < 0.15:
            image = 255 - image
        if (np.bincount(ids.ravel(), minlength=13)[1:] >= least).any():
            return np.ascontiguousarray(image), np.ascontiguousarray(ids), style


def targets(scenes: list[Scene], rng: np.random.Generator, count: int, least: int) -> tuple[Tensor, Tensor]:
    """Masks (M, S, S) of ``count`` objects per scene, a fifth of them with all of their style, and their scene (M,)."""
    masks, index = [], []
    for number, (_, ids, style) in enumerate(scenes):
        large = np.flatnonzero(np.bincount(ids.ravel(), minlength=13)[1:] >= least)
        for chosen in rng.choice(large, count, replace=len(large) < count):
            alike = np.flatnonzero(style == style[chosen]) + 1
            masks.append(np.isin(ids, alike) if len(alike) > 1 and rng.random() < 0.2 else ids == chosen + 1)
            index.append(number)
    return torch.from_numpy(np.stack(masks)), torch.tensor(index)


# --- training ----------------------------------------------------------------------------
def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Dice + binary cross-entropy with foreground counted twice, of each mask (M, K)."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=torch.tensor(2.0), reduction="none")
    return dice_loss(logits.sigmoid(), truth, torch.ones(())) + entropy.mean((-1, -2))


def iou(logits: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union (M, K) of masks at full size."""
    found, truth = F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False) > 0, masks[:, None]
    return (found & truth).sum((-1, -2)) / (found | truth).sum((-1, -2)).clamp(min=1)


def first_prompt(masks: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
    """A jittered box (45 %), one click (35 %) or three (20 %) for every object."""
    draw = rng.random()
    if draw < 0.45:
        return {"boxes": boxes(masks, jitter=0.1)}
    points = torch.cat([clicks(masks, at_random=True) for _ in range(1 if draw < 0.8 else 3)], 1)
    return {"points": points, "labels": torch.ones(points.shape[:2])}


def scene_loss(maps: Tensor, scenes: list[Scene]) -> Tensor:
    """Cross-entropy of two maps (B, 2, S/2, S/2): any object, and edges between objects."""
    ids = torch.from_numpy(np.stack([s[1] for s in scenes]))[:, None].float()
    edges = ((F.max_pool2d(ids, 3, 1, 1) != ids) | (-F.max_pool2d(-ids, 3, 1, 1) != ids)).float()
    wanted = torch.cat([F.avg_pool2d((ids > 0).float(), 2), F.max_pool2d(edges, 2)], 1)
    return F.binary_cross_entropy_with_logits(maps, wanted)


def step_loss(sam: Any, helper: nn.Module, scenes: list[Scene], rng: np.random.Generator, step: int) -> Tensor:
    """Loss of one batch of scenes."""
    masks, index = targets(scenes, rng, OBJECTS, 400 if step < EASY else 24)
    truth = F.avg_pool2d(masks[:, None].float(), 2)
    given = first_prompt(masks, rng)
    with quick():
        embeddings = sam.image_encoder(inputs([s[0] for s in scenes]))
        logits, quality = decode(sam, embeddings, *prompt(sam, **given), index)
        maps = helper(embeddings).float()
    each = mask_loss(logits, truth.expand_as(logits))
    loss = each[:, 0].mean() + each[:, 1:].min(1).values.mean() + F.mse_loss(quality, iou(logits.detach(), masks))
    if (share := 1 - step / 3000) > 0:
        loss = loss + share * scene_loss(maps, scenes)
    if step > 600 and rng.random() < 0.5:
        part = torch.arange(int(rng.integers(4)), len(masks), 4)
        masks, truth, before = masks[part], truth[part], logits[part, :1].detach()
        given = {key: value[part] for key, value in given.items()}
        wrong = F.interpolate(before, (SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0] > 0
        points, labels = corrections(wrong, masks, at_random=True)
        given["points"] = torch.cat([given["points"], points], 1) if "points" in given else points
        given["labels"] = torch.cat([given["labels"], labels], 1) if "labels" in given else labels
        with quick():
            given["masks"] = before.clamp(-20, 20)
            again, sure = decode(sam, embeddings, *prompt(sam, **given), index[part])
        loss = loss + mask_loss(again[:, :1], truth).mean() + F.mse_loss(sure[:, :1], iou(again[:, :1].detach(), masks))
    return loss


def inputs(images: list[np.ndarray]) -> Tensor:
    """Network input (B, 3, S, S) of images in bytes."""
    normalise = SAM("tiny_sam").preprocess(train=False)
    return torch.stack([normalise(torch.from_numpy(np.ascontiguousarray(i)).permute(2, 0, 1)) for i in images])


def train(folder: Path) -> None:
    """Train through all phases; the state is kept every 250 steps."""
    steps = sum(number for number, _, _ in PHASES)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = pool(folder / "scenes.npz", lambda i: draw_scene(SEED, i, SIDE), SCENES)
    plans: Pool | None = None
    torch.manual_seed(0)
    sam: Any = SAM("tiny_sam", pretrained=False).build()
    helper = nn.Sequential(nn.Conv2d(96, 32, 1), nn.PixelShuffle(4))
    everything = [*sam.parameters(), *helper.parameters()]
    groups = [
        {"params": [p for p in everything if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in everything if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PHASES[0][1], betas=(0.9, 0.99))
    average = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    state, start, began = folder / "state.pt", 0, time.perf_counter()
    if state.exists():
        kept = torch.load(state, weights_only=True)
        sam.load_state_dict(kept["sam"]), helper.load_state_dict(kept["helper"])
        optimizer.load_state_dict(kept["optimizer"])
        average, start = kept["average"], kept["step"]
    for step in range(start, steps):
        rng = np.random.default_rng((SEED, step))
        rate, share = phase(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if share and plans is None:
            plans = pool(folder / "plans.npz", lambda i: plan(SEED, i), PLANS)
        pools = [plans if plans is not None and rng.random() < share else scenes for _ in range(BATCH)]
        batch = [augmented(chosen, rng, 400 if step < EASY else 24) for chosen in pools]
        loss = step_loss(sam, helper, batch, rng, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        for name, tensor in sam.state_dict().items():
            average[name].lerp_(tensor, 1 - min(0.998, (step + 1) / (step + 20)))
        if step % 50 == 0:
            seconds = (time.perf_counter() - began) / (step - start + 1)
            print(f"step {step} of {steps}: loss {loss.item():.3f}, {seconds:.2f} s a step", flush=True)
        if step % 250 == 249 or step == steps - 1:
            kept = {"sam": sam.state_dict(), "helper": helper.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(kept | {"average": average, "step": step + 1}, folder / "state.tmp")
            os.replace(folder / "state.tmp", state)


# --- publishing --------------------------------------------------------------------------
@torch.no_grad()
def held_out(sam: Any, draw: Callable[[int], Scene], count: int = 300) -> dict[str, float]:
    """Mean IoU over two objects in each of ``count`` held-out scenes, by a box and by one central click.

    A box is answered by SAM's single mask, a click by the one of three that SAM itself rates best.
    """
    scenes = [scene for i in range(2 * count) if (scene := draw(i))[1].any()]
    scenes = [s for s in scenes if (np.bincount(s[1].ravel(), minlength=13)[1:] >= 50).any()][:count]
    found: dict[str, list[Tensor]] = {"box": [], "point": []}
    rng = np.random.default_rng(1)
    for first in range(0, len(scenes), 50):
        part = scenes[first : first + 50]
        masks, index = targets(part, rng, 2, 50)
        embeddings, _ = encode(sam, inputs([s[0] for s in part]))
        by_box, _ = decode(sam, embeddings, *prompt(sam, boxes=boxes(masks)), index)
        found["box"].append(iou(by_box, masks)[:, 0])
        click = prompt(sam, points=clicks(masks, at_random=False), labels=torch.ones(len(masks), 1))
        by_click, quality = decode(sam, embeddings, *click, index)
        found["point"].append(iou(by_click, masks).gather(1, 1 + quality[:, 1:].argmax(1, keepdim=True))[:, 0])
    return {f"iou_of_{kind}": round(float(torch.cat(values).mean()), 3) for kind, values in found.items()}


def figures(sam: Any) -> dict[str, dict[str, float]]:
    """Held-out figures on scenes (with other photographs) and on line drawings."""
    return {
        "scenes": held_out(sam, lambda i: draw_scene(99, i, SIDE, train=False)),
        "drawings": held_out(sam, lambda i: plan(99, i)),
    }


def publish(folder: Path, name: str = "tiny_sam") -> None:
    """Write the averaged weights in half precision, and what is known about them, where the package looks."""
    target = Path("visadapt/backbones/tiny")
    kept = torch.load(folder / "state.pt", weights_only=True)
    content = save({k: v.half().contiguous() for k, v in kept["average"].items()}, metadata={"format": "pt"})
    (target / f"{name}.tmp").write_bytes(content)
    os.replace(target / f"{name}.tmp", target / f"{name}.safetensors")
    recipe = target / f"{name}.json"
    known = json.loads(recipe.read_text())
    known |= {
        "parameters": sum(tensor.numel() for tensor in kept["average"].values()),
        "data": f"{SCENES} scenes and {PLANS} line drawings of seed {SEED} (visadapt/data/shapes.py, drawings.py)",
        "config": "configs/pretrain/tiny_sam.py",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "torch": torch.__version__,
        "steps": kept["step"],
        "held_out": figures(SAM(name).build().eval()),
    }
    recipe.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    print(known["held_out"])


def main() -> None:
    """Train, or publish what was trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--publish", action="store_true")
    options = parser.parse_args()
    if options.publish:
        publish(options.folder)
    else:
        train(options.folder)


if __name__ == "__main__":
    main()
