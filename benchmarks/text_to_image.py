"""Compare methods on a subject and a style of 20 pictures: configs/text_to_image/, several seeds, tables and pictures.

    python -m benchmarks.text_to_image --jobs 2                          # what docs/results/text_to_image holds
    python -m benchmarks.text_to_image --jobs 2 --rates 0.001,0.003,0.01 # figures per learning rate, on other pictures

Every row is a run of ``visadapt fit`` with a configuration of its own on top of the task's, so that anyone can repeat
a single one; the seed draws the 20 pictures, the start, times and noise. Runs that are there are not made again.
The figures are those of the run's report (docs/text_to_image.md): renders of prompts and seeds that are the same for
all rows, judged by the shipped judge, compared with 48 held-out pictures. The row "base" is what each run measured
before its first step. Rates are compared on the pictures of a seed that the table does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from benchmarks import _figures, _runs
from benchmarks._figures import BASE, JUDGE
from visadapt.report import tiles

CONFIGS = Path("configs/text_to_image")
ROWS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "wara": "WaRA",
    "flora_convs": "FLoRA on convolutions",
    "loha": "LoHa",
    "full": "full fine-tuning",
}
SHARED = {
    "other prompts followed %": "share of other prompts followed",
    "similarity": f"similarity to the pictures{JUDGE}",
    "similarity, not asked": f"similarity to the pictures, not asked for{JUDGE}",
    "drift, not asked": f"drift from the base, not asked for{JUDGE}",
    "diversity": f"diversity{JUDGE}",
    "KID": f"KID{JUDGE}",
}
COLUMNS = {  # heading of a column → figure of the report
    task: {
        "shown when asked %": f"share with the {task}, asked for",
        "shown when not asked %": f"share with the {task}, not asked for",
        f"right {named} %": f"share with the right {named}",
        f"right {named}, new prompts %": f"share with the right {named}, prompts that no training picture has",
        **SHARED,
    }
    for task, named in {"subject": "background", "style": "shape"}.items()
}
SEARCH_SEED = 99
SEED, SIDE = 0, 96  # of the pictures side by side


def command(task: str, row: str, seed: int, folder: Path, rate: float | None = None) -> list[str]:
    """Command line of one run; a ``rate`` replaces the configuration's."""
    configs = [CONFIGS / f"{task}.yaml", CONFIGS / "rows" / f"{row}.yaml"]
    return [*_runs.command("fit", configs, seed, folder, rate), f"--model.seed={seed}"]


def run(task: str, row: str, seed: int, out: Path, jobs: int) -> dict[str, Any]:
    """Facts of one run, which is made unless it is there."""
    folder = out / task / row / str(seed)
    return _figures.run(command(task, row, seed, folder), folder, jobs)


def search(task: str, rows: list[str], rates: list[float], out: Path, jobs: int) -> str:
    """Markdown: shown when asked / when not asked (in per cent), similarity of each row at each learning rate."""

    def tried(row: str, rate: float) -> str:
        folder = out / "rates" / task / row / f"{rate:g}"
        facts = _figures.run(command(task, row, SEARCH_SEED, folder, rate), folder, jobs)
        found = _figures.after(facts, COLUMNS[task])
        asked, leaked, alike = (found[name] for name in (*list(COLUMNS[task])[:2], "similarity"))
        return f"{asked:.0f} / {leaked:.0f}, {alike:.3f}"

    return _runs.search(task, {row: ROWS[row] for row in rows}, rates, jobs, tried)


def table(found: _figures.Found, task: str) -> str:
    """Markdown: a row per method, a column per figure, then what it costs.

    Args:
        found: Row → facts of its runs.
        task: "subject" or "style".
    """
    text = _figures.table(found, task, COLUMNS[task], ROWS)
    ceiling = next(iter(found.values()))[0]["figures"].get(f"similarity among the pictures{JUDGE}")
    return text + ("" if ceiling is None else f"\n\nSimilarity among the real pictures: {ceiling:.3f}.")


# --- pictures side by side ---------------------------------------------------------------
def rendered(folder: Path, base: bool = False) -> tuple[torch.Tensor, list[str]]:
    """Bytes (N, 3, H, W) of the prompts of a run's preview with one seed, and the prompts."""
    import visadapt as va
    from visadapt.tasks.text_to_image import TextToImage

    checkpoint = folder / "checkpoints" / "last.ckpt"
    task = TextToImage.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()
    prompts = task.preview.prompts
    with va.strength(task.model, 0.0) if base else nullcontext():
        found = task.render(prompts, [SEED] * len(prompts))
    return (found * 255).round().byte(), prompts


def side_by_side(sources: Sequence[tuple[str, torch.Tensor]], prompts: Sequence[str]) -> Image.Image:
    """A row per method and a column per prompt, headed by both."""
    left, top, cell = 170, 58, SIDE + 8
    page = Image.new("RGB", (left + len(prompts) * cell, top + len(sources) * cell), "white")
    draw = ImageDraw.Draw(page)
    for column, prompt in enumerate(prompts):
        for line, text in enumerate(wrapped(prompt, cell - 6)):
            draw.text((left + column * cell + SIDE / 2, 4 + 13 * line), text, tiles.INK, tiles.font(10), anchor="ma")
    for row, (title, pictures) in enumerate(sources):
        y = top + row * cell
        draw.text((left - 10, y + SIDE / 2), title, tiles.INK, tiles.font(13), anchor="rm")
        for column, picture in enumerate(pictures):
            pixels = picture.permute(1, 2, 0).contiguous().numpy()
            page.paste(tiles.scaled(pixels, SIDE), (left + column * cell, y))
    return page


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most so many pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if tiles.font(10).getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def picture(tasks: Sequence[str], rows: Sequence[str], out: Path) -> Image.Image:
    """The pictures of every task under each other: the base first, then each row, of the first seed's runs."""
    pages = []
    for task in tasks:
        adapted = next((row for row in rows if row != "full"), None)
        folders = [out / task / row / "0" for row in rows]
        sources = [(ROWS[row], *rendered(folder)) for row, folder in zip(rows, folders, strict=True)]
        if adapted is not None:
            sources.insert(0, (BASE, *rendered(out / task / adapted / "0", base=True)))
        pages.append(side_by_side([source[:2] for source in sources], sources[0][2]))
    sheet = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), "white")
    for number, page in enumerate(pages):
        sheet.paste(page, (0, sum(above.height for above in pages[:number])))
    return sheet


def main() -> None:
    """Run what is missing, write tables, single results and pictures."""
    parser = _runs.parser(__doc__, list(COLUMNS), list(ROWS), "text_to_image")
    parser.add_argument("--image", type=Path, default=Path("docs/images/text_to_image.png"))
    options = parser.parse_args()
    if options.rates:
        for task in options.tasks:
            print(search(task, options.rows, options.rates, options.runs, options.jobs))
        return
    wanted = [(task, row, seed) for task in options.tasks for row in options.rows for seed in range(options.seeds)]
    results = _runs.each(run, options.jobs, [(*job, options.runs, options.jobs) for job in wanted])
    found = _figures.grouped(wanted, results)
    _figures.write_csv(options.out.with_suffix(".csv"), wanted, results)
    text = "\n\n".join(table(found[task], task) for task in options.tasks)
    _runs.write_page(options.out.with_suffix(".md"), "A subject and a style from 20 pictures", text)
    options.image.parent.mkdir(parents=True, exist_ok=True)
    tiles.save(picture(options.tasks, options.rows, options.runs), options.image)
    print(text)


if __name__ == "__main__":
    main()
