"""`visadapt truncate`: files cut to a rank load as LoRA and act as the method says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from visadapt.cli.main import main
from visadapt.core.check import _Attends, move

TARGETS = ["0", "1.attention.in_proj_weight:q", "2:0/2"]


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), _Attends(), nn.Linear(6, 8))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(method, close_gates=False):
    model = move(va.adapt(base(), method, TARGETS, "mine"), 0.5)
    if close_gates:
        with torch.no_grad():
            for i, adapter in enumerate(va.adapters(model).values()):
                adapter.gate[: i + 1] = 0
    model[2].bias.requires_grad_(True)
    va.save(model, "a.safetensors", extra={"class_names": '["x"]'})
    return model


def test_dylora_at_any_rank(here, capsys):
    model = written(va.DyLoRA(rank=4, alpha=6))
    x = torch.randn(2, 5, 6)
    for rank in (1, 3, None):
        assert (
            main(["truncate", "a.safetensors", *([] if rank is None else [f"--rank={rank}"]), "--output=b.safetensors"])
            == 0
        )
        for adapter in va.adapters(model).values():
            adapter.use = rank
        cut = va.load(base(), "b.safetensors")
        torch.testing.assert_close(cut(x), model(x))
        assert {(type(a), a.rank) for a in va.adapters(cut, "mine").values()} == {(va.LoRA, rank or 4)}
        assert cut[2].bias.requires_grad
    from safetensors import safe_open

    with safe_open("b.safetensors", "pt") as file:
        assert file.metadata()["class_names"] == '["x"]'
    assert "rank 4 on 3 layers" in capsys.readouterr().out


def test_closed_gates_leave_layers_of_other_ranks_and_the_same_update(here, capsys):
    model = written(va.SoRA(rank=4, alpha=8), close_gates=True)
    assert main(["truncate", "a.safetensors"]) == 0
    cut = va.load(base(), "truncated.safetensors")
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(cut(x), model(x))
    assert sorted(a.rank for a in va.adapters(cut).values()) == [1, 2, 3]
    assert "ranks 1 to 3" in capsys.readouterr().out


def test_what_has_no_order_is_refused(here, capsys):
    for method, words in ((va.LoRA(), "does not order"), (va.DoRA(), "no components")):
        written(method)
        assert main(["truncate", "a.safetensors", "--rank=2"]) == 2
        assert words in capsys.readouterr().err
    assert main(["truncate", "a.safetensors", "--output=b.bin"]) == 2
    assert main(["truncate", "a.safetensors", "--rank=0"]) == 2
    assert not (here / "b.bin").exists()
