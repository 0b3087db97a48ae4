"""The model card of a run: README.md in its folder, with a header that model hubs read."""

from __future__ import annotations

from collections.abc import Iterable

from visadapt.report.facts import RunFacts, patterns
from visadapt.report.plots import is_share

PICTURES = {
    "predictions.png": "Predictions before and after adaptation",
    "learning_curves.png": "Learning curves",
    "confusion_matrix.png": "Confusion matrix",
    "class_iou.png": "IoU of each class",
    "pictures.png": "Pictures of the base and of the adapted model",
    "videos.webp": "Videos of the base and of the adapted model",
    "videos.png": "Frames of them",
    "accuracy_matrix.png": "Accuracy after each task, on each task",
    "update_sizes.png": "What the update of each task is worth",
}
PIPELINES = {  # names of model hubs
    "classes": "image-classification",
    "masks": "image-segmentation",
    "pictures": "text-to-image",
    "videos": "text-to-video",
    "sequence": "image-classification",
}
_COMMANDS = {  # by kind of task; {file} is the adapter file to take
    "classes": [
        "visadapt predict --adapter adapter.safetensors --images FOLDER",
        "visadapt merge adapter.safetensors --output merged.safetensors   # for stock timm",
    ],
    "masks": [
        "visadapt predict --adapter adapter.safetensors --images sheet.png",
        "visadapt merge adapter.safetensors --output merged.pth   # for stock segment-anything",
    ],
    "pictures": [
        'visadapt predict --adapter adapter.safetensors --prompts "a prompt" --seeds 0 1 2',
        "visadapt export adapter.safetensors --format diffusers --output lora   # pipe.load_lora_weights, certified",
        "visadapt export adapter.safetensors --format kohya --output lora.safetensors   # ComfyUI and others",
        "visadapt merge adapter.safetensors --output merged   # the whole pipeline",
    ],
    "videos": [
        'visadapt predict --adapter {file} --prompts "a prompt" --seeds 0 1 2',
        "visadapt export {file} --format diffusers --output motion   # for AnimateDiffPipeline, certified",
        "visadapt merge {file} --output merged   # the whole pipeline, certified",
    ],
}
_WHOLE = {  # a run without adapters
    "classes": "visadapt predict --ckpt_path checkpoints/last.ckpt --images FOLDER",
    "masks": "visadapt predict --ckpt_path checkpoints/last.ckpt --images sheet.png",
    "pictures": 'visadapt predict --ckpt_path checkpoints/last.ckpt --prompts "a prompt" --seeds 0 1 2',
    "videos": 'visadapt predict --ckpt_path checkpoints/last.ckpt --prompts "a prompt" --seeds 0 1 2',
}
_IN_PYTHON = {  # {base} is the name of the base network
    "classes": [
        "import visadapt as va",
        "",
        "model = ...  # the base network, {base}",
        'va.load(model, "adapter.safetensors")',
    ],
    "masks": [
        "from segment_anything import SamPredictor",
        "from visadapt.backbones.sam import SAM",
        "from visadapt.backbones.sam_export import load_adapter",
        "",
        'sam = SAM("{base}").build()  # with checkpoint="FILE" for an official one',
        'predictor = SamPredictor(load_adapter(sam, "adapter.safetensors"))',
    ],
    "pictures": [
        "import visadapt as va",
        "from visadapt.backbones.sd_tokens import load_adapter",
        "from visadapt.backbones.stable_diffusion import StableDiffusion, pipeline",
        "",
        'model = load_adapter(StableDiffusion("{base}").build(), "adapter.safetensors")',
        'picture = pipeline(model)("a prompt").images[0]  # the stock pipeline',
    ],
    "videos": [
        "import visadapt as va",
        "from visadapt.backbones.video_diffusion import VideoDiffusion",
        "from visadapt.backbones.video_render import render",
        "",
        'model = va.load(VideoDiffusion("{base}").build(), "{file}")',
        'video = render(model, ["a prompt"], [0])  # (1, frames, 3, height, width) in 0 … 1',
    ],
}
# A model of a sequence is a classifier like any other.
_COMMANDS["sequence"], _IN_PYTHON["sequence"] = _COMMANDS["classes"], _IN_PYTHON["classes"]
_WHOLE["sequence"] = _WHOLE["classes"]


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a Markdown table."""
    head = list(header)
    body = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body]


def figure_text(name: str, value: float) -> str:
    """A share as a percentage, anything else with four digits."""
    return f"{value:.1%}" if is_share(name) else f"{value:.4g}"


def card(facts: RunFacts, pictures: Iterable[str], peft: bool) -> str:
    """Text of the model card.

    Args:
        facts: What the run was and reached.
        pictures: File names of the pictures that exist.
        peft: Whether stock PEFT can load an export of the adapters.
    """
    methods = ", ".join(dict.fromkeys(s.method for s in facts.sets)) or "no adapter"
    lines = [
        "---",
        "library_name: visadapt",
        f"base_model: {facts.base}",
        f"pipeline_tag: {PIPELINES[facts.kind]}",
        f"tags: [visadapt, {', '.join(dict.fromkeys(s.method.lower() for s in facts.sets))}]".replace(", ]", "]"),
        "---",
        f"# {facts.name}",
        "",
        f"{methods} on `{facts.base}`, trained by visadapt ({facts.task}, {facts.date}).",
        "",
        *_figures(facts),
        "",
        *_adapters(facts),
        "## Use it",
        "",
        *_usage(facts, peft),
        "",
        "## Train it again",
        "",
        "`config.yaml` holds every setting of the run: `visadapt fit --config config.yaml`.",
        "",
    ]
    for file in pictures:
        lines += [f"## {PICTURES[file]}", "", f"![{PICTURES[file]}]({file})", ""]
    return "\n".join(lines)


def _figures(facts: RunFacts) -> list[str]:
    rows: list[tuple[str, str]] = [(name, figure_text(name, v)) for name, v in facts.figures.items()]
    rows.append(("trainable parameters", f"{facts.trainable:,} beside {facts.total:,} of the base"))
    if facts.adapter_bytes:
        rows.append(("adapter file", f"{facts.adapter_bytes / 1024:,.0f} KiB"))
    rows.append(("training", f"{facts.epochs} epochs, {facts.steps} steps, {facts.minutes:.1f} min"))
    if facts.step_ms is not None:
        rows.append(("step time (median)", f"{facts.step_ms:.1f} ms on {facts.device}"))
    if facts.peak_memory_mib is not None:
        rows.append(("peak memory", f"{facts.peak_memory_mib:,.0f} MiB ({facts.memory_kind})"))
    if facts.started_from:
        rows.append(("started from", f"`{facts.started_from}`"))
    if facts.base_hash:
        rows.append(("hash of the base", f"`{facts.base_hash[:16]}`"))
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in facts.versions.items())))
    return table(("", ""), rows)


def _adapters(facts: RunFacts) -> list[str]:
    if not facts.sets:
        return []
    rows = [
        (
            s.name,
            s.method,
            f"`{patterns(s.layers)}` ({len(s.layers)})",
            ", ".join(f"{k}={v}" for k, v in s.hparams.items()),
            f"{s.parameters:,}",
        )
        for s in facts.sets
    ]
    header = ("set", "method", "layers", "hyper-parameters", "parameters")
    return ["## Adapters", "", *table(header, rows), ""]


def _usage(facts: RunFacts, peft: bool) -> list[str]:
    if not facts.sets:
        return ["```bash", _WHOLE[facts.kind], "```"]
    motion = facts.kind == "videos" and len({s.name for s in facts.sets}) > 1  # the appearance has its own file
    file = "temporal.safetensors" if motion else "adapter.safetensors"
    lines = [
        "```bash",
        *(line.format(file=file) for line in _COMMANDS[facts.kind]),
        "```",
        "",
        "```python",
        *(line.format(base=facts.base, file=file) for line in _IN_PYTHON[facts.kind]),
        "```",
    ]
    if peft and facts.kind in ("classes", "masks", "sequence"):
        lines += [
            "",
            "In PEFT, after `visadapt export adapter.safetensors --output peft_folder`:",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(model, "peft_folder")',
            "```",
        ]
    return lines
