"""What the methods cost at one budget: step time and memory against the frozen model, and the error of merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import visadapt as va
from benchmarks import _budget, _counts, _measure
from benchmarks._cases import Case, wake
from benchmarks._group import Step
from benchmarks._hosts import Host, freeze, share, vit
from visadapt.core.calibrate import calibrate
from visadapt.core.train import after_backward, after_step, before_step

DEPTH = 1  # blocks: every layer of ViT-B/16 once
STEPS = 1000  # of the run that the step is taken from
HOST = Host(
    "vit_b16_depth1",
    "vit",
    (2, 3, 224, 224),
    vit(DEPTH),
    ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
    "pos_embed",
)


class TrainingStep(Step):
    """A step with the hooks and penalties of its adapters."""

    def train(self) -> None:
        """Forward, backward, hooks and AdamW."""
        model = self.case.model
        before_step(model, STEPS // 2, STEPS)
        self.backward(self.forward())
        if (term := va.penalty(model)).requires_grad:
            term.backward()
        after_backward(model)
        if self.optimizer is not None:
            self.optimizer.step()
        after_step(model)
        self.clear()


def measure(methods: Sequence[str], rank: int, rounds: int = 5) -> dict[str, dict[str, Any]]:
    """Step time, peak memory and merge error of each method at the parameters of LoRA of that rank.

    All steps are timed in one run, each between two of the frozen model (`_measure`). Weights are float32 and a little
    off their start; the error of merging is the largest of the output, relative to its largest entry.

    Args:
        methods: Names of the catalogue.
        rank: Of the LoRA.
        rounds: Of the timing; 0 leaves it out.
    """
    torch.manual_seed(0)
    base = freeze(HOST.build(False)).eval()  # no dropout in it; calls of eval mode are what merging compares
    x = HOST.input(torch.float32, "cpu")
    frozen = Step(Case("frozen", "frozen", "", HOST.open(freeze(share(base)))), HOST, x)
    frozen.train()
    peak = _counts.memory(frozen.forward, frozen.backward, "cpu").peak
    frozen.clear()
    budget = _budget.parameters(base, HOST.targets, va.METHODS["LoRA"](rank=rank))
    assert budget is not None
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, TrainingStep] = {}
    for name in methods:
        try:
            method = _budget.nearest(name, base, HOST.targets, budget, STEPS)
        except ValueError as error:
            found[name] = {"refused": str(error)}
            continue
        step = steps[name] = _step(name, method, base, x)
        found[name] = {"parameters": _budget.count(step.case.model)} | _merge_error(step, x)
        step.train()
        found[name]["peak"] = _counts.memory(step.forward, step.backward, "cpu").peak / peak
        step.clear()
    if rounds and steps:
        times = _measure.interleave(
            frozen.train, [{name: step.train} for name, step in steps.items()], rounds, _measure.clock("cpu", "cpu")
        )
        for name in steps:
            ratio = times.against_reference(name)
            found[name] |= {"step": ratio.median, "step_iqr": ratio.iqr}
    return found


def _step(name: str, method: va.Adapter, base: torch.nn.Module, x: Tensor) -> TrainingStep:
    model = va.adapt(freeze(share(base)), method, list(HOST.targets))
    calibrate(model, (model(x).square().mean() for _ in range(1)))
    trained = [p for a in va.adapters(model).values() for p in a.parameters() if p.requires_grad]
    wake(trained)
    return TrainingStep(Case(name, "visadapt", "", HOST.open(model.train()), trained), HOST, x)


def _merge_error(step: TrainingStep, x: Tensor) -> dict[str, Any]:
    model = step.case.model.eval()
    try:
        with torch.no_grad():
            before = model(x)
            with va.merged(model):
                after = model(x)
    except ValueError as error:
        return {"merge_error": None, "no_merge": str(error)}
    finally:
        model.train()
    return {"merge_error": ((after - before).abs().max() / before.abs().max()).item()}
