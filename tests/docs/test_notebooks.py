"""The notebooks run from beginning to end, and reach what they say; they are stored without outputs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.docs import pages

NOTEBOOKS = sorted((pages.ROOT / "notebooks").glob("*.ipynb"))
# Evaluated in the notebook's own kernel once its last cell has run.
REACHED = {
    "classify": "accuracy[1.0] > accuracy[0.0] + 0.3 and deviation < 1e-4",
    "segment": "iou > 0.25 and not torch.equal(masks(0.0), found) and labels.shape == (300, 300)",
    "text_to_image": "moved > 0.01 and (RUN / 'lora' / 'pytorch_lora_weights.safetensors').is_file()",
    "text_to_video": "moved > 0.01 and (RUN / 'motion' / 'pytorch_lora_weights.safetensors').is_file()",
    "class_incremental": "accuracy > 0.2 and deviation < 1e-3",
}


def test_each_has_its_check():
    assert {notebook.stem for notebook in NOTEBOOKS} == set(REACHED)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_stored(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # minutes, on a machine that does nothing else
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(notebook, tmp_path, monkeypatch):
    reason = "runs notebooks: pip install 'visadapt[docs]'"
    pytest.importorskip("ipykernel", reason=reason)
    client = pytest.importorskip("nbclient", reason=reason)
    import nbformat

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    content = nbformat.read(notebook, as_version=4)
    content.cells.append(nbformat.v4.new_code_cell(f"assert {REACHED[notebook.stem]}"))
    client.NotebookClient(
        content, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in content.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    nbformat.write(content, tmp_path / "executed.ipynb")  # for whoever looks into a failure
