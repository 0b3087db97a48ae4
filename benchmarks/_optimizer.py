"""What stepping many small tensors costs: torch's AdamW as it comes, its other forms, and our flat buffer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import _measure
from benchmarks._rows import Pair, Result, Row

RANK = 8
VIT_B = [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12  # (inputs, outputs) of the block Linears
UNET = [(320, 320)] * 64 + [(640, 640)] * 64
TINY = [(64, 64)] * 600
SETS = {"96 tensors": VIT_B, "256 tensors": UNET, "1200 tensors": TINY}  # two factors for each layer

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def _ours(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from visadapt.optim.flat import flatten

    return flatten(torch.optim.AdamW(parameters))


FORMS: dict[tuple[str, str], Make] = {
    ("AdamW", ""): torch.optim.AdamW,
    ("AdamW", "foreach"): lambda p: torch.optim.AdamW(p, foreach=True),
    ("AdamW", "fused"): lambda p: torch.optim.AdamW(p, fused=True),
    ("visadapt", ""): _ours,
}


def factors(layers: list[tuple[int, int]], device: str) -> list[Tensor]:
    """Two random factors per layer, (rank, inputs) and (outputs, rank)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for fan_in, fan_out in layers for shape in ((RANK, fan_in), (fan_out, RANK))]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def stepper(make: Make, layers: list[tuple[int, int]], device: str) -> Callable[[], None]:
    """One optimiser step on gradients that are new tensors each time, as after a backward pass."""
    parameters = [nn.Parameter(value.clone()) for value in factors(layers, device)]
    gradients = [1e-3 * value for value in factors(layers, device)]
    optimizer = make(parameters)

    def step() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(rounds: int, clock: str, device: str, threads: int) -> Result:
    """Time every form on every set; the reference is the default AdamW."""
    torch.set_num_threads(threads)
    now, result = _measure.clock(clock, device), Result()
    for host, layers in SETS.items():
        result_of_set = _one(host, layers, rounds, now, device)
        result.rows += result_of_set.rows
        result.pairs += result_of_set.pairs
    return result


def _one(host: str, layers: list[tuple[int, int]], rounds: int, now: Callable[[], float], device: str) -> Result:
    result = Result()
    steps = {key: stepper(make, layers, device) for key, make in FORMS.items()}
    names = {key: "+".join(part for part in key if part) for key in steps}
    reference, control = steps["AdamW", ""], stepper(FORMS["AdamW", ""], layers, device)
    trained = sum(value.numel() for value in factors(layers, "cpu"))
    block = {names[key]: step for key, step in steps.items() if step is not reference}
    times = _measure.interleave(reference, [{"A/A": control}, block], max(rounds, 1), now)
    verdict = _measure.verdict(times.against_reference("A/A"), [])
    for key in [("AdamW", ""), ("AdamW", "A/A"), *(k for k in steps if k != ("AdamW", ""))]:
        row = Row("optimizer", host, "fp32", "optimizer", *key, trained=trained, quiet=verdict == "quiet")
        if key == ("AdamW", ""):
            row.step, row.step_ms = 1.0, 1e3 * _measure.Ratio.of(times.reference).median
        else:
            ratio = times.against_reference(names.get(key, "A/A"))
            row.step, row.step_iqr = ratio.median, ratio.iqr
            row.note = verdict if key[1] == "A/A" else ""
        result.rows.append(row)
    ratio = times.against_reference("visadapt")
    pair = Pair("optimizer", host, "fp32", "optimizer", "", "AdamW", "", ratio.median, ratio.iqr)
    pair.quiet = verdict == "quiet"
    result.pairs.append(pair)
    return result
