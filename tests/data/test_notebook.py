"""The notebook runs from top to bottom, on a CPU and at small size, and is committed without output."""

import json
import pathlib
import sys

import forks
import nbclient
import nbformat
import pytest
from data.test_readme import write_t5

NOTEBOOK = pathlib.Path(__file__).parents[2] / "docs" / "notebooks" / "finetune.ipynb"


def test_no_output_is_committed():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")


@pytest.mark.slow
def test_from_a_hugging_face_folder_to_a_trained_model_and_back(tmp_path, monkeypatch):
    write_t5(tmp_path / "theirs", vocab_size=384)  # without a tokenizer file, it is ByT5's vocabulary
    environment = {"CHECKPOINT": "theirs", "CSV": "", "STEPS": "3", "MODEL_DIR": "tuned"}
    environment |= forks.devices(1) | {
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{pathlib.Path(sys.executable).parent}:/usr/bin:/bin",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "rows to train on" in printed and "describe: " in printed and "model.safetensors" in printed
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert "image/png" in shown and "text/html" in shown
    assert (tmp_path / "tuned" / "report.html").exists() and (tmp_path / "tuned-huggingface" / "config.json").exists()
