"""The lines of the tables, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Row:
    """One line of the table; times, FLOPs and traffic in units of the frozen model A."""

    suite: str
    host: str
    dtype: str
    method: str
    source: str
    variant: str = ""
    trained: int | None = None
    step: float | None = None
    step_iqr: float | None = None
    step_ms: float | None = None
    infer: float | None = None
    infer_iqr: float | None = None
    flops: float | None = None
    operators: int | None = None
    traffic: float | None = None
    saved_mib: float | None = None
    kept_mib: float | None = None
    held_mib: float | None = None
    peak_mib: float | None = None
    state_mib: float | None = None
    quiet: bool | None = None
    note: str = ""


@dataclass
class Pair:
    """Ours against one peer; times, saved and peak bytes are ours / peer."""

    suite: str
    host: str
    dtype: str
    method: str
    ours: str
    peer: str
    peer_variant: str
    step: float | None = None
    step_iqr: float | None = None
    infer: float | None = None
    infer_iqr: float | None = None
    saved: float | None = None
    kept: float | None = None
    peak: float | None = None
    error: float | None = None
    quiet: bool | None = None


@dataclass
class Result:
    """What a group's process hands to the one that started it."""

    rows: list[Row] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
