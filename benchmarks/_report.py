"""Stored figures as CSV, and CSV as Markdown."""

from __future__ import annotations

import csv
import types
import typing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks import _bars
from benchmarks._rows import Pair, Result, Row
from visadapt.core.files import replacing

FILES: dict[str, type[Any]] = {"rows": Row, "pairs": Pair}


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def _csv(lines: list[dict[str, Any]], header: list[str]) -> str:
    import io

    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, header, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: (f"{v:.6g}" if isinstance(v, float) else v) for k, v in line.items()})
    return buffer.getvalue()


def store(out: Path, facts: dict[str, str], result: Result) -> None:
    """Write ``run.csv``, ``rows.csv``, ``pairs.csv`` and the Markdown of all three into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write(out / "run.csv", _csv([{"fact": k, "value": v} for k, v in facts.items()], ["fact", "value"]))
    for name, kind in FILES.items():
        lines = [asdict(line) for line in getattr(result, name)]
        write(out / f"{name}.csv", _csv(lines, [f.name for f in fields(kind)]))
    write(out / "adapters.md", markdown(facts, result))


def load(out: Path) -> tuple[dict[str, str], Result]:
    """Read what `store` wrote.

    Raises:
        FileNotFoundError: the folder holds no stored benchmark.
    """
    for name in ("run", *FILES):
        if not (out / f"{name}.csv").is_file():
            raise FileNotFoundError(
                f"{out / f'{name}.csv'} is missing: run `python -m benchmarks.adapters --out {out}`"
            )
    with (out / "run.csv").open(newline="", encoding="utf-8") as file:
        facts = {line["fact"]: line["value"] for line in csv.DictReader(file)}
    result = Result()
    for name, kind in FILES.items():
        hints = typing.get_type_hints(kind)
        with (out / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                getattr(result, name).append(kind(**{k: _parse(v, hints[k]) for k, v in line.items()}))
    return facts, result


def _parse(text: str, hint: Any) -> Any:
    if hint is str:
        return text
    if text == "":
        return None
    kind = next(k for k in typing.get_args(hint) if k is not types.NoneType)
    return text == "True" if kind is bool else kind(text)


def _table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table without the columns that are empty throughout."""
    kept = [k for k in range(len(header)) if not lines or any(line[k] for line in lines)]
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells[k] for k in kept) + " |" for cells in (header, rule, *lines)) + "\n"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _spread(value: float | None, iqr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" + (f" ±{50 * iqr:.1f} %" if iqr is not None else "")


def _name(source: str, variant: str) -> str:
    return source + (f", {variant}" if variant else "")


def _rows_table(rows: list[Row]) -> str:
    header = [
        "method",
        "by",
        "trained",
        "step / A",
        "inference / A",
        "FLOPs / A",
        "operators",
        "bytes touched / A",
    ]
    header += ["saved MiB", "kept MiB", "peak MiB", "state MiB", "note"]
    lines = []
    for r in rows:
        cells = [r.method, _name(r.source, r.variant), "" if r.trained is None else f"{r.trained:,}"]
        cells += [_spread(r.step, r.step_iqr), _spread(r.infer, r.infer_iqr), _number(r.flops, 3)]
        cells += ["" if r.operators is None else str(r.operators), _number(r.traffic)]
        cells += [_number(value) for value in (r.saved_mib, r.kept_mib, r.peak_mib, r.state_mib)]
        lines.append([*cells, " ".join(r.note.replace("|", "/").split())])
    return _table(header, lines)


def _pairs_table(pairs: list[Pair]) -> str:
    header = ["method", "ours", "peer", "step", "inference", "saved", "kept", "peak", "largest error (fp64)"]
    lines = [
        [p.method, p.ours or "default", _name(p.peer, p.peer_variant), _spread(p.step, p.step_iqr),
         _spread(p.infer, p.infer_iqr), _number(p.saved), _number(p.kept), _number(p.peak),
         "" if p.error is None else f"{p.error:.0e}"]
        for p in pairs
    ]  # fmt: skip
    return _table(header, lines)


def _bars_table(result: Result) -> str:
    judged = _bars.judge(result.rows, result.pairs)
    lines = [
        [
            j.bar.text,
            f"{j.bar.host}, {j.bar.dtype}",
            f"≤ {j.bar.must:g}",
            _number(j.value, 3),
            j.verdict,
            "; ".join(text for text in (j.bar.remark, j.bar.missed if j.verdict.startswith("missed") else "") if text),
        ]
        for j in judged
        if j.value is not None
    ]
    missing = sum(j.value is None for j in judged)
    tail = f"\n{missing} of {len(judged)} bars were not measured in this run.\n" if missing else ""
    return _table(["bar", "on", "must", "measured", "", "remark"], lines) + tail


LEGEND = """\
A is the frozen model, the gradient crossing all of it. `step` is forward, backward and AdamW; times are the
median over rounds of the case's time over that of A just before and after it, ± half the interquartile range.
`saved` is every storage that autograd took in during forward (the definition behind the bars), `kept` what it
still held when forward returned, `peak` the live bytes of forward and backward above the state, `state` the
parameters and buffers beside the frozen ones. FFTs count as no FLOPs. `literal` is the published formula
computed as written.
"""


def markdown(facts: dict[str, str], result: Result) -> str:
    """The whole report."""
    parts = [
        "# Adapter benchmark\n",
        _table(["", ""], [[k, v.replace("|", "/")] for k, v in facts.items()]),
        LEGEND,
    ]
    parts += ["## Bars\n", _bars_table(result)]
    for host, dtype in dict.fromkeys((r.host, r.dtype) for r in result.rows):
        rows = [r for r in result.rows if (r.host, r.dtype) == (host, dtype)]
        pairs = [p for p in result.pairs if (p.host, p.dtype) == (host, dtype)]
        step = next((r.step_ms for r in rows if r.step_ms), None)
        title = f"## {host}, {dtype}" + (f" (one step of A: {step:.1f} ms)" if step else "")
        parts += [title + "\n", _rows_table(rows)]
        if pairs:
            parts += ["Ours in units of the peer, from the same rounds:\n", _pairs_table(pairs)]
    return "\n".join(parts)
