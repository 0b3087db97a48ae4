"""Measure every adapter method against the frozen model, HF PEFT, LyCORIS and the published formulas.

    python -m benchmarks.adapters --suite linear,conv --methods LoRA,DoRA --out DIR
    python -m benchmarks.adapters table DIR
    python -m benchmarks.adapters profile --suite linear768 --methods DoRA --sources visadapt,peft

Train step, inference, FLOPs, operators, bytes touched, bytes saved for backward, peak memory, trained
parameters, and the float64 difference from each peer at equal weights. Each group of cases (a host, a
precision; for the ViT also a method) runs in a process of its own, see `benchmarks._measure` for how times are
taken. Results are written after every group, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("linear", "conv", "vit", "optimizer")
PEERS = ("peft", "lycoris", "literal")
CHATTER = ("USDT:", "ERROR:2", "[W")  # torch's profiler greets on every start, and misses a GPU it need not have


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("command", nargs="?", default="run", choices=["run", "table", "profile"])
    found.add_argument("folder", nargs="?", type=Path, help="table: where a run stored its CSV files")
    found.add_argument(
        "--suite", type=_list, default=["linear", "conv"], help=f"of {','.join(SUITES)}, or names of hosts"
    )
    found.add_argument("--methods", type=_list, default=None, help="of the catalogue; by default those with peers")
    found.add_argument("--peers", type=_list, default=list(PEERS), help=f"of {','.join(PEERS)}")
    found.add_argument("--sources", type=_list, default=None, help="profile: whose cases; all by default")
    found.add_argument("--compile", choices=["no", "both"], default="no", help="both: torch.compile'd rows as well")
    found.add_argument("--dtype", type=_list, default=["fp32"], help="of fp32,bf16")
    found.add_argument("--rounds", type=int, default=15, help="0 leaves the times out")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--depth", type=int, default=12, help="blocks of the ViT; fewer for a quick look")
    found.add_argument("--out", type=Path, default=None, help="folder for the CSV files and adapters.md")
    found.add_argument("--strict", action="store_true", help="fail on a missed bar or a noisy group")
    found.add_argument("--group", type=Path, default=None, help=argparse.SUPPRESS)  # the process of one group
    return found


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be run, before anything is.

    Raises:
        ValueError: an unknown suite, method, peer or precision; no GPU.
    """
    from benchmarks._cases import METHODS
    from benchmarks._hosts import hosts

    names = {
        "--suite": (options.suite, (*SUITES, *hosts(options.depth))),
        "--methods": (options.methods or (), METHODS),
        "--peers": (options.peers, PEERS),
        "--dtype": (options.dtype, ("fp32", "bf16")),
    }
    for flag, (given, known) in names.items():
        wrong = [name for name in given if name not in known]
        if wrong:
            raise ValueError(f"{flag} {','.join(wrong)}: choose from {', '.join(known)}")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")


def plan(options: argparse.Namespace) -> list[dict[str, object]]:
    """The groups, each for one process."""
    from benchmarks._cases import COMPARED
    from benchmarks._hosts import hosts

    groups: list[dict[str, object]] = []
    methods = options.methods or list(COMPARED)
    for host in hosts(options.depth).values():
        if host.suite not in options.suite and host.name not in options.suite:
            continue
        for dtype in options.dtype:
            # a ViT's cases are large and slow: one method at a time
            for chosen in [[m] for m in methods] if host.suite == "vit" else [methods]:
                groups.append({
                    "host": host.name, "dtype": dtype, "methods": chosen, "peers": options.peers,
                    "compiled": options.compile == "both", "rounds": options.rounds, "clock": options.clock,
                    "device": options.device, "threads": options.threads, "depth": options.depth,
                })  # fmt: skip
    if "optimizer" in options.suite:
        groups.append({"optimizer": True, "rounds": options.rounds, "clock": options.clock,
                       "device": options.device, "threads": options.threads})  # fmt: skip
    return groups


def run_group(spec: dict[str, object], threads: int) -> dict[str, list[dict[str, object]]]:
    """Measure one group in a fresh process.

    Raises:
        RuntimeError: the process failed; its own output says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "group.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        counts = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
        environment = {**os.environ, **counts}
        command = [sys.executable, "-m", "benchmarks.adapters", "--group", str(file)]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if not line.startswith(CHATTER) and line.strip():
                    sys.stderr.write(line)
        if process.returncode:
            raise RuntimeError(f"the group {spec} ended with status {process.returncode}")
        return json.loads(file.read_text(encoding="utf-8"))


def serve_group(file: Path) -> None:
    """Measure the group that a file describes and write the result over it."""
    spec = json.loads(file.read_text(encoding="utf-8"))
    if spec.pop("optimizer", False):
        from benchmarks import _optimizer

        result = _optimizer.measure(**spec)
    else:
        from benchmarks import _group

        spec["methods"], spec["peers"] = tuple(spec["methods"]), tuple(spec["peers"])
        result = _group.measure(_group.Group(**spec))
    file.write_text(json.dumps(asdict(result)), encoding="utf-8")


def facts(options: argparse.Namespace) -> dict[str, str]:
    """What a reader needs to judge or repeat the figures: command, commit, versions, processor."""
    import torch

    found = {"command": "python -m benchmarks.adapters " + shlex.join(_without_out(sys.argv[1:]))}
    found["commit"] = _git("rev-parse", "HEAD") + (" with local changes" if _git("status", "--porcelain") else "")
    found["date"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    found["machine"] = f"{_processor()}, {os.cpu_count()} cores"
    if options.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    found["clock"] = f"{options.clock} time, {options.threads} thread(s), {options.rounds} rounds"
    from importlib.metadata import PackageNotFoundError, version

    for package in ("torch", "timm", "peft", "lycoris-lora"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _without_out(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:  # a path of this machine is of no use to anybody else
        if not skip and not argument.startswith("--out"):
            kept.append(argument)
        skip = argument == "--out"
    return kept


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or ("" if done.returncode == 0 else "unknown")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def run(options: argparse.Namespace) -> int:
    """Measure everything that was asked for; 1 where a group or one of our cases failed."""
    from benchmarks import _report
    from benchmarks._bars import judge
    from benchmarks._rows import Pair, Result, Row

    check(options)
    result, failed, about = Result(), False, facts(options)
    groups = plan(options)
    for number, spec in enumerate(groups, 1):
        label = " ".join([str(spec.get("host", "optimizer")), str(spec.get("dtype", "")), *spec.get("methods", [])])
        print(f"[{number}/{len(groups)}] {label}", file=sys.stderr, flush=True)
        try:
            found = run_group(spec, options.threads)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        result.rows += [Row(**row) for row in found["rows"]]
        result.pairs += [Pair(**pair) for pair in found["pairs"]]
        if options.out:
            _report.store(options.out, about, result)
    print(_report.markdown(about, result))
    failed |= any(row.source == "visadapt" and row.note.startswith("failed") for row in result.rows)
    if options.strict:
        failed |= any(judged.verdict.startswith("missed") for judged in judge(result.rows, result.pairs))
        failed |= any(row.quiet is False for row in result.rows)
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        if options.group:
            serve_group(options.group)
            return 0
        if options.command == "table":
            from benchmarks import _report

            if options.folder is None:
                raise ValueError("table needs the folder of a stored run: python -m benchmarks.adapters table DIR")
            print(_report.markdown(*_report.load(options.folder)))
            return 0
        if options.command == "profile":
            from benchmarks import _profile

            check(options)
            _profile.run(options)
            return 0
        return run(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
