"""The recipes of the shipped bases, configs/pretrain/, which import each other as the scripts that they are."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "configs" / "pretrain"


def recipe(name: str) -> ModuleType:
    """A recipe, or a part of one, by the name of its file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)
