"""Blocks of code on the pages: Python compiles, YAML parses, and what is marked as runnable runs."""

import os
import subprocess
import sys

import pytest
import yaml

from tests.docs import pages

MARKED = [
    pytest.param(page, slow, id=pages.name(page) + " (slow)" * slow, marks=[pytest.mark.slow] * slow)
    for page in pages.PAGES
    for slow in (False, True)
    if any(block.runnable and block.slow == slow for block in pages.blocks(page))
]


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_blocks_are_well_formed(page):
    for block in pages.blocks(page):
        if block.language == "python":
            compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        elif block.language == "yaml":
            yaml.safe_load(block.text)


def test_some_blocks_are_marked():
    assert len(MARKED) >= 2


@pytest.mark.parametrize(("page", "slow"), MARKED)
def test_marked_blocks_run(page, slow, tmp_path):
    """The marked Python blocks of a page, one after the other, as one script in an empty folder."""
    chosen = [b for b in pages.blocks(page) if b.runnable and b.slow == slow and b.language == "python"]
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(block.text for block in chosen))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(pages.ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
