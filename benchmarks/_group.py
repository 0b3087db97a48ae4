"""One group of cases, measured in one process: a host in one precision with some methods and their peers."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import _cases, _counts, _equal, _measure
from benchmarks._cases import Case
from benchmarks._hosts import Host, freeze, hosts, share
from benchmarks._rows import Pair, Result, Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Group:
    """What one process measures.

    Attributes:
        host: name of the host.
        dtype: ``fp32`` or ``bf16``, of the frozen model and its input.
        methods: of the catalogue.
        peers: sources to compare with.
        compiled: also run everything under ``torch.compile``.
        rounds: of the interleaved timing; 0 measures the deterministic columns alone.
        clock: ``cpu`` or ``wall``.
        device: ``cpu`` or ``cuda``.
        threads: of torch.
        depth: of the ViT.
    """

    host: str
    dtype: str
    methods: tuple[str, ...]
    peers: tuple[str, ...]
    compiled: bool = False
    rounds: int = 15
    clock: str = "cpu"
    device: str = "cpu"
    threads: int = 1
    depth: int = 12


class Step:
    """A training step and an inference of one case, on fixed data."""

    def __init__(self, case: Case, host: Host, x: Tensor, compiled: bool = False) -> None:
        self.case, self.x = case, x
        self.start: Tensor = case.model.get_parameter(host.source) if host.source else x
        self.call: Callable[[Tensor], Tensor] = torch.compile(case.model) if compiled else case.model
        self.optimizer = torch.optim.AdamW(case.trained, lr=1e-5) if case.trained else None
        with torch.no_grad():
            self.grad = torch.randn_like(case.model(x)) / x.shape[0]

    def forward(self) -> Tensor:
        return self.call(self.x)

    def backward(self, output: Tensor) -> None:
        output.backward(self.grad)

    def clear(self) -> None:
        self.start.grad = None
        for parameter in self.case.trained:
            parameter.grad = None

    def train(self) -> None:
        """Forward, backward and AdamW."""
        self.backward(self.forward())
        if self.optimizer is not None:
            self.optimizer.step()
        self.clear()

    def infer(self) -> None:
        """Forward alone, nothing recorded."""
        with torch.no_grad():
            self.call(self.x)


def count(step: Step, row: Row, reference: Row | None, base: nn.Module, eager: bool) -> None:
    """Fill the deterministic columns of a row."""
    step.train()  # lazily made tensors belong to the state, not to a step
    if eager:  # a compiled graph calls its own kernels: nothing for a dispatch mode to see
        with _counts.Count() as counted:
            step.backward(step.forward())
        step.clear()
        row.operators = counted.operators
        row.flops = counted.flops / (reference.flops if reference else 1)
        row.traffic = counted.traffic / (reference.traffic if reference else 1)
    saved = _counts.saved_bytes(step.forward, step.case.model)
    row.saved_mib, row.kept_mib = saved.seen / _counts.MIB, saved.kept / _counts.MIB
    used = _counts.memory(step.forward, step.backward, step.x.device.type)
    step.clear()
    row.peak_mib, row.held_mib = used.peak / _counts.MIB, used.held / _counts.MIB
    row.state_mib = _counts.state_bytes(step.case.model, (*base.parameters(), *base.buffers())) / _counts.MIB
    row.trained = sum(p.numel() for p in step.case.trained)


class Bench:
    """The cases of a group and what is measured on them."""

    def __init__(self, group: Group, host: Host | None = None) -> None:
        self.group = group
        self.host = host or hosts(group.depth)[group.host]
        self.dtype = DTYPES[group.dtype]
        torch.manual_seed(0)
        self.base = freeze(self.host.build(False)).to(group.device, self.dtype).train()
        self.x = self.host.input(self.dtype, group.device)
        self.result = Result()
        self.steps: dict[str, Step] = {}
        self.rows: dict[str, Row] = {}
        self.blocks: list[list[str]] = []

    def frozen(self, source: str) -> Step:
        """Another copy of the frozen model, sharing its weights."""
        model = self.host.open(freeze(share(self.base)))
        return Step(Case("frozen", source, "", model), self.host, self.x)

    def row(self, method: str, source: str, variant: str = "") -> Row:
        """A new line of the table."""
        row = Row(self.host.suite, self.host.name, self.group.dtype, method, source, variant)
        self.result.rows.append(row)
        return row

    def add(self, case: Case, compiled: bool = False) -> None:
        """Take in one case, and count its deterministic columns."""
        if compiled:
            variant = f"{case.variant} compiled".strip()
            case = Case(case.method, case.source, variant, case.model, case.trained, f"{case.group} compiled".strip())
        step = Step(case, self.host, self.x, compiled)
        row = self.row(case.method, case.source, case.variant)
        count(step, row, self.rows["frozen/A"], self.base, eager=not compiled)
        self.steps[case.label], self.rows[case.label] = step, row
        self.blocks[-1].append(case.label)

    def collect(self) -> None:
        """Build every case; one that cannot run leaves a row that says why."""
        reference, control = self.frozen("A"), self.frozen("A/A")
        row = self.row("frozen", "A")
        count(reference, row, None, self.base, eager=True)
        self.steps["frozen/A"], self.rows["frozen/A"] = reference, row
        self.blocks.append([])
        self.add(control.case)
        if self.group.compiled:
            self.add(self.frozen("A").case, compiled=True)
        for method in self.group.methods:
            self.blocks.append([])
            for recipe in _cases.recipes(method, self.host, self.dtype, self.group.peers):
                self._try(method, recipe)
            self._errors(method)
        row.flops = row.traffic = 1.0  # until here the totals that the others are divided by

    def _try(self, method: str, recipe: _cases.Recipe) -> None:
        try:
            case = _cases.make(method, recipe, self.host, self.base)
            self.add(case)
            if self.group.compiled and not recipe.variant:
                self.add(_cases.make(method, recipe, self.host, self.base), compiled=True)
        except _cases.Unavailable as reason:
            self.row(method, recipe.source, recipe.variant).note = str(reason)
        except Exception as error:  # a broken case must not cost the others their hour: its row says what broke
            traceback.print_exc()
            self.row(method, recipe.source, recipe.variant).note = f"failed: {type(error).__name__}: {error}"

    def _errors(self, method: str) -> None:
        """The float64 precondition: ours equals each peer at equal weights."""
        base = freeze(self.host.build(True)).to(self.group.device, torch.float64)
        x = self.host.input(torch.float64, self.group.device, batch=1)
        built: dict[str, Case] = {}
        for recipe in _cases.recipes(method, self.host, torch.float32, self.group.peers):
            label = Case(method, recipe.source, recipe.variant, base).label
            if label in self.steps:
                built[label] = _cases.make(method, recipe, self.host, base)
        for a, b in self.pairs([*self.blocks[-1]]):
            pair = self._pair(a, b)
            mine, peer = built.get(a.label), built.get(b.label)
            if mine and peer and _equal.comparable(mine, peer):
                try:
                    pair.error = _equal.relative_error(mine, peer, self.host, x)
                except ValueError as reason:  # other tensors, so another mathematics: the row must say so
                    self.rows[a.label].note = f"failed: {reason}"
                else:
                    if pair.error > _equal.TOLERANCE:
                        self.rows[a.label].note = f"failed: differs from {b.label} by {pair.error:.0e} in float64"
            self.result.pairs.append(pair)

    def pairs(self, labels: list[str]) -> list[tuple[Case, Case]]:
        """Ours with each peer of the same group."""
        cases = [self.steps[label].case for label in labels]
        mine = [case for case in cases if case.source == "visadapt"]
        others = [case for case in cases if case.source not in ("visadapt", "frozen", "A", "A/A")]
        return [(a, b) for a in mine for b in others if a.group == b.group]

    def _pair(self, a: Case, b: Case) -> Pair:
        pair = Pair(self.host.suite, self.host.name, self.group.dtype, a.method, a.variant, b.source, b.variant)
        mine, theirs = self.rows[a.label], self.rows[b.label]
        pair.saved = mine.saved_mib / theirs.saved_mib if theirs.saved_mib else None
        pair.kept = mine.kept_mib / theirs.kept_mib if theirs.kept_mib else None
        pair.peak = mine.peak_mib / theirs.peak_mib if theirs.peak_mib else None
        return pair

    def time(self) -> None:
        """Fill the time columns of rows and pairs."""
        now = _measure.clock(self.group.clock, self.group.device)
        for column in ("step", "infer"):
            for step in self.steps.values():
                step.case.model.train(column == "step")
            call = {label: (step.train if column == "step" else step.infer) for label, step in self.steps.items()}
            blocks = [{label: call[label] for label in block} for block in self.blocks if block]
            times = _measure.interleave(call["frozen/A"], blocks, self.group.rounds, now)
            self._fill(times, column)

    def _fill(self, times: _measure.Times, column: str) -> None:
        reference = self.rows["frozen/A"]
        setattr(reference, column, 1.0)
        if column == "step":
            reference.step_ms = 1e3 * _measure.Ratio.of(times.reference).median
        for label, row in self.rows.items():
            if label in times.ratios:
                ratio = times.against_reference(label)
                setattr(row, column, ratio.median)
                setattr(row, f"{column}_iqr", ratio.iqr)
        for pair in self.result.pairs:
            mine = Case(pair.method, "visadapt", pair.ours, self.base).label
            peer = Case(pair.method, pair.peer, pair.peer_variant, self.base).label
            ratio = times.against(mine, peer)
            setattr(pair, column, ratio.median)
            setattr(pair, f"{column}_iqr", ratio.iqr)
        if column == "step":
            others = [times.against_reference(label) for label in times.ratios]
            verdict = _measure.verdict(times.against_reference("frozen/A/A"), others)
            self.rows["frozen/A/A"].note = verdict
            for line in (*self.rows.values(), *self.result.pairs):
                line.quiet = verdict == "quiet"


def measure(group: Group) -> Result:
    """Run one group in this process."""
    torch.set_num_threads(group.threads)
    torch._dynamo.config.recompile_limit = 64  # cases share their forward's code; past the limit they run eagerly
    bench = Bench(group)
    bench.collect()
    if group.rounds:
        bench.time()
    return bench.result
