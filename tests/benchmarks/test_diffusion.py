"""The diffusion benchmark: equal computations, bars on saved bytes, the report; the whole command at a tiny size."""

import csv

import pytest

from benchmarks import diffusion
from benchmarks._diffusion import Bench


@pytest.fixture(scope="module")
def tiny():
    return Bench("tiny")


@pytest.mark.parametrize("name", ["attention", "dora"])
def test_the_pair_of_a_bar_computes_the_same(name):
    error = diffusion.errors({name: diffusion.ROWS[name]}, "cpu")[name]
    assert error < 1e-10


@pytest.mark.parametrize("setting", ["LoRA attention", "DoRA everywhere"])
def test_bars_on_saved_bytes(tiny, setting):
    rows = []
    for name, row in diffusion.ROWS.items():
        if row.setting == setting and (row.by == diffusion.PEER or name in ("attention", "dora")):
            counted = diffusion.count(diffusion.build(tiny, row), "cpu")
            rows.append({"row": name, "setting": setting, "by": row.by} | counted)
    assert rows[0]["trained"] == rows[1]["trained"]
    diffusion.compare(rows)
    verdicts = diffusion.bars(rows)
    assert len(verdicts) == 1, "times were not taken"
    assert "saved bytes" in verdicts[0]
    assert verdicts[0].endswith("met.")


def test_what_is_not_cached_is_encoded(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(type(tiny.parts["vae"]), "encode", _noting(type(tiny.parts["vae"]).encode, seen, "vae"))
    encoder = type(tiny.parts["text_encoder"])
    monkeypatch.setattr(encoder, "forward", _noting(encoder.forward, seen, "text"))
    for kept in diffusion.ENCODING.values():
        step, seen[:] = tiny.ours("LoRA attention", "", kept), []
        step.train()
        assert set(seen) == {"vae", "text"} - {"vae" if part == "latents" else part for part in kept}


def _noting(method, seen, name):
    def noting(*args, **kwargs):
        seen.append(name)
        return method(*args, **kwargs)

    return noting


def test_bars_and_report():
    common = {"trained": 10, "kept_mib": 1.0, "held_mib": 1.0, "peak_mib": 2.0}
    rows = [
        {"setting": "LoRA attention", "by": diffusion.PEER, "saved_mib": 100.0} | common,
        {"setting": "LoRA attention", "by": "visadapt", "saved_mib": 71.0, "vs_peer": 0.97, "vs_peer_iqr": 0.01}
        | common,
    ]
    diffusion.compare(rows)
    assert [line.rpartition(": ")[2] for line in diffusion.bars(rows)] == ["met.", "missed."]
    assert "met, noisy run." in diffusion.bars(rows, "noisy: A/A 1.1")[0]
    cached = [{"setting": "LoRA attention", "by": "visadapt, all", "step": 0.5, "step_iqr": 0.0}]
    text = diffusion.markdown({"command": "x"}, rows, cached)
    assert "| 0.71 |" in text
    assert "| 2.00 |" in text, "half the time is twice as fast"
    with pytest.raises(SystemExit):
        diffusion.main(["--rows", "nothing"])


@pytest.mark.slow
def test_a_run_of_the_command(tmp_path, capsys):
    assert diffusion.main(["--size", "tiny", "--rounds", "1", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "diffusion.md").read_text().strip()
    with (tmp_path / "diffusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(diffusion.ROWS) + len(diffusion.ENCODING)
    assert all(float(row["step"]) > 0 for row in rows)
