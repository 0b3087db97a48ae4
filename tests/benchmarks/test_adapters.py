"""The benchmark of adapters: deterministic columns, equality with the peers, stored tables, the command."""

import csv
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import _bars, _cases, _equal, _measure, _report, adapters
from benchmarks._group import Bench, Group, measure
from benchmarks._hosts import Host, freeze
from benchmarks._rows import Pair, Result, Row

I, O, R = 64, 48, 8  # noqa: E741
PEERS = ("peft", "lycoris", "literal")


def linear(n, fan_in=I, fan_out=O):
    return Host("small linear", "linear", (n, fan_in), lambda _: nn.Sequential(nn.Linear(fan_in, fan_out)))


CONV = Host("small conv", "conv", (2, 16, 6, 6), lambda _: nn.Sequential(nn.Conv2d(16, 24, 3, padding=1)))


def counted(host, *methods, peers=()):
    """Rows by label of a run without times."""
    bench = Bench(Group(host.name, "fp32", methods, peers, rounds=0), host)
    bench.collect()
    assert not [row.note for row in bench.result.rows if row.note]
    return bench.rows, bench.result


def test_lora_flops_and_saved_bytes_are_those_of_the_formula():
    """Factored below the crossover, merged forward above it; x kept, and what z and the factors weigh at most."""
    n, base = 64, 4 * 64 * I * O
    ours = counted(linear(n), "LoRA")[0]["LoRA/visadapt"]
    assert ours.flops * base == pytest.approx(base + 6 * n * R * (I + O))
    n = 512
    merged = counted(linear(n), "LoRA")[0]["LoRA/visadapt"]
    assert merged.flops * 4 * n * I * O == pytest.approx(4 * n * I * O + 2 * n * R * (3 * I + 2 * O) + 2 * R * I * O)
    least = 4 * n * I / 2**20
    assert least <= merged.saved_mib <= least + 4 * R * (I + O) / 2**20
    assert merged.kept_mib == merged.saved_mib


def test_dora_keeps_input_and_output_and_nothing_of_the_size_of_the_weight():
    n = 96
    rows, _ = counted(linear(n, 96, 96), "DoRA", peers=("peft",))
    small = 4 * (n * R + 96 * R * 3 + 96 * 4) / 2**20
    assert rows["DoRA/visadapt"].saved_mib <= 4 * n * (96 + 96) / 2**20 + small
    assert rows["DoRA/peft"].saved_mib > rows["DoRA/visadapt"].saved_mib


def test_frozen_model_is_the_unit():
    rows, _ = counted(linear(64))
    for label in ("frozen/A", "frozen/A/A"):
        assert (rows[label].flops, rows[label].traffic, rows[label].saved_mib) == (1.0, 1.0, 0.0)
        assert rows[label].trained == rows[label].state_mib == 0


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("LoRA", R * (I + O)),
        ("DoRA", R * (I + O) + O),
        ("FLoRA", R * R + R * (I + O)),
        ("WaRA", 4 * R * (I + O) // 2),
        ("LoHa", 2 * R * (I + O)),
        ("LoKr", 6 * 8 + 8 * 8),  # both factors whole: the rank is half of the larger one's sides
        ("SALT", 2 * 36 + 2 * 12 * R),  # three quarters of 48 singular values are scaled and shifted
        ("Hydra", R * (I + O) + 2 * R * O + 2 * (R + O)),
        ("SSF", 2 * O),
    ],
)
def test_trained_parameters_and_cost_below_the_published_form(method, trained):
    rows, result = counted(linear(512), method, peers=("literal",))
    ours = rows[f"{method}/visadapt"]
    assert ours.trained == trained
    for pair in result.pairs:
        mine, literal = (
            rows[_cases.Case(method, source, pair.ours, nn.Identity()).label] for source in ("visadapt", "literal")
        )
        assert pair.error < _equal.TOLERANCE
        assert mine.trained == literal.trained
        if pair.ours:
            continue  # three levels have a rank above this layer's own, so thin factors are no gain here
        assert mine.flops <= literal.flops * 1.001
        if method != "SALT":  # which works on the weight, as its published form does
            folded = 8 * 4 * mine.trained / 2**20  # copies of the factors weigh something at this size alone
            assert mine.kept_mib <= literal.kept_mib + folded


@pytest.mark.parametrize(
    ("host", "method"),
    [
        *((host, method) for host in (linear(16), CONV) for method in _cases.COMPARED),
        *((linear(16, 128), method) for method in ("MiSS", "HRA")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_ours_equals_every_peer_in_float64(host, method):
    """Output, gradient of the input and of every adapter tensor, at weights that are not the initial ones."""
    pytest.importorskip("peft")
    pytest.importorskip("lycoris")
    torch.manual_seed(0)
    base, x = freeze(host.build(True).double()), host.input(torch.float64, "cpu")
    recipes = _cases.recipes(method, host, torch.float32, PEERS)
    cases = [_cases.make(method, recipe, host, base) for recipe in recipes]
    compared = 0
    for ours in (case for case in cases if case.source == "visadapt"):
        for peer in (case for case in cases if case.source != "visadapt"):
            if _equal.comparable(ours, peer):
                assert _equal.relative_error(ours, peer, host, x) < 1e-12, (ours.label, peer.label)
                compared += 1
    assert compared


@pytest.mark.parametrize("method", sorted(set(_cases.CATALOGUE) - {"BOFT"}))  # PEFT's is of one factor without CUDA
def test_peers_of_the_catalogue_have_the_size_of_ours(method):
    pytest.importorskip("peft")
    host = linear(16, 128, 64)
    base = freeze(host.build(False))
    ours, peer = (
        _cases.make(method, recipe, host, base) for recipe in _cases.recipes(method, host, torch.float32, PEERS)
    )
    counts = [sum(parameter.numel() for parameter in case.trained) for case in (ours, peer)]
    assert counts[0] == counts[1]


def test_a_wrong_case_fails_its_row(monkeypatch):
    """A peer that computes something else is found out, and the other rows stay."""
    from benchmarks import literal

    plain = literal.SSF.forward
    monkeypatch.setattr(literal.SSF, "forward", lambda self, x: plain(self, x) * 1.01)
    bench = Bench(Group("", "fp32", ("SSF",), ("literal",), rounds=0), linear(16))
    bench.collect()
    assert "failed: differs from SSF/literal by 1e-02" in bench.rows["SSF/visadapt"].note


def test_a_missing_peer_leaves_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(_cases.importlib.util, "find_spec", lambda name: None)
    bench = Bench(Group("", "fp32", ("LoRA",), ("peft", "lycoris"), rounds=0), linear(16))
    bench.collect()
    notes = {(row.source, row.variant): row.note for row in bench.result.rows if row.note}
    assert "peft is not installed" in notes["peft", ""]
    assert "lycoris is not installed" in notes["lycoris", "bypass"]
    assert bench.rows["LoRA/visadapt"].saved_mib


def test_times_are_filled_and_judged(monkeypatch):
    monkeypatch.setattr(_measure, "repeats_for", lambda run, now: 1)
    bench = Bench(Group("", "fp32", ("SSF",), ("literal",), rounds=3), linear(16))
    bench.collect()
    bench.time()
    for label, row in bench.rows.items():
        assert row.step > 0, label
        assert row.infer > 0, label
    pair = bench.result.pairs[0]
    ratio = bench.rows["SSF/visadapt"].step / bench.rows["SSF/literal"].step
    assert ratio / 3 < pair.step < ratio * 3  # three rounds of microseconds: only the direction is sure
    assert bench.rows["frozen/A/A"].note.startswith(("quiet", "noisy"))
    assert {line.quiet for line in (*bench.rows.values(), pair)} == {bench.rows["frozen/A/A"].note == "quiet"}


def example():
    row = Row("linear", "linear768", "fp32", "LoRA", "visadapt", trained=12288, step=1.05, step_iqr=0.01)
    control = Row("linear", "linear768", "fp32", "frozen", "A/A", step=1.001, quiet=True, note="quiet")
    pair = Pair("linear", "linear768", "fp32", "LoRA", "", "peft", "", step=0.95, saved=1.0, error=1e-15)
    return Result([control, row], [pair])


def test_bars_are_met_missed_or_marked_noisy():
    result = example()
    judged = {(j.bar.column, j.bar.peer): j for j in _bars.judge(result.rows, result.pairs) if j.value is not None}
    assert judged["step", ""].verdict == "met"
    assert judged["step", "peft"].verdict == "missed"
    assert judged["saved", "peft"].verdict == "met"
    noisy = [replace(result.rows[1], quiet=False)]
    assert "met, noisy run" in [j.verdict for j in _bars.judge(noisy, [])]


def test_every_bar_names_a_column_and_a_case_that_exist():
    columns = {"step", "saved", "kept", "peak"}
    for bar in _bars.MUST:
        assert bar.column in columns
        assert bar.method in (*_cases.METHODS, "optimizer")
        assert math.isfinite(bar.must)


def test_stored_figures_come_back_and_print_as_markdown(tmp_path, capsys):
    facts, result = {"command": "python -m benchmarks.adapters | tee", "commit": "abc"}, example()
    _report.store(tmp_path, facts, result)
    assert _report.load(tmp_path) == (facts, result)
    assert not list(tmp_path.glob("*.tmp"))
    assert adapters.main(["table", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.rstrip("\n") == (tmp_path / "adapters.md").read_text(encoding="utf-8").rstrip("\n")
    assert "| LoRA step time / peft | linear768, fp32 | ≤ 0.93 | 0.950 | missed |" in text
    assert "inference" not in text.split("## linear768")[1]  # empty columns are left out
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["note"] == "quiet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "linaer"], "--suite linaer: choose from linear"),
        (["--methods", "LoRa"], "--methods LoRa: choose from LoRA"),
        (["--peers", "lora"], "--peers lora: choose from peft"),
        (["--dtype", "fp8"], "--dtype fp8: choose from fp32"),
        (["table"], "table needs the folder"),
        (["table", "nowhere"], "is missing: run `python -m benchmarks.adapters --out nowhere`"),
    ],
)
def test_wrong_arguments_have_one_clear_message(arguments, message, capsys):
    assert adapters.main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_plan_gives_the_vit_a_process_per_method():
    options = adapters.parser().parse_args(
        ["--suite", "linear768,vit", "--dtype", "fp32,bf16", "--methods", "LoRA,DoRA"]
    )
    groups = adapters.plan(options)
    assert [(g["host"], g["dtype"], g["methods"]) for g in groups] == [
        ("linear768", "fp32", ["LoRA", "DoRA"]),
        ("linear768", "bf16", ["LoRA", "DoRA"]),
        ("vit_b16", "fp32", ["LoRA"]),
        ("vit_b16", "fp32", ["DoRA"]),
        ("vit_b16", "bf16", ["LoRA"]),
        ("vit_b16", "bf16", ["DoRA"]),
    ]


def test_facts_hold_no_path_and_no_host_name(monkeypatch, tmp_path):
    import platform
    import sys

    arguments = ["adapters.py", "--suite", "conv", "--out", str(tmp_path), "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    facts = adapters.facts(adapters.parser().parse_args(arguments[1:]))
    assert facts["command"] == "python -m benchmarks.adapters --suite conv --rounds 3"
    text = " ".join(facts.values())
    assert str(tmp_path) not in text
    assert str(adapters.ROOT) not in text
    assert platform.node() not in text
    assert {"commit", "machine", "torch", "clock", "date"} <= set(facts)


@pytest.mark.slow
def test_the_command_measures_stores_and_prints(tmp_path, capfd):
    """The real thing in its own processes, at full size, one method."""
    arguments = ["--suite", "linear768", "--methods", "LoRA", "--rounds", "2", "--out", str(tmp_path)]
    assert adapters.main(arguments) == 0
    _, result = _report.load(tmp_path)
    assert {row.source for row in result.rows} >= {"A", "A/A", "visadapt", "peft", "lycoris"}
    assert all(row.step for row in result.rows)
    assert "LoRA step time / frozen" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("host", ["linear768", "linear3072", "conv320"])
def test_memory_bars_of_the_layers(host):
    """Deterministic at any load, so a missed one is a regression."""
    pytest.importorskip("peft")
    methods = tuple(dict.fromkeys(bar.method for bar in _bars.MUST if bar.host == host))
    result = measure(Group(host, "fp32", methods, PEERS, rounds=0))
    judged = [j for j in _bars.judge(result.rows, result.pairs) if j.value is not None and j.bar.dtype == "fp32"]
    assert judged
    over = [j for j in judged if j.value > j.bar.must * 1.01]
    assert not [(j.bar.text, j.value, j.bar.must) for j in over if not j.bar.missed]


@pytest.mark.slow
def test_lean_lora_on_the_vit_keeps_no_more_than_the_frozen_model():
    """0.64 of PEFT's bytes: the frozen model's own and a little over one per cent for z and the factors."""
    pytest.importorskip("peft")
    result = measure(Group("vit_b16", "fp32", ("LoRA", "DoRA"), ("peft",), rounds=0))
    rows = {(row.method, row.source, row.variant): row for row in result.rows}
    frozen, lean = rows["frozen", "A", ""].saved_mib, rows["LoRA", "visadapt", "lean"].saved_mib
    assert lean <= 1.02 * frozen
    judged = [j for j in _bars.judge(result.rows, result.pairs) if j.value is not None and j.bar.column == "saved"]
    assert {j.bar.method for j in judged} == {"LoRA", "DoRA"}
    assert not [(j.bar.text, j.value, j.bar.must) for j in judged if j.value > j.bar.must]
