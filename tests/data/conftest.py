"""Where the data tests find real data and golden values; both are optional, and a test that needs them says so."""

import json
import os
import pathlib

import pytest

_REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def data_dir() -> pathlib.Path:
    folder = os.environ.get("T5X_LITE_DATA_DIR")
    if not folder:
        pytest.skip("needs the corpora's official files: set T5X_LITE_DATA_DIR")
    return pathlib.Path(folder)


@pytest.fixture
def golden():
    """Reads a golden JSON file made by the t5 package."""
    folder = pathlib.Path(os.environ.get("T5X_LITE_GOLDEN_DIR", _REPO.parent / "shared" / "golden"))

    def read(name: str):
        path = folder / name
        if not path.exists():
            pytest.skip(f"needs {path}: set T5X_LITE_GOLDEN_DIR")
        return json.loads(path.read_text())

    return read


@pytest.fixture
def bytes_vocabulary():
    """Puts the byte vocabulary in force, so that a test needs no SentencePiece file."""
    from tasks import vocabulary

    vocabulary.set_default("bytes")
    yield vocabulary.default_vocabulary()
    vocabulary.set_default(None)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """An empty data folder in force as T5X_LITE_DATA_DIR."""
    monkeypatch.setenv("T5X_LITE_DATA_DIR", str(tmp_path))
    return tmp_path
