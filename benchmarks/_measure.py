"""Time ratios that survive a busy machine: interleaved samples, medians of ratios, an A/A control.

A time on a shared machine says little; the ratio of two samples taken one after the other says much. Every
case is timed between two samples of the frozen reference, the cases come in a new order each round, garbage
collection is off, and what is reported is the median over rounds of ``case / mean(reference before, after)``.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

AA_GATE = 0.015  # a control that leaves 1 ± this says the machine was not quiet enough
IQR_GATE = 0.03  # so does a case whose middle half spreads wider than this


def clock(kind: str, device: str) -> Callable[[], float]:
    """Return a function that gives seconds.

    Args:
        kind: ``cpu`` is the processor time of this process (with one thread it ignores what other processes
            do); ``wall`` is elapsed time.
        device: on ``cuda`` the queue is drained before each reading, and only ``wall`` makes sense.
    """
    if device == "cuda":

        def drained() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return drained
    if kind not in ("cpu", "wall"):
        raise ValueError(f"--clock {kind}: choose cpu or wall")
    return time.process_time if kind == "cpu" else time.perf_counter


@contextmanager
def no_gc() -> Iterator[None]:
    """Keep the collector from landing inside somebody's sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Ratio:
    """Median of per-round ratios and the width of their middle half, relative to the median."""

    median: float
    iqr: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """Summarise one ratio per round."""
        median = statistics.median(values)
        if len(values) < 2:
            return cls(median, float("nan"))
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, (high - low) / median)


@dataclass
class Times:
    """Samples of one interleaved run.

    Attributes:
        ratios: case to its ratio against the reference, one per round.
        reference: seconds of every reference sample.
    """

    ratios: dict[str, list[float]]
    reference: list[float]

    def against_reference(self, case: str) -> Ratio:
        """Time of ``case`` in units of the frozen reference."""
        return Ratio.of(self.ratios[case])

    def against(self, case: str, other: str) -> Ratio:
        """Time of ``case`` in units of ``other``, paired round by round."""
        return Ratio.of([a / b for a, b in zip(self.ratios[case], self.ratios[other], strict=True)])


def repeats_for(run: Callable[[], None], now: Callable[[], float], least: float = 0.02) -> int:
    """How often to call ``run`` in one sample, so that a sample lasts at least ``least`` seconds."""
    run()
    start = now()
    run()
    return max(1, round(least / max(now() - start, 1e-6)))


def interleave(
    reference: Callable[[], None],
    blocks: Sequence[dict[str, Callable[[], None]]],
    rounds: int,
    now: Callable[[], float],
    seed: int = 0,
) -> Times:
    """Time every case of every block between two samples of ``reference``.

    Args:
        reference: one call of the frozen model.
        blocks: cases that are compared with each other, so run next to each other: ours and its peers.
        rounds: how often everything is run; the order is drawn anew in each.
        now: the clock.
        seed: of the order.
    """
    count = repeats_for(reference, now)

    def sample(run: Callable[[], None]) -> float:
        start = now()
        for _ in range(count):
            run()
        return (now() - start) / count

    order = random.Random(seed)
    times = Times({name: [] for block in blocks for name in block}, [])
    for block in blocks:  # lazy state (optimiser moments, autotuning, compilation) belongs to no sample
        for run in block.values():
            run()
            run()
    with no_gc():
        for _ in range(rounds):
            before = sample(reference)
            times.reference.append(before)
            for block in order.sample(list(blocks), len(blocks)):
                for name in order.sample(list(block), len(block)):
                    seconds = sample(block[name])
                    after = sample(reference)
                    times.ratios[name].append(seconds / ((before + after) / 2))
                    times.reference.append(after)
                    before = after
    return times


def verdict(control: Ratio, others: Sequence[Ratio]) -> str:
    """Say ``quiet``, or why the times of this run are not to be trusted."""
    reasons = []
    if abs(control.median - 1) > AA_GATE:
        reasons.append(f"A/A {control.median:.3f} is outside 1 ± {AA_GATE}")
    wide = [ratio.iqr for ratio in (control, *others) if not ratio.iqr <= IQR_GATE]  # nan is no spread at all
    if wide:
        reasons.append(f"{len(wide)} of {len(others) + 1} IQRs, up to {max(wide):.1%}, are over {IQR_GATE:.0%}")
    return "quiet" if not reasons else "noisy: " + ", ".join(reasons)
