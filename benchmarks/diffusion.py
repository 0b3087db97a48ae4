"""Memory and time of a training step on Stable Diffusion's UNet, against diffusers with PEFT.

    python -m benchmarks.diffusion --out docs/results/diffusion
    python -m benchmarks.diffusion --size full --device cuda --dtype bf16 --clock wall --out docs/results/diffusion_gpu

The UNet, VAE and text encoder have SD 1.5's shape and random weights, which cost the same. A step is noise, forward,
loss, backward, clipping of gradients and AdamW, on both sides, with adapters of rank 8; data loading and the loops of
Lightning and accelerate are left out. Before anything is timed, each pair must agree in float64.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import _counts, _measure
from benchmarks._report import _csv, _number, _spread, _table, write

SIZES = ("full", "half", "tiny")
COLUMNS = ["setting", "by", "trained", "step", "step_iqr", "vs_peer", "vs_peer_iqr", "saved_mib", "saved_vs_peer"]
COLUMNS += ["kept_mib", "held_mib", "peak_mib", "peak_vs_peer", "error", "note"]
PEER = "diffusers + PEFT"
LEGEND = """\
A is the frozen UNet, the gradient crossing all of it (no optimiser). `step / A` and `step / peer` are medians of ratios
taken in the same rounds, ± half the interquartile range. `saved` is every storage that autograd took in during forward,
`kept` what it still held when forward returned, `held` all that was alive then (also what checkpointing hides from
autograd), `peak` the live bytes of the step above its state. `error` is the largest relative difference of
prediction and gradients from the peer's, in float64 at equal weights on a small UNet.
"""


@dataclass(frozen=True)
class Row:
    """A case: a setting, by whom, and the options that differ from the defaults."""

    setting: str
    by: str
    options: dict[str, Any]


ROWS = {
    "attention-peft": Row("LoRA attention", PEER, {}),
    "attention-peft-ckpt": Row("LoRA attention", f"{PEER}, checkpointing", {"checkpointing": True}),
    "attention": Row("LoRA attention", "visadapt", {}),
    "attention-plain": Row("LoRA attention", "visadapt, lean off", {"lean": False}),
    "everywhere-peft": Row("LoRA everywhere", PEER, {}),
    "everywhere": Row("LoRA everywhere", "visadapt", {}),
    "dora-peft": Row("DoRA everywhere", PEER, {}),
    "dora": Row("DoRA everywhere", "visadapt", {}),
    "dora-plain": Row("DoRA everywhere", "visadapt, lean off", {"lean": False}),
}
ENCODING = {
    "everything encoded": (),
    "text from the cache": ("text",),
    "latents and text from the cache": ("latents", "text"),
}
# (setting, column, must): of our default in units of the peer's
BARS = (
    ("LoRA attention", "vs_peer", 0.98),
    ("LoRA attention", "saved_vs_peer", 0.70),
    ("DoRA everywhere", "vs_peer", 0.85),
    ("DoRA everywhere", "saved_vs_peer", 0.45),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.diffusion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--size", choices=SIZES, default=None, help="half on a CPU and full on a GPU, by default")
    found.add_argument("--rows", type=lambda t: t.split(","), default=list(ROWS), help=f"of {','.join(ROWS)}")
    found.add_argument("--no-encoding", action="store_true", help="leave out the gain of cached latents and text")
    found.add_argument("--rounds", type=int, default=4, help="0 leaves the times out")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="cpu: needs one thread to mean a time")
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the frozen networks")
    found.add_argument("--out", type=Path, default=None, help="folder for diffusion.csv and diffusion.md")
    return found


def build(bench: Any, row: Row) -> Any:
    """The step of a row."""
    if row.by.startswith(PEER):
        return bench.peer(row.setting, row.by, **row.options)
    return bench.ours(row.setting, row.by, **row.options)


def count(step: Any, device: str) -> dict[str, Any]:
    """What does not depend on the machine's load, after a first step that makes lazy state."""
    step.train()
    saved = _counts.saved_bytes(step.forward, step.case.model)
    used = _counts.memory(step.forward, step.backward, device)
    return {
        "trained": sum(p.numel() for p in step.case.trained),
        "saved_mib": saved.seen / _counts.MIB,
        "kept_mib": saved.kept / _counts.MIB,
        "held_mib": used.held / _counts.MIB,
        "peak_mib": used.peak / _counts.MIB,
    }


def errors(rows: dict[str, Row], device: str) -> dict[str, float]:
    """Largest relative difference between ours and the peer of the same setting, in float64.

    Raises:
        ValueError: The two do not compute the same.
    """
    import torch

    from benchmarks import _equal
    from benchmarks._diffusion import Bench
    from benchmarks._hosts import Host

    found: dict[str, float] = {}
    bench = Bench("tiny", device, "fp64")
    host = Host("unet", "unet", tuple(bench.latents.shape), lambda _: torch.nn.Identity(), source="unet.conv_in.bias")
    for name, row in rows.items():
        if row.by.startswith(PEER):
            continue
        mine, peer = build(bench, row).case, bench.peer(row.setting).case
        for case in (mine, peer):
            host.open(case.model)
        found[name] = _equal.relative_error(mine, peer, host, bench.latents)
        if not found[name] <= _equal.TOLERANCE:
            raise ValueError(f"{row.setting}: {row.by} differs from {PEER} by {found[name]:.0e} in float64")
    return found


def compare(rows: list[dict[str, Any]]) -> None:
    """Add each row's bytes in units of the peer of its setting."""
    for row in rows:
        peer = next((r for r in rows if r["setting"] == row["setting"] and r["by"] == PEER), None)
        for key in ("saved", "peak"):
            if peer and row.get(f"{key}_mib") is not None:
                row[f"{key}_vs_peer"] = row[f"{key}_mib"] / peer[f"{key}_mib"]


def clocked(bench: Any, steps: dict[str, Any], rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Fill in times; returns whether the run was quiet."""
    now = _measure.clock(options.clock, options.device)
    frozen, control = bench.frozen(), bench.frozen("A/A")
    blocks: list[dict[str, Any]] = [{"A/A": control.train}]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        blocks.append({row["row"]: steps[row["row"]].train for row in rows if row["setting"] == setting})
    times = _measure.interleave(frozen.train, blocks, options.rounds, now)
    for row in rows:
        ratio = times.against_reference(row["row"])
        row["step"], row["step_iqr"] = ratio.median, ratio.iqr
        peer = next((r["row"] for r in rows if r["setting"] == row["setting"] and r["by"] == PEER), None)
        if peer and peer != row["row"]:
            ratio = times.against(row["row"], peer)
            row["vs_peer"], row["vs_peer_iqr"] = ratio.median, ratio.iqr
    seconds = _measure.Ratio.of(times.reference).median
    others = [times.against_reference(row["row"]) for row in rows]
    return f"{_measure.verdict(times.against_reference('A/A'), others)}; one step of A {seconds:.2f} s"


def encoding(bench: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps of LoRA on the attentions with less and less encoded, in units of the one that encodes everything."""
    steps = {name: bench.ours("LoRA attention", name, kept) for name, kept in ENCODING.items()}
    first, *others = steps
    now = _measure.clock(options.clock, options.device)
    block = {name: steps[name].train for name in others}
    times = _measure.interleave(steps[first].train, [block], max(1, options.rounds // 2), now)
    found = [{"setting": "LoRA attention", "by": f"visadapt, {first}", "step": 1.0}]
    for name in others:
        ratio = times.against_reference(name)
        found.append(
            {"setting": "LoRA attention", "by": f"visadapt, {name}", "step": ratio.median, "step_iqr": ratio.iqr}
        )
    return found


def bars(rows: list[dict[str, Any]], note: str = "quiet") -> list[str]:
    """The bars that were measured, each in a sentence."""
    words = {"vs_peer": "step time", "saved_vs_peer": "saved bytes"}
    found = []
    for setting, column, must in BARS:
        value = next((r.get(column) for r in rows if r["setting"] == setting and r["by"] == "visadapt"), None)
        if value is not None:
            verdict = "met" if value <= must else "missed"
            verdict += ", noisy run" if column == "vs_peer" and not note.startswith("quiet") else ""
            found.append(
                f"{setting}, {words[column]} of the peer's: at most {must:g}, measured {value:.3f}: {verdict}."
            )
    return found


def markdown(facts: dict[str, str], rows: list[dict[str, Any]], cached: list[dict[str, Any]]) -> str:
    """The whole report."""
    header = ["adapter", "by", "trained", "step / A", "step / peer", "saved MiB", "/ peer", "kept MiB", "held MiB"]
    header += ["peak MiB", "/ peer", "error"]
    lines = [
        [
            row["setting"],
            row["by"],
            f"{row['trained']:,}",
            _spread(row.get("step"), row.get("step_iqr")),
            _spread(row.get("vs_peer"), row.get("vs_peer_iqr")),
            _number(row["saved_mib"], 1),
            _number(row.get("saved_vs_peer")),
            _number(row["kept_mib"], 1),
            _number(row["held_mib"], 1),
            _number(row["peak_mib"], 1),
            _number(row.get("peak_vs_peer")),
            f"{row['error']:.0e}" if row.get("error") is not None else "",
        ]
        for row in rows
    ]
    parts = ["# A training step on Stable Diffusion's UNet\n", _table(["", ""], [[k, v] for k, v in facts.items()])]
    parts += [LEGEND, _table(header, lines), *(f"- {text}" for text in bars(rows, facts.get("times", "")))]
    if cached:
        gain = [[row["by"], _spread(row["step"], row.get("step_iqr")), f"{1 / row['step']:.2f}"] for row in cached]
        parts += ["\n## Cached latents and text\n", _table(["LoRA attention by", "step", "times as fast"], gain)]
    return "\n".join(parts) + "\n"


def _facts(options: argparse.Namespace) -> dict[str, str]:
    import diffusers
    import peft
    import torch

    from benchmarks._diffusion import BATCH, RANK, SIZES
    from benchmarks.adapters import _git, _processor

    size = SIZES[options.size]
    words = [w for i, w in enumerate(sys.argv[1:]) if "--out" not in (w, sys.argv[i])]
    gpu = f", {torch.cuda.get_device_name()}" if options.device == "cuda" else ""
    return {
        "command": "python -m benchmarks.diffusion " + shlex.join(words),
        "commit": _git("rev-parse", "HEAD") + (" with local changes" if _git("status", "--porcelain") else ""),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{_processor()}, {os.cpu_count()} cores{gpu}",
        "networks": f"SD 1.5's shape with random weights, {options.dtype}; widths of the UNet {size.unet}, "
        f"of the VAE {size.vae}, of the text encoder {size.text} in {size.layers} layers",
        "batch": f"{BATCH} latents of {size.side} x {size.side} (images of {8 * size.side} pixels), rank {RANK}",
        "clock": f"{options.clock} time, {options.threads} thread(s), {options.rounds} rounds",
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}",
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and store."""
    options = parser().parse_args(arguments)
    if unknown := [name for name in options.rows if name not in ROWS]:
        sys.exit(f"--rows {','.join(unknown)}: there are {', '.join(ROWS)}")
    options.size = options.size or ("full" if options.device == "cuda" else "half")
    import torch

    from benchmarks._diffusion import Bench

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here; use --device cpu")
    torch.set_num_threads(options.threads)
    chosen = {name: ROWS[name] for name in options.rows}
    facts, found = _facts(options), errors(chosen, options.device)
    bench = Bench(options.size, options.device, options.dtype)
    rows, steps = [], {}
    for name, row in chosen.items():
        steps[name] = build(bench, row)
        rows.append({"row": name, "setting": row.setting, "by": row.by} | count(steps[name], options.device))
        rows[-1]["error"] = found.get(name)
    compare(rows)
    cached: list[dict[str, Any]] = []
    if options.rounds:
        facts["times"] = clocked(bench, steps, rows, options)
        steps.clear()
        cached = [] if options.no_encoding else encoding(bench, options)
    text = markdown(facts, rows, cached)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write(options.out / "diffusion.csv", _csv([{k: r.get(k) for k in COLUMNS} for r in rows + cached], COLUMNS))
        write(options.out / "diffusion.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
