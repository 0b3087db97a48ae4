"""Pre-train the tiny Stable Diffusion that ships with visadapt on captioned scenes, and the judge of its pictures.

    python configs/pretrain/tiny_sd.py --folder runs/tiny_sd --publish  # 2 to 3 hours on 2 cores
    python configs/pretrain/tiny_sd.py --folder runs/tiny_sd --stage vae  # up to a stage: vae, judge or unet

Three stages, each resumed from its last 250 steps: the autoencoder, on scenes, doodles with textures of photographs,
and digits; the judge (tiny_judge.py); then text encoder and UNet together on the cached latents of the scenes,
predicting v with min-SNR weights (Hang et al. 2023, arXiv:2303.09556), 10 % of the captions empty. Neither the subject
nor the style of visadapt/data/scenes.py is drawn for the first and the last, nor one in ten of the combinations.
``--publish`` writes visadapt/backbones/tiny/tiny_sd/ in diffusers' layout, tiny_sd.json with the figures of the shipped
file, the judge and docs/images/tiny_sd.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_sd_networks as networks
import torch
from PIL import Image, ImageDraw
from resumable import Plan, once, quick, train
from safetensors.torch import load_file, save
from tiny_judge import as_bytes, as_input, publish_judge, train_judge
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from visadapt.data.plane_shapes import SHAPES
from visadapt.data.scenes import NULL, Spec, caption, digit, draw, read, specs
from visadapt.data.shapes import draw_scene
from visadapt.metrics.adherence import FILE, Judge, adherence

SEED, SIDE = 5, networks.SIDE
SCENES, OTHERS = 40_000, 12_000
VAE = Plan("vae", 6_000, 1e-3)
UNET = Plan("unet", 6_000, 1.2e-3)
VAE_BATCH, UNET_BATCH = (24, 8), 96
NULL_SHARE, GAMMA, GUIDANCE, SAMPLING_STEPS = 0.1, 5.0, 3.0, 20
PACKAGE = {"tiny_sd": Path("visadapt/backbones/tiny"), "judge": FILE.parent, "picture": Path("docs/images")}


def reduced(plan: Plan, scale: float) -> Plan:
    """A plan with a part of the steps."""
    return replace(plan, steps=max(1, int(plan.steps * scale)))


def latents_file(folder: Path, plan: Plan) -> Path:
    """Where the latents of the autoencoder after so many steps are kept."""
    return folder / f"latents_{plan.steps}.pt"


# --- pictures ----------------------------------------------------------------------------
def drawn_scenes(count: int) -> tuple[Tensor, Tensor]:
    """Scenes (N, 3, 32, 32) of bytes and the positions (N,) of their combinations in ``specs(False)``."""
    images, which = [], []
    for index in range(count):
        rng = np.random.default_rng((SEED, index))
        which.append(int(rng.integers(len(specs(False)))))
        images.append(draw(specs(False)[which[-1]], SIDE, rng))
    return as_bytes(images), torch.tensor(which)


def drawn_others(count: int) -> Tensor:
    """Doodles and digits, so that the autoencoder can do more than scenes."""
    doodles = [draw_scene(SEED, index, 2 * SIDE)[0] for index in range(count * 3 // 4)]
    halved = [image.reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3)).round().astype(np.uint8) for image in doodles]
    return as_bytes(halved + [digit(SEED, index, SIDE)[0] for index in range(count - len(halved))])


# --- autoencoder -------------------------------------------------------------------------
def train_vae(folder: Path, scale: float) -> Any:
    """Train the autoencoder; its scaling factor becomes 1 / standard deviation of the latents of scenes."""
    images, _ = once(folder / "scenes.pt", lambda: drawn_scenes(int(SCENES * scale)))
    others = once(folder / "others.pt", lambda: drawn_others(int(OTHERS * scale)))
    torch.manual_seed(0)
    network = networks.autoencoder().to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        first, second = (torch.randint(len(p), (n,)) for p, n in zip((images, others), VAE_BATCH))
        extra = torch.rot90(others[second], int(torch.randint(4, ())), (2, 3))
        batch = as_input(torch.cat([images[first], extra])).contiguous(memory_format=torch.channels_last)
        batch = batch.flip(-1) if torch.rand(()) < 0.5 else batch
        with quick():
            posterior = network.encode(batch).latent_dist
            found = network.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(found.float(), batch) + 1e-3 * divergence

    plan = reduced(VAE, scale)
    vae = train(plan, folder, network, loss)
    latents = once(latents_file(folder, plan), lambda: encoded(vae, as_input(images)))
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))  # type: ignore[operator]
    return vae


def reconstruction_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Absolute and squared differences, and absolute differences of neighbours' differences: edges stay sharp."""
    error = found - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


@torch.no_grad()
def encoded(vae: Any, images: Tensor) -> Tensor:
    """Latents (N, 4, 8, 8) of pictures in [-1, 1], not scaled."""
    return torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(256)])


@torch.no_grad()
def reconstructed(vae: Any, images: Tensor) -> Tensor:
    """Pictures through the autoencoder."""
    return torch.cat([vae.decode(encoded(vae, part)).sample.clamp(-1, 1) for part in images.split(256)])


# --- text encoder and UNet ---------------------------------------------------------------
def train_unet(folder: Path, plan: Plan, scale: float, vae: Any, judge: Judge) -> nn.ModuleDict:
    """Train UNet and text encoder; every 1,000 steps the averaged ones are judged and ``samples.png`` is drawn."""
    _, which = torch.load(folder / "scenes.pt", weights_only=True)
    latents = torch.load(latents_file(folder, reduced(VAE, scale)), weights_only=True) * vae.config.scaling_factor
    tokenizer, scheduler = networks.tokenizer(), networks.scheduler()
    torch.manual_seed(0)
    both = nn.ModuleDict({"unet": networks.unet(), "text": networks.text_encoder()})
    both.train()
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = snr.clamp(max=GAMMA) / (snr + 1)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((SEED, step, 1))
        chosen = torch.randint(len(latents), (UNET_BATCH,))
        words = [caption(specs(False)[i], rng) if rng.random() > NULL_SHARE else NULL for i in which[chosen].tolist()]
        clean, noise = latents[chosen], torch.randn(UNET_BATCH, *latents.shape[1:])
        times = torch.randint(scheduler.config.num_train_timesteps, (UNET_BATCH,))
        ids = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noisy, wanted = scheduler.add_noise(clean, noise, times), scheduler.get_velocity(clean, noise, times)
        # PyTorch's flash kernel takes a third of the step here, most of it backward: sequences are short.
        with quick(), sdpa_kernel(SDPBackend.MATH):
            found = both["unet"](noisy, times, both["text"](ids)[0]).sample
        return (weights[times] * (found.float() - wanted).square().mean((1, 2, 3))).mean()

    def watch(step: int, averaged: Any) -> None:
        pipe = pipeline(vae, averaged["unet"], averaged["text"])
        figures, images = follows(pipe, judge, specs(False), max(8, int(128 * min(1, scale))))
        sheet(images[:64]).save(folder / "samples.png")
        print(f"unet: after {step} steps {figures}", flush=True)
        with (folder / "adherence.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, **figures}) + "\n")

    return train(plan, folder, both, loss, watch)  # type: ignore[return-value]


def pipeline(vae: Any, unet: Any, text: Any) -> Any:
    """The stock pipeline."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=networks.tokenizer(),
        unet=unet.eval(),
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe: Any, captions: list[str], seed: int) -> Tensor:
    """Pictures (N, 3, 32, 32) in [-1, 1] of captions."""
    options = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
    found = []
    for start in range(0, len(captions), 64):
        generator = torch.Generator().manual_seed(seed + start)
        part = captions[start : start + 64]
        found.append(pipe(part, height=SIDE, width=SIDE, generator=generator, **options).images.float())
    return torch.cat(found) * 2 - 1


def follows(pipe: Any, judge: Judge, choice: list[Spec], count: int) -> tuple[dict[str, float], Tensor]:
    """Adherence to the plain captions of ``count`` combinations (each at most once before any comes again)."""
    rng = np.random.default_rng(1)
    chosen = [choice[i] for _ in range(-(-count // len(choice))) for i in rng.permutation(len(choice))][:count]
    words = [caption(spec) for spec in chosen]
    images = sampled(pipe, words, seed=1000)
    asked = [read(line) for line in words]
    figures = adherence(images, {name: [labels[name] for labels in asked] for name in asked[0]}, judge)
    return {name: round(value, 3) for name, value in figures.items()}, images


def sheet(images: Tensor, columns: int = 8, zoom: int = 3) -> Image.Image:
    """Pictures in [-1, 1] side by side, enlarged without smoothing."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(pixels[i : i + columns]), 1) for i in range(0, len(pixels), columns)]
    page = Image.fromarray(np.concatenate(rows))
    return page.resize((page.width * zoom, page.height * zoom), Image.Resampling.NEAREST)


# --- publishing --------------------------------------------------------------------------
def publish(places: dict[str, Path], plans: list[Plan], vae: Any, both: Any, judge: Judge, scale: float) -> None:
    """Write the pipeline in half precision, reload it, judge it, and write what is known about it."""
    target, count = places["tiny_sd"] / "tiny_sd", max(8, int(256 * min(1, scale)))
    draft = target.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    pipe = pipeline(vae, both["unet"], both["text"])
    pipe.to(dtype=torch.float16).save_pretrained(draft, safe_serialization=True)
    networks.write_old_tokenizer(draft / "tokenizer")
    weights = draft / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(weights).items()}
    weights.write_bytes(save(old, metadata={"format": "pt"}))  # the names that every other version and tool expects
    for file in draft.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # the libraries write weights for their owner only
    pipe = reload(draft)
    facts = {"parameters": {n: sum(p.numel() for p in getattr(pipe, n).parameters()) for n in _PARTS}}
    facts |= {"bytes": sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())}
    facts |= _origin() | {"steps": {plan.name: plan.steps for plan in plans}}
    facts["adherence"] = {
        "combinations_of_training": follows(pipe, judge, specs(False), count)[0],
        "combinations_held_out": follows(pipe, judge, specs(True), count)[0],
        "how": f"{count} plain captions each, DDIM {SAMPLING_STEPS} steps, guidance {GUIDANCE}, the judge's figures",
    }
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)
    record = target.with_suffix(".json")
    record.with_suffix(".part").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(record.with_suffix(".part"), record)
    example_sheet(pipe).save(places["picture"] / "tiny_sd.png", optimize=True)
    print(json.dumps(facts["adherence"], indent=2), flush=True)


_PARTS = ("unet", "vae", "text_encoder")


def reload(folder: Path) -> Any:
    """The stock pipeline of a folder, in single precision."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _origin() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return {
        "data": f"{SCENES} scenes of seed {SEED}, 576 of 640 combinations (visadapt/data/scenes.py); the autoencoder "
        f"also saw {OTHERS} doodles with photographs' textures (visadapt/data/shapes.py) and handwritten digits",
        "config": "configs/pretrain/tiny_sd.py",
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
    }


def example_sheet(pipe: Any) -> Image.Image:
    """Every shape in six colours and grounds, with headings."""
    rows = [("red", "blue"), ("yellow", "purple"), ("white", "green"), ("blue", "bricks"), ("orange", "gravel")]
    rows.append(("black", "wood"))
    words = [caption(Spec(shape, *row)) for row in rows for shape in SHAPES]
    grid = sheet(sampled(pipe, words, seed=0), len(SHAPES))
    page = Image.new("RGB", (grid.width + 130, grid.height + 20), "white")
    page.paste(grid, (130, 20))
    pen, side = ImageDraw.Draw(page), grid.width // len(SHAPES)
    for number, shape in enumerate(SHAPES):
        pen.text((130 + number * side + side // 2, 10), shape, "black", anchor="mm")
    for number, (colour, ground) in enumerate(rows):
        pen.text((122, 20 + number * side + side // 2), f"{colour} on {ground}", "black", anchor="rm")
    return page


def main() -> None:
    """Train the stages that are not finished, and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--stage", choices=("vae", "judge", "unet"), help="the last stage to train; default: all")
    parser.add_argument("--publish", action="store_true", help="write what was trained into the package")
    parser.add_argument(
        "--steps", type=int, help=f"steps of UNet and text encoder ({UNET.steps}); more go on from fewer"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="part of the pictures and steps, for a rehearsal")
    parser.add_argument("--into", type=Path, help="folder to publish in, instead of the package")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    places = PACKAGE if options.into is None else dict.fromkeys(PACKAGE, options.into)
    vae = train_vae(options.folder, options.scale)
    if options.stage == "vae":
        return

    def reconstruct(images: Tensor) -> Tensor:
        return reconstructed(vae, images)

    judge = train_judge(options.folder, reconstruct, options.scale)
    if options.publish:
        known = {name: value for name, value in _origin().items() if name in ("commit", "torch")}
        publish_judge(judge, places["judge"], known, reconstruct)
    if options.stage in (None, "unet"):
        plan = reduced(UNET, options.scale)
        plan = replace(plan, steps=options.steps or plan.steps)
        both = train_unet(options.folder, plan, options.scale, vae, judge)
        if options.publish:
            publish(places, [reduced(VAE, options.scale), plan], vae, both, judge, options.scale)


if __name__ == "__main__":
    main()
