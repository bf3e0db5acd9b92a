"""Models by their name on the Hugging Face hub: downloaded once, then read from its cache; mistakes are one line."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import hub_server
import pytest

from t5x_lite.convert import hub
from t5x_lite.errors import MissingPackageError

ROOT = Path(__file__).resolve().parents[2]

LOAD = """
import sys
from t5x_lite import convert
from t5x_lite.convert import hub
from t5x_lite.errors import UserError
for name in sys.argv[1:]:
    try:
        folder = hub.located(name)
        print(folder, sorted(path.name for path in folder.iterdir()), convert.read(folder)[0].d_model)
    except UserError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_model_is_downloaded_and_later_found_in_the_cache(golden, tmp_path):
    model = {name: (golden("hf_t5_v11") / name).read_bytes() for name in ("config.json", "model.safetensors")}
    size = json.loads(model["config.json"])["d_model"]
    files = model | {"pytorch_model.bin": b"not needed", "README.md": b"x", "tokenizer_config.json": b"{}"}
    settings = {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}

    def load(*names):
        command, environment = [sys.executable, "-c", LOAD, *names], os.environ | settings
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert not done.returncode, done.stderr
        return done.stdout.splitlines()

    with hub_server.serving("models", "me/tiny-t5", files) as settings["HF_ENDPOINT"]:
        first, versioned, unknown = load("me/tiny-t5", "me/tiny-t5@v1", "me/other")
    assert first.endswith(
        f"snapshots/{hub_server.SHA} ['config.json', 'model.safetensors', 'tokenizer_config.json'] {size}"
    )
    assert versioned == first
    assert unknown.startswith(
        "MissingFileError 'me/other' does not exist here, and cannot be read from the Hugging Face hub"
    )
    again, new = load("me/tiny-t5", "me/new")
    assert again == first
    assert new.startswith("MissingFileError") and "Check the name and the network" in new


def test_a_part_of_a_model_in_the_cache_is_not_a_model(tmp_path):
    client = types.SimpleNamespace(snapshot_download=lambda *names, **options: str(tmp_path))

    def holds(**files):
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text)
        return hub._cached(client, "me/mine", None) == tmp_path

    assert not holds(config__json="{}") and holds(model__safetensors="")
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    assert not holds(model__safetensors__index__json=index, one__safetensors="") and holds(two__safetensors="")


def test_paths_here_are_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "runs").mkdir()
    for path in (
        "runs/mistyped",
        "runs",
        "./me/mine",
        "~/me/mine",
        "me/mine/5000",
        str(tmp_path / "x"),
    ):
        assert hub.located(path) == Path(path).expanduser()
    assert str(hub.located("gs://me/mine/")) == "gs://me/mine"
    with pytest.raises(MissingPackageError, match=r"'me/mine' does not exist here.*pip install 't5x_lite\[hub\]'"):
        hub.located("me/mine")
