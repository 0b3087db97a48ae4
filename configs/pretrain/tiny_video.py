"""Train the motion modules that turn the shipped tiny Stable Diffusion into the tiny video base.

    python configs/pretrain/tiny_video.py --folder runs/tiny_video --publish

AnimateDiff (Guo et al. 2023, arXiv:2307.04725): the image UNet stays frozen, so adapters of the images fit the videos;
the motion modules start from zero (their last projection) and learn from clips of 8 frames in which shapes move right,
left, up or down. Of the text encoder only the embeddings of those pieces of the motion words train that no caption of
the images has, so without motion words it is the same, bit for bit.

Nothing in the data says at once how a word, the number of a frame and a place in it belong together: two of the three
tell nothing about the pixel. So there are lessons: first shapes only move right, then right and down, then
everywhere, all on pure noise, from which sampling starts. (In clips that are noisy but not lost the paths can still
be seen; whoever learns from them alone ignores the words: 1,500 steps, no direction followed.) For the same reason
temporal attention starts by looking at its own frame (uniform attention does not know which one that is), the words
learn forty times as fast, and errors in what changes over time count more. "motion" in the log is how much of that
change is explained on pure noise, thus from the words alone. Clips are kept as latents, and each also serves
backwards. Training goes on from its last 250 steps.

``--publish`` writes visadapt/backbones/tiny/tiny_video/ in diffusers' layout of motion adapters, with a text encoder,
tiny_video.json with the figures of the shipped files, and docs/images/tiny_video.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from resumable import Plan, quick, train
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from visadapt.backbones.sd_layout import SHIPPED
from visadapt.data.moving import DIRECTIONS, MOTIONS, clip, motion_of, words
from visadapt.data.plane_shapes import SHAPES
from visadapt.data.scenes import NULL, Spec, read, specs, vocabulary
from visadapt.metrics.clips import consistency, frame_adherence, frame_features
from visadapt.metrics.features import Extractor
from visadapt.metrics.motion import centres, directed

SEED, SIDE, FRAMES = 7, 32, 8
CLIPS, BATCH = 2_400, 12
VIDEO = Plan("video", 1_600, 1e-3)
PUSH = 40.0  # of the words' learning rate over that of the modules
MOVING = 4.0  # weight of errors in what changes over time
LESSONS = {120: ("right",), 360: ("right", "down")}  # what moves where up to a step; everywhere afterwards
BLIND = 600  # steps on pure noise alone, and half of each batch afterwards
NULL_SHARE, GUIDANCE, SAMPLING_STEPS = 0.1, 3.0, 20
NAMES = tuple(DIRECTIONS)
OPPOSITE = {"right": "left", "left": "right", "up": "down", "down": "up"}
PACKAGE = {"tiny_video": SHIPPED.parent, "picture": Path("docs/images")}


def motion_adapter() -> Any:
    """Motion modules behind every block of the tiny UNet, which change nothing yet and look at their own frame."""
    from diffusers import MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(64, 128),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=16,
        motion_max_seq_length=FRAMES,
    )
    for name, parameter in adapter.named_parameters():
        if ".proj_out." in name:
            nn.init.zeros_(parameter)
        if ".attn" in name and name.endswith("weight"):
            nn.init.eye_(parameter)
    return adapter


def pipeline(base: Path, adapter: Any, text_encoder: Path | None = None) -> Any:
    """The stock pipeline of an image base, a motion adapter and perhaps another text encoder, all frozen."""
    from diffusers import AnimateDiffPipeline, StableDiffusionPipeline, UNetMotionModel
    from transformers import CLIPTextModel

    images = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)  # in single precision
    other = None if text_encoder is None else CLIPTextModel.from_pretrained(text_encoder)
    pipe: Any = AnimateDiffPipeline(
        vae=images.vae,
        text_encoder=(other or images.text_encoder).float(),  # transformers keeps the file's half precision
        tokenizer=images.tokenizer,
        unet=UNetMotionModel.from_unet2d(images.unet, adapter),
        motion_adapter=None,  # type: ignore[arg-type]  # the UNet has it
        scheduler=images.scheduler,
    )
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Words(nn.Module):
    """Embeddings of the tokens that only motion words have, in the place of those of a pipeline's text encoder."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        table = pipe.text_encoder.get_input_embeddings()
        known = {i for word in (*vocabulary(), "sks") for i in pipe.tokenizer(word).input_ids}
        self.tokens = sorted({i for name in NAMES for i in pipe.tokenizer(MOTIONS[name]).input_ids} - known)
        self.start = table.weight[self.tokens].clone()
        self.change = nn.Parameter(torch.zeros_like(self.start))
        self.row = torch.full((len(table.weight),), -1)
        self.row[self.tokens] = torch.arange(len(self.tokens))
        table.register_forward_hook(self._replaced)

    def rows(self) -> Tensor:
        """The embeddings (n, D) of ``tokens``."""
        return self.start + PUSH * self.change

    def _replaced(self, table: nn.Module, given: tuple[Tensor], found: Tensor) -> Tensor:
        row = self.row[given[0]]
        return torch.where((row >= 0)[..., None], self.rows()[row.clamp_min(0)], found)


def trained_parts(pipe: Any) -> nn.ModuleDict:
    """What trains: the motion modules of a pipeline, the very ones, by their places, and the ``words``."""
    found = {name: module for name, module in pipe.unet.named_modules() if name.endswith("motion_modules")}
    parts = nn.ModuleDict({name.replace(".", "/"): module for name, module in found.items()})
    parts["words"] = Words(pipe)
    return parts.requires_grad_(True)


# --- training ----------------------------------------------------------------------------
def drawn(folder: Path, pipe: Any, count: int) -> tuple[Tensor, Tensor]:
    """Latents (N, F, 4, 8, 8) of clips, and the positions of combination and direction (N, 2)."""
    file = folder / f"clips_{count}.pt"
    if not file.exists():
        latents, labels = [], []
        for index in range(count):
            frames, _, label = clip(SEED, index, FRAMES, SIDE)
            spec = next(i for i, s in enumerate(specs(False)) if _same(s, label))
            labels.append((spec, label["motion"]))
            pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.no_grad(), quick():
                latents.append(pipe.vae.encode(pixels).latent_dist.mode().float() * pipe.vae.config.scaling_factor)
        torch.save((torch.stack(latents), torch.tensor(labels)), file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)
    return torch.load(file, weights_only=True)


def _same(spec: Spec, label: dict[str, Any]) -> bool:
    return all(label[name] == number for name, number in spec.labels.items())


def by_motion(latents: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Latents of the clips that move each way, forwards or played backwards, and their combinations."""
    found = {}
    for name in NAMES:
        same, other = (labels[:, 1] == NAMES.index(n) for n in (name, OPPOSITE[name]))
        found[name] = torch.cat([latents[same], latents[other].flip(1)]), torch.cat([labels[same, 0], labels[other, 0]])
    return found


def lesson(step: int) -> tuple[str, ...]:
    """Where shapes move in a step."""
    return next((names for last, names in LESSONS.items() if step < last), NAMES)


def train_motion(folder: Path, plan: Plan, pipe: Any, clips: int, count: int) -> nn.ModuleDict:
    """Train the motion modules; every 1,000 steps clips by the averaged ones are judged and drawn."""
    pool = by_motion(*drawn(folder, pipe, clips))
    modules, explained = trained_parts(pipe), Running()
    scheduler = pipe.scheduler
    last = len(scheduler.alphas_cumprod) - 1

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((SEED, step, 1))
        names = lesson(step)
        moves = [names[place % len(names)] for place in range(BATCH)]
        chosen = [int(rng.integers(len(pool[name][0]))) for name in moves]
        clean = torch.stack([pool[name][0][i] for name, i in zip(moves, chosen)])
        said = [words(specs(False)[int(pool[name][1][i])], name, rng) for name, i in zip(moves, chosen)]
        said = [line if rng.random() > NULL_SHARE else NULL for line in said]
        blind = torch.arange(BATCH) < (BATCH if step < BLIND else BATCH // 2)
        times = torch.where(blind, last, (last * torch.rand(BATCH) ** (1 / 3)).long())
        noise = torch.randn_like(clean)
        noisy = torch.where(blind[:, None, None, None, None], noise, scheduler.add_noise(clean, noise, times))
        with quick(), sdpa_kernel(SDPBackend.MATH):
            found = predicted(pipe, noisy, times, said)
        error = found.float() - scheduler.get_velocity(clean, noise, times)
        moving = error - error.mean(1, keepdim=True)
        explained.add(step, moving[blind], (clean - clean.mean(1, keepdim=True))[blind])
        return error.square().mean() + MOVING * moving.square().mean()

    def watch(step: int, averaged: Any) -> None:
        with holding(modules, averaged):
            figures, videos = follows(pipe, held_out=False, count=min(32, count))
        strips(videos[:12]).save(folder / "samples.png")
        print(f"video: after {step} steps {figures}", flush=True)
        with (folder / "direction.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, **figures}) + "\n")

    return train(plan, folder, modules, loss, watch)  # type: ignore[return-value]


def predicted(pipe: Any, noisy: Tensor, times: Tensor, said: list[str]) -> Tensor:
    """The UNet's prediction (B, F, 4, 8, 8) of noisy latents of that shape."""
    ids = pipe.tokenizer(said, padding="max_length", truncation=True, return_tensors="pt").input_ids
    text = pipe.text_encoder(ids)[0].repeat_interleave(noisy.shape[1], 0)
    return pipe.unet(noisy.transpose(1, 2), times, text).sample.transpose(1, 2)


class Running:
    """Prints, every 50 steps, how much of what changes over time is explained on pure noise."""

    def __init__(self) -> None:
        self.left = self.all = 0.0

    def add(self, step: int, error: Tensor, wanted: Tensor) -> None:
        """Take account of a step's errors and targets without their means over time."""
        self.left = 0.95 * self.left + float(error.detach().square().sum())
        self.all = 0.95 * self.all + float(wanted.square().sum())
        if step % 50 == 49:
            print(f"video: step {step}, motion {1 - self.left / self.all:.3f}", flush=True)


@contextmanager
def holding(modules: nn.Module, others: nn.Module) -> Iterator[None]:
    """The modules with the weights of others, for a while."""
    before = {name: tensor.clone() for name, tensor in modules.state_dict().items()}
    modules.load_state_dict(others.state_dict())
    try:
        yield
    finally:
        modules.load_state_dict(before)


# --- what it can do ----------------------------------------------------------------------
def sampled(pipe: Any, captions: list[str], seed: int) -> Tensor:
    """Clips (N, F, 3, 32, 32) in 0 … 1 of captions."""
    options = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
    found = []
    for start in range(0, len(captions), 16):
        generator = torch.Generator().manual_seed(seed + start)
        with torch.inference_mode():
            made = pipe(captions[start : start + 16], FRAMES, SIDE, SIDE, generator=generator, **options)
        found.append(made.frames.float())
    return torch.cat(found)


def follows(pipe: Any, held_out: bool, count: int) -> tuple[dict[str, float], Tensor]:
    """Direction accuracy and the judge's figures for plain captions, a quarter of them for each direction."""
    rng = np.random.default_rng(1)
    chosen = rng.choice(len(specs(held_out)), count, replace=count > len(specs(held_out))).tolist()
    said = [words(specs(held_out)[spec], NAMES[number % 4]) for number, spec in enumerate(chosen)]
    videos = sampled(pipe, said, seed=1000)
    right = directed(centres(videos), torch.tensor([DIRECTIONS[motion_of(line) or ""] for line in said]))
    asked = [read(line) for line in said]
    figures = {"direction": float(right.float().mean())}
    figures |= frame_adherence(videos, {name: [labels[name] for labels in asked] for name in asked[0]})
    figures["consistency"] = consistency(frame_features(Extractor().build(), videos))
    kept = ("direction", "shape", "colour", "background", "all", "consistency")
    return {name: round(figures[name], 3) for name in kept}, videos


def strips(videos: Tensor, zoom: int = 2) -> Image.Image:
    """Clips below each other, their frames side by side, enlarged without smoothing."""
    pixels = (videos.clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    page = Image.fromarray(np.concatenate([np.concatenate(list(frames), 1) for frames in pixels]))
    return page.resize((page.width * zoom, page.height * zoom), Image.Resampling.NEAREST)


# --- publishing --------------------------------------------------------------------------
def publish(places: dict[str, Path], plan: Plan, base: Path, modules: nn.ModuleDict, count: int, clips: int) -> None:
    """Write the motion adapter in half precision, reload it, judge it, and write what is known about it."""
    from diffusers import MotionAdapter

    target = places["tiny_video"] / "tiny_video"
    draft = target.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    adapter = motion_adapter()
    found = {f"{place}.{name}": t for place, part in modules.items() for name, t in part.state_dict().items()}
    adapter.load_state_dict({n.replace("/", "."): t for n, t in found.items() if not n.startswith("words.")})
    adapter.half().save_pretrained(draft)
    write_text_encoder(base / "text_encoder", draft / "text_encoder", modules["words"])
    for file in draft.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # the library writes weights for their owner only
    pipe = pipeline(base, MotionAdapter.from_pretrained(draft), draft / "text_encoder")
    facts: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in adapter.parameters()),
        "bytes": sum(file.stat().st_size for file in draft.rglob("*") if file.is_file()),
        "base": f"tiny_sd, frozen but for the embeddings of {len(modules['words'].tokens)} pieces of the motion words",
        "frames": FRAMES,
        "data": f"{clips} clips of seed {SEED}, forwards and backwards (visadapt/data/moving.py, kind 'moving')",
        "steps": plan.steps,
        "batch": BATCH,
        "config": "configs/pretrain/tiny_video.py",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "torch": torch.__version__,
        "combinations_of_training": follows(pipe, False, count)[0],
        "combinations_held_out": follows(pipe, True, min(count, len(specs(True))))[0],
        "how": f"{count} plain captions each (64 held-out ones at most), a quarter for each direction, DDIM "
        f"{SAMPLING_STEPS} steps, guidance {GUIDANCE}; direction: visadapt.metrics.motion.directed, else means over "
        "frames of the judge's figures, consistency by its features",
    }
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)
    record = target.with_suffix(".json")
    record.with_suffix(".part").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(record.with_suffix(".part"), record)
    example_sheet(pipe).save(places["picture"] / "tiny_video.png", optimize=True)
    print(json.dumps(facts, indent=2), flush=True)


def write_text_encoder(base: Path, folder: Path, own: Any) -> None:
    """A copy of a text encoder, in which only the embeddings of some tokens are others."""
    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    table = next(tensor for name, tensor in tensors.items() if name.endswith("token_embedding.weight"))
    table[own.tokens] = own.rows().detach().to(table.dtype)
    file.write_bytes(save(tensors, metadata={"format": "pt"}))


def example_sheet(pipe: Any) -> Image.Image:
    """Two clips of each direction, every frame, with their captions."""
    colours = ("red", "yellow", "white", "blue", "orange", "green", "purple", "black")
    grounds = ("blue", "purple", "green", "bricks", "black", "white", "wood", "gravel")
    said = [words(Spec(*look), NAMES[n % 4]) for n, look in enumerate(zip(SHAPES, colours, grounds))]
    grid = strips(sampled(pipe, said, seed=0))
    page = Image.new("RGB", (grid.width + 300, grid.height), "white")
    page.paste(grid, (300, 0))
    pen, side = ImageDraw.Draw(page), grid.height // len(said)
    for number, line in enumerate(said):
        pen.text((292, number * side + side // 2), line, "black", anchor="rm")
    return page


def main() -> None:
    """Train what is not finished, and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=SHIPPED, help="the image base, a folder in diffusers' layout")
    parser.add_argument("--publish", action="store_true", help="write what was trained into the package")
    parser.add_argument("--steps", type=int, default=VIDEO.steps, help="steps in all; more go on from fewer")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips that are drawn and kept")
    parser.add_argument("--count", type=int, default=64, help="captions that the published figures are measured with")
    parser.add_argument("--into", type=Path, help="folder to publish in, instead of the package")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    plan = replace(VIDEO, steps=options.steps)
    torch.manual_seed(0)
    pipe = pipeline(options.base, motion_adapter())
    modules = train_motion(options.folder, plan, pipe, options.clips, options.count)
    if options.publish:
        places = PACKAGE if options.into is None else dict.fromkeys(PACKAGE, options.into)
        publish(places, plan, options.base, modules, options.count, options.clips)


if __name__ == "__main__":
    main()
