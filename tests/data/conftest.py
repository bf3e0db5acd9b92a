"""Where the data tests find real data; it is optional, and a test that needs it says so and skips."""

import pytest


@pytest.fixture
def bytes_vocabulary():
    """Puts bytes and 100 sentinels in force, so that a test needs no SentencePiece file."""
    from tasks import vocabulary

    vocabulary.set_default("bytes", 100)
    yield vocabulary.default_vocabulary()
    vocabulary.set_default(None)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """An empty data folder in force as T5X_LITE_DATA_DIR."""
    monkeypatch.setenv("T5X_LITE_DATA_DIR", str(tmp_path))
    return tmp_path
