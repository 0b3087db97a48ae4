"""A judge of random weights in place of the shipped one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from visadapt.data.scenes import BACKGROUNDS, COLOURS, SHAPES
from visadapt.metrics import adherence


@pytest.fixture
def random_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its files are as those of the shipped one."""
    torch.manual_seed(0)
    classes, widths = {"shape": [*SHAPES], "colour": [*COLOURS], "background": [*BACKGROUNDS]}, [8, 8, 8, 8]
    network = adherence.Judge([len(names) for names in classes.values()], widths)
    file = tmp_path / "judge.safetensors"
    file.write_bytes(save(network.state_dict()))
    file.with_suffix(".json").write_text(json.dumps({"classes": classes, "widths": widths}))
    monkeypatch.setattr(adherence, "FILE", file)
    adherence.judge.cache_clear()
    yield
    adherence.judge.cache_clear()
