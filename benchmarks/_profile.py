"""Where the time of one case goes, operator by operator."""

from __future__ import annotations

import argparse

import torch

from benchmarks import _cases
from benchmarks._group import DTYPES, Step
from benchmarks._hosts import freeze, hosts


def run(options: argparse.Namespace, steps: int = 10) -> None:
    """Print a profile of ``steps`` training steps of each chosen case, per step and by own time."""
    torch.set_num_threads(options.threads)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for host in hosts(options.depth).values():
        if host.suite not in options.suite and host.name not in options.suite:
            continue
        for dtype in options.dtype:
            base = freeze(host.build(False)).to(options.device, DTYPES[dtype]).train()
            x = host.input(DTYPES[dtype], options.device)
            for method in options.methods or _cases.COMPARED:
                for recipe in _cases.recipes(method, host, DTYPES[dtype], tuple(options.peers)):
                    if options.sources is None or recipe.source in options.sources:
                        step = Step(_cases.make(method, recipe, host, base), host, x, options.compile == "both")
                        print(f"\n{step.case.label} on {host.name}, {dtype}: {steps} steps")
                        print(_profile(step, steps, activities, options.device))


def _profile(step: Step, steps: int, activities: list[torch.profiler.ProfilerActivity], device: str) -> str:
    for _ in range(3):
        step.train()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step.train()
    return profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=15, max_name_column_width=48)
