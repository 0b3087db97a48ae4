"""Compare ways to learn a motion: configs/text_to_video/, several seeds, tables, animated and still pictures.

    python -m benchmarks.text_to_video --jobs 2 --tasks orbit_one_clip orbit_clips  # docs/results/text_to_video
    python -m benchmarks.text_to_video --jobs 2 --rates 0.0003,0.001,0.003 # figures per learning rate, on other clips
    python -m benchmarks.text_to_video --mixed STYLE_RUN/adapter.safetensors # an appearance and a motion at strengths

Every row is a run of ``visadapt fit`` with a configuration of its own on top of the task's, so that anyone can repeat
a single one; the seed draws the clips, the start, times and noise. Runs that are there are not made again. The figures
are those of the run's report (docs/text_to_video.md): clips of prompts and seeds that are the same for all rows, which
ask for the motion with other shapes, colours and backgrounds. The row "base" is what ``visadapt test`` measures of the
first row before any step, for each seed: the clips that it is compared with differ. Rates are compared on the clips of
a seed that the table does not have.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import _figures, _runs
from benchmarks._figures import BASE, JUDGE
from benchmarks.text_to_image import side_by_side
from visadapt.report import evaluate, tiles
from visadapt.report.animation import save_webp

CONFIGS = Path("configs/text_to_video")
ROWS = {
    "single": "single-path LoRA",
    "dual": "dual paths",
    "dual_debiased": "dual paths, debiased",
    "full": "full temporal tuning",
}
TASKS = ("orbit_one_clip", "zigzag_one_clip", "bounce_one_clip", "orbit_clips")
SEEN = ("shape", "colour", "background")
SHARED = {
    "motion correlation": "motion correlation",
    "motion deviation": "motion deviation",
    "likeness to the clips": f"similarity to the learned clips{JUDGE}",
    **{f"right {what} %": f"share of frames with the right {what}" for what in SEEN},
    "consistency": f"temporal consistency{JUDGE}",
}
LEAKED = {f"the clip's {what} %": f"share of frames with the learned clip's {what}" for what in SEEN}
COLUMNS = {task: SHARED | (LEAKED if task.endswith("one_clip") else {}) for task in TASKS}  # heading → figure
SEARCH_SEED = 99
SEED, SIDE, SHOWN = 0, 96, 6  # of the clips side by side; frames of one in the still picture
STRENGTHS = (0.0, 0.5, 1.0)
MIXED = "a red star orbiting on bricks in sks style"


def command(task: str, row: str, seed: int, folder: Path, rate: float | None = None) -> list[str]:
    """Command line of one run; a ``rate`` replaces the configuration's."""
    configs = [CONFIGS / f"{task}.yaml", CONFIGS / "rows" / f"{row}.yaml"]
    return [*_runs.command("fit", configs, seed, folder, rate), f"--model.seed={seed}", "--model.measures.base=false"]


def run(task: str, row: str, seed: int, out: Path, jobs: int) -> dict[str, Any]:
    """Facts of one run, which is made unless it is there."""
    folder = out / task / row / str(seed)
    return _figures.run(command(task, row, seed, folder), folder, jobs)


def base(task: str, seed: int, out: Path, jobs: int) -> dict[str, float]:
    """Figures of the base beside the clips of a seed: adapters that have not trained leave it as it is."""
    folder = out / task / "base" / str(seed)
    fit = command(task, next(iter(ROWS)), seed, folder)
    _runs.make([part if part != "fit" else "test" for part in fit], folder / "metrics.csv", jobs)
    return _figures.tested(folder, COLUMNS[task])


def search(task: str, rows: list[str], rates: list[float], out: Path, jobs: int) -> str:
    """Markdown: motion correlation, likeness to the clips, right shape in per cent of each row at each rate."""

    def tried(row: str, rate: float) -> str:
        folder = out / "rates" / task / row / f"{rate:g}"
        facts = _figures.run(command(task, row, SEARCH_SEED, folder, rate), folder, jobs)
        found = _figures.after(facts, COLUMNS[task])
        moved, alike, right = (found[name] for name in ("motion correlation", "likeness to the clips", "right shape %"))
        return f"{moved:.2f}, {alike:.2f}, {right:.0f} %"

    return _runs.search(task, {row: ROWS[row] for row in rows}, rates, jobs, tried)


# --- clips side by side ------------------------------------------------------------------
def rendered(folder: Path, base: bool = False) -> tuple[Tensor, list[str]]:
    """Bytes (N, F, 3, H, W) of the prompts of a run's preview with one seed, and the prompts."""
    import visadapt as va
    from visadapt.tasks.text_to_video import TextToVideo

    checkpoint = folder / "checkpoints" / "last.ckpt"
    task = TextToVideo.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()
    task.use()
    if base:
        va.strength(task.model, 0.0)
    found = task.render(task.preview.prompts, [SEED] * len(task.preview.prompts))
    return (found * 255).round().byte(), task.preview.prompts


def pages(sources: Sequence[tuple[str, Tensor]], headings: Sequence[str]) -> list[Image.Image]:
    """A row per source and a column per clip (N, F, 3, H, W) of it, one page for each frame."""
    frames = sources[0][1].shape[1]
    return [side_by_side([(title, clips[:, i]) for title, clips in sources], headings) for i in range(frames)]


def strips(sources: Sequence[tuple[str, Tensor]], prompt: int = 0) -> Image.Image:
    """Frames of one clip of each source, from left to right."""
    chosen = evaluate.spread(sources[0][1].shape[1], SHOWN)
    return side_by_side([(title, clips[prompt][chosen]) for title, clips in sources], [f"frame {i}" for i in chosen])


def learned(task: str) -> Tensor:
    """Bytes (F, 3, H, W) of the clip that the runs of the first seed have learned from, the first of several."""
    import yaml

    from visadapt.data.moving import clip

    data = yaml.safe_load((CONFIGS / f"{task}.yaml").read_text())["data"]["init_args"]
    return torch.from_numpy(clip(0, 0, kind=data["kind"])[0]).permute(0, 3, 1, 2)


def picture(task: str, rows: Sequence[str], out: Path, path: Path) -> None:
    """Clips of a task's first seed: an animation, and frames of the first prompt's clip as a still picture."""
    sources = []
    for row in rows:
        found, prompts = rendered(out / task / row / "0")
        sources.append((ROWS[row], found))
    if adapted := next((row for row in rows if row != "full"), None):
        sources.insert(0, (BASE, rendered(out / task / adapted / "0", base=True)[0]))
    sources.insert(0, ("learned clip", learned(task).expand(len(prompts), -1, -1, -1, -1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_webp(pages(sources, prompts), path.with_suffix(".webp"), fps=4)
    tiles.save(strips(sources), path)


# --- appearance and motion ---------------------------------------------------------------
def mixed(appearance: Path, motion: Path, base: str, prompt: str = MIXED, steps: int = 20) -> list[tuple[str, Tensor]]:
    """Clips of an appearance (a row for each of its strengths) and a motion (a column each) together.

    Args:
        appearance: Adapter of the text-to-image task.
        motion: Adapter of the text-to-video task.
        base: Name of the video base.
        prompt: What to render.
        steps: Of the sampler.

    Returns:
        Titles and bytes (columns, F, 3, H, W).
    """
    import visadapt as va
    from visadapt.backbones.video_diffusion import VideoDiffusion
    from visadapt.backbones.video_render import render

    model = VideoDiffusion(base).build()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*another base.*")  # that of the appearance has no motion modules
        va.load(model, appearance, name="appearance")
        va.load(model, motion, name="motion")
    found = []
    for row in STRENGTHS:
        clips = []
        for column in STRENGTHS:
            with va.strength(model.eval(), None, appearance=row, motion=column):
                clips.append(render(model, [prompt], [SEED], steps=steps, guidance=3.0))
        found.append((f"appearance {row:g}", (torch.cat(clips) * 255).round().byte()))
    return found


def main() -> None:
    """Run what is missing, write tables, single results and pictures."""
    parser = _runs.parser(__doc__, TASKS, list(ROWS), "text_to_video")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="folder of the pictures")
    parser.add_argument(
        "--mixed", type=Path, help="adapter of a text-to-image run to mix with the motion of the first task"
    )
    options = parser.parse_args()
    if options.rates:
        for task in options.tasks:
            print(search(task, options.rows, options.rates, options.runs, options.jobs))
        return
    if options.mixed:
        motion = options.runs / options.tasks[0] / "dual_debiased" / "0"
        run(options.tasks[0], "dual_debiased", 0, options.runs, options.jobs)
        rows = mixed(options.mixed, motion / "temporal.safetensors", "tiny_video")
        sheets = pages(rows, [f"motion {strength:g}" for strength in STRENGTHS])
        save_webp(sheets, options.images / "appearance_and_motion.webp", fps=4)
        tiles.save(sheets[len(sheets) // 2], options.images / "appearance_and_motion.png")
        return
    wanted = [(task, row, seed) for task in options.tasks for row in options.rows for seed in range(options.seeds)]
    results = _runs.each(run, options.jobs, [(*job, options.runs, options.jobs) for job in wanted])
    found = _figures.grouped(wanted, results)
    _figures.write_csv(options.out.with_suffix(".csv"), wanted, results)
    seeds = [(task, seed, options.runs, options.jobs) for task in options.tasks for seed in range(options.seeds)]
    bases = dict(zip(seeds, _runs.each(base, options.jobs, seeds), strict=True))
    text = "\n\n".join(
        _figures.table(found[task], task, COLUMNS[task], ROWS, [one for job, one in bases.items() if job[0] == task])
        for task in options.tasks
    )
    _runs.write_page(options.out.with_suffix(".md"), "A motion from one clip, and from eight", text)
    for task in options.tasks:
        picture(task, options.rows, options.runs, options.images / f"text_to_video_{task}.png")
    print(text)


if __name__ == "__main__":
    main()
