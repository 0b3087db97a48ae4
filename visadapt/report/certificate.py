"""Parity certificate: a stock pipeline loads what was exported or merged and renders what the trained model renders."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from visadapt.backbones.stable_diffusion import Diffusion
from visadapt.backbones.video_diffusion import VideoModel
from visadapt.core.export import acting
from visadapt.interop.diffusers_file import diffusers_path
from visadapt.interop.keys import split
from visadapt.interop.parts import parts
from visadapt.interop.read import import_lora
from visadapt.report.facts import write_text
from visadapt.report.fixed_renders import rendered, settings_of, stock

_LIBRARIES = ("visadapt", "torch", "diffusers", "transformers", "peft", "safetensors")
PROMPTS = ("a red circle", "a photo of a dog")
_START, _END = "<!-- certificate -->", "<!-- /certificate -->"


@dataclass
class Certificate:
    """What was compared, and how far the two are apart.

    Args:
        file: name of the file or folder.
        format: "diffusers", "kohya", "peft", "lycoris", "comfyui" or "merged".
        loader: who read it.
        sha256: hash of the file (of a folder: of its files, in the order of their names).
        tensors: tensors written, without alphas.
        matched: those of them that the loaded pipeline holds, bit by bit.
        layers: adapted layers in the file.
        updates: those of them whose update is not zero.
        latents: largest deviation of the final latents, as a share of the largest latent.
        pixels: largest deviation of a pixel, of values in 0 … 1.
        effect: largest change that the adapter makes to a pixel.
        tolerance: what latents and pixels may deviate at most.
        renders: prompts, seeds, steps, guidance and size; of videos also frames.
        versions: of the libraries.
    """

    file: str
    format: str
    loader: str
    sha256: str
    tensors: int
    matched: int
    layers: int
    updates: int
    latents: float
    pixels: float
    effect: float
    tolerance: float
    renders: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """What was rendered."""
        return "videos" if "frames" in self.renders else "pictures"

    @property
    def problems(self) -> list[str]:
        """Why the file is rejected; empty if it is not."""
        found = []
        if self.matched < self.tensors:
            found.append(f"{self.tensors - self.matched} of {self.tensors} tensors were not taken over by the loader")
        if self.updates == 0 or self.effect == 0:
            found.append("the update is zero: the file changes nothing")
        worst = max(self.latents, self.pixels)
        if not worst <= self.tolerance:  # NaN is never within
            found.append(f"{self.what} deviate by {worst:.1e}, the tolerance is {self.tolerance:.1e}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the verdict."""
        return {"passed": not self.problems, "problems": self.problems, **asdict(self)}

    def lines(self) -> list[str]:
        """The section of a model card."""
        return [
            f"Loaded into a fresh base by {self.loader}: {self.matched} of {self.tensors} tensors taken over, "
            f"{self.updates} of {self.layers} layers changed. Over {len(self.renders['seeds'])} {self.what} of "
            f"{self.renders['steps']} steps the latents deviate from the trained model by at most {self.latents:.1e} "
            f"(of the largest), pixels by {self.pixels:.1e} (of 1); the adapter itself changes them by up to "
            f"{self.effect:.2g}. Tolerance {self.tolerance:.0e}: **{'passed' if not self.problems else 'failed'}**.",
            "",
            f"`{self.file}` ({self.format}), sha256 `{self.sha256}`; "
            + ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        ]


@torch.no_grad()
def certify(
    model: Diffusion | VideoModel, fresh: Callable[[], Diffusion | VideoModel], path: Path, format: str,
    tolerance: float = 1e-4, tokens: Sequence[Path] = (), prompts: Sequence[str] = PROMPTS, steps: int = 3,
) -> Certificate:  # fmt: skip
    """Load an exported file into a fresh base with stock code, render, and compare with the trained model.

    Args:
        model: the trained model.
        fresh: builds the base again, without adapters.
        path: file or folder that was written.
        format: its format, as for `visadapt.export`.
        tolerance: largest deviation to accept.
        tokens: embedding files of new words, loaded as textual inversions; prompts with them are added.
        prompts: what to render, each with a seed of its own.
        steps: of the sampler.

    Raises:
        ImportError: the library that loads the format is missing.
        ValueError: the loader refuses the file.
    """
    settings = settings_of(model, _with_words(model, prompts), steps)
    plain = rendered(fresh(), settings)[1]
    other = fresh()
    loader, loaded = _load(other, path, format, tokens)
    files = written_files(path, format)
    written, layers, updates = _content(files)
    matched = written.total() if loaded is None else (written & loaded).total()
    held: dict[str, Any] = {"sha256": _hash(files), "tensors": written.total(), "matched": matched, "layers": layers}
    held |= {"updates": updates, **_deviations(rendered(model.eval(), settings), rendered(other, settings), plain)}
    return Certificate(
        path.name, format, loader, **held, tolerance=tolerance, renders=settings, versions=_versions()
    )  # fmt: skip


@torch.no_grad()
def certify_merged(
    model: Diffusion | VideoModel, write: Callable[[], Path], fresh: Callable[[], Diffusion | VideoModel],
    again: Callable[[Path], Diffusion | VideoModel], tolerance: float = 1e-4, steps: int = 3,
) -> Certificate:  # fmt: skip
    """The same of a whole pipeline with everything that was trained folded in.

    Args:
        model: the trained model, its adapters still beside the weights.
        write: folds them in, writes the pipeline's folder, and gives its path back.
        fresh: builds the base again, without adapters.
        again: builds what is in that folder, by stock code.
        tolerance: largest deviation to accept.
        steps: of the sampler.
    """
    settings, adapted = settings_of(model, _with_words(model, PROMPTS), steps), set(acting(model))
    ours = rendered(model.eval(), settings)
    path = write()
    base, other = fresh(), again(path)
    found = _deviations(ours, rendered(other, settings), rendered(base, settings)[1])
    merged, loaded, before = (one.state_dict() for one in (model, other, base))
    matched = [name for name, tensor in merged.items() if name in loaded and torch.equal(tensor, loaded[name])]
    same = {name for name, tensor in merged.items() if name in before and torch.equal(tensor, before[name])}
    changed = {name.rpartition(".")[0] for name in merged.keys() - same}  # adapted layers, and what trained as it is
    return Certificate(
        path.name, "merged", "stock diffusers (DiffusionPipeline.from_pretrained)",
        _hash(sorted(path.rglob("*.safetensors"))), len(merged), len(matched), len(adapted | changed), len(changed),
        **found, tolerance=tolerance, renders=settings, versions=_versions(),
    )  # fmt: skip


def _with_words(model: Any, prompts: Sequence[str]) -> list[str]:
    """The prompts, and one for each new word of the model."""
    return [*prompts, *(f"a photo of {word.name}" for word in getattr(model, "new_tokens", ()))]


def _deviations(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], plain: Tensor) -> dict[str, float]:
    """Of latents and pixels, and what the adapter changes of the plain base's pixels."""
    latents = (theirs[0] - ours[0]).abs().max() / ours[0].abs().max()
    pixels, effect = ((ours[1] - other).abs().max() for other in (theirs[1], plain))
    return {"latents": float(latents), "pixels": float(pixels), "effect": float(effect)}


def written_files(path: Path, format: str) -> list[Path]:
    """The files with tensors that an export has written."""
    if format == "peft":
        return sorted(path.glob("*/adapter_model.safetensors"))
    return [diffusers_path(path) if format == "diffusers" else path]


def _load(
    model: Diffusion | VideoModel, path: Path, format: str, tokens: Sequence[Path]
) -> tuple[str, Counter[bytes] | None]:
    """Who loads the file into the fresh base, and the tensors that the base then holds (None: the loader is strict)."""
    for file in tokens:
        _load_token(model, file)
    if format in ("lycoris", "comfyui"):
        import_lora(model, path)
        return "visadapt's own reader (stock diffusers reads plain LoRA only)", None
    if format == "peft":
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ImportError("checking a PEFT folder needs peft: pip install 'visadapt[peft]'") from error
        for part, module in parts(model).items():
            if (path / part).is_dir():
                PeftModel.from_pretrained(module, str(path / part))  # type: ignore[arg-type]
        return "stock PEFT (PeftModel.from_pretrained)", _held(model)
    try:
        file = diffusers_path(path)
        stock(model).load_lora_weights(str(file.parent), weight_name=file.name)
    except ValueError as error:
        told = " ".join(str(error).split())[:200]
        if "PEFT backend" in told:
            raise ImportError("stock diffusers loads LoRA through peft: pip install 'visadapt[peft]'") from error
        raise ValueError(f"stock diffusers refuses '{path}': {told}") from error
    return "stock diffusers (pipeline.load_lora_weights)", _held(model)


def _load_token(model: Any, file: Path) -> None:
    pipeline = stock(model)
    with safe_open(file, "pt") as held:
        token = (held.metadata() or {})["token"]
        tensors = {key: held.get_tensor(key) for key in held.keys()}
    if "clip_g" not in tensors:
        pipeline.load_textual_inversion(tensors, token=token)
        return
    for key, encoder, tokenizer in (
        ("clip_l", model.text_encoder, model.tokenizer),
        ("clip_g", model.text_encoder_2, model.tokenizer_2),
    ):
        pipeline.load_textual_inversion(tensors[key], token=token, text_encoder=encoder, tokenizer=tokenizer)


def _held(model: Diffusion | VideoModel) -> Counter[bytes]:
    """The adapter tensors that stock libraries have put into the networks."""
    found = [
        p
        for module in parts(model).values()
        for n, p in module.named_parameters()
        if any(sign in n for sign in ("lora_", "lokr_", "modules_to_save"))
    ]
    return Counter(map(_digest, found))


def _content(files: Sequence[Path]) -> tuple[Counter[bytes], int, int]:
    """Tensors without alphas, adapted layers, and layers whose update is not zero."""
    found: Counter[bytes] = Counter()
    zero: dict[str, bool] = {}
    for file in files:
        with safe_open(file, "pt") as held:
            for key in held.keys():
                layer, role = split(key) or (key, "")
                tensor = held.get_tensor(key)
                found.update([_digest(tensor)] if role != "alpha" else [])
                name = f"{file.parent.name}/{layer}"
                zero[name] = zero.get(name, False) or (role not in ("alpha", "") and not bool(tensor.any()))
    return found, len(zero), len(zero) - sum(zero.values())


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).digest()


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def certificate_path(written: Path) -> Path:
    """Where the certificate of a file or folder lies."""
    return written / "certificate.json" if written.is_dir() else written.with_suffix(".certificate.json")


def write_certificate(certificate: Certificate, written: Path, card: Path | None = None) -> Path:
    """Write the certificate beside the file, and into a model card that is there; returns its path."""
    path = certificate_path(written)
    write_text(path, json.dumps(certificate.as_dict(), indent=1, ensure_ascii=False) + "\n")
    if card is not None and card.is_file():
        text = card.read_text(encoding="utf-8")
        before, _, rest = text.partition(_START)
        after = rest.partition(_END)[2]
        section = "\n".join([_START, "## Parity certificate", "", *certificate.lines(), _END])
        write_text(card, before.rstrip("\n") + f"\n\n{section}\n" + after.lstrip("\n"))
    return path


def certified(place: Path) -> str:
    """The lines of a certificate that a file holds, its own or a model card's; empty if there is none."""
    if not place.is_file():
        return ""
    text = place.read_text(encoding="utf-8")
    if place.suffix != ".json":
        return text.partition(_START)[2].partition(_END)[0].partition("\n\n")[2].strip()
    held = json.loads(text)
    known = {name: held[name] for name in Certificate.__dataclass_fields__ if name in held}
    return "\n".join(Certificate(**known).lines())
