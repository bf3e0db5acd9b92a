"""A model and its run, uploaded to the Hugging Face hub by its real client, to a server of the tests."""

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

import hub_server
import numpy as np
import pytest
import tiny
import yaml

import t5x_lite
from t5x_lite import checkpoint, convert
from t5x_lite.checkpoint import saving
from t5x_lite.convert import push
from t5x_lite.errors import UserError
from t5x_lite.report import model_card

# The client's own, about its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
constants = pytest.importorskip("huggingface_hub.constants")

CONFIG = """
BATCH_SIZE = 8
FILES_INPUTS_TEMPLATE = '/review | {text}'
FILES_TARGETS_TEMPLATE = '{label}'
INITIAL_CHECKPOINT_PATH = 'start'
LEARNING_RATE = 0.001
MIXTURE_OR_TASK_NAME = None
MODEL_DIR = '/home/me/secret/reviews'
OPTIMIZER = @adafactor()
TASK_FEATURE_LENGTHS = {'inputs': 64,
 'targets': 8}
TRAIN_FILES = \\
    ['/home/me/secret/reviews.csv',
     'gs://secret/more '
     'reviews.csv',
     'hf://datasets/me/reviews/a.csv']
TRAIN_STEPS = 30
VOCABULARY = '~/secret/spiece.model'
"""
RECORDS = [
    {"step": step, "split": "validation", "task": "reviews", "loss": loss, "accuracy": accuracy}
    for step, loss, accuracy in [(10, 2.0, 50.0), (20, 1.5, 75.5), (30, 1.25, 61.0), (40, 0.5, 99.0)]
]


@pytest.fixture
def model_dir(golden_t5, tmp_path):
    """A MODEL_DIR whose checkpoint is of step 30; an evaluation of step 40 is of a later one."""
    run = tmp_path / "secret" / "reviews"
    saving.save_params(run / "checkpoints" / "30", golden_t5.params, info=convert.info(golden_t5.config))
    (run / "config.gin").write_text(CONFIG)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return run


@pytest.fixture
def client(monkeypatch, tmp_path):
    """Directs the hub's client to an address, with a token that may write and a cache of its own."""
    monkeypatch.setenv("HF_TOKEN", hub_server.WRITER)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def directed(address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return directed


def test_what_is_pushed_is_loaded_by_its_name(model_dir, golden_t5, client, tmp_path, capsys):
    files, requests = {}, []
    with hub_server.serving("models", "me/tiny", files, requests) as address:
        client(address)
        assert push.main([str(model_dir), "me/tiny", "--private", "--revision=best", "--message=First"]) == 0
        loaded = t5x_lite.load("me/tiny")
    assert capsys.readouterr().out == f"{address}/me/tiny/tree/best\n"
    assert set(files) == {".gitattributes", "config.json", "model.safetensors", "README.md", "config.gin"}
    inputs = golden_t5.batch["encoder_input_tokens"], golden_t5.batch["decoder_input_tokens"]
    real = golden_t5.io["targets"] != 0
    np.testing.assert_allclose(loaded.logits(*inputs)[real], golden_t5.io["logits"][real], atol=1e-4)
    bodies = dict(requests)
    assert bodies["/api/repos/create"]["visibility"] == "private"
    assert bodies["/api/models/me/tiny/commit/best"]["value"]["summary"] == "First"
    assert not list(tmp_path.glob("t5x_lite_push_*"))

    card = files["README.md"].decode()
    assert "secret" not in card and str(tmp_path) not in card
    _, front, _ = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "datasets": ["me/reviews"],
        "tags": ["t5", "t5x_lite"],
    }
    parameters = sum(x.size for x in convert.tensors.flat(golden_t5.params).values())
    for expected in (
        f"T5ForConditionalGeneration: {parameters:,} parameters, from step 30 of a run of t5x_lite.",
        f"| d_model | {golden_t5.config.d_model} |",
        "model = T5ForConditionalGeneration.from_pretrained('me/tiny', revision='best')",
        "model = t5x_lite.load('me/tiny@best')",
        "| reviews | accuracy | 61 (step 30) | 75.5 (step 20) |",
        "| reviews | loss | 1.25 (step 30) | 1.25 (step 30) |",
        r"| FILES_INPUTS_TEMPLATE | `/review \| {text}` |",
        "| TRAIN_FILES | `['reviews.csv', 'more reviews.csv', 'hf://datasets/me/reviews/a.csv']` |",
        "| TASK_FEATURE_LENGTHS | `{'inputs': 64, 'targets': 8}` |",
        "| VOCABULARY | spiece.model |",
        "python run.py --gin_file=config.gin\n",
        "python -m t5x_lite.convert me/tiny@best start --to=t5x_lite\n",
    ):
        assert expected in card, expected
    assert "None" not in card and "tokenizer" not in card


def test_the_uploaded_config_differs_only_in_paths():
    text = model_card.without_paths(CONFIG)
    assert "secret" not in text
    before, after = model_card.settings(CONFIG), model_card.settings(text)
    assert {name for name in before if before[name] != after[name]} == {"MODEL_DIR", "TRAIN_FILES", "VOCABULARY"}
    assert (after["MODEL_DIR"], after["OPTIMIZER"]) == ("reviews", "@adafactor()")
    assert after["FILES_INPUTS_TEMPLATE"] == "/review | {text}"


def test_the_base_is_known_from_the_conversion(golden, model_dir, client):
    base = {file.name: file.read_bytes() for file in golden("hf_t5_v11").glob("*.[js]*")}
    with hub_server.serving("models", "google/tiny", base) as address:
        client(address)
        convert.convert("google/tiny@v1", "start", "t5x_lite")
    files = {}
    with hub_server.serving("models", "me/tiny", files) as address:
        client(address)
        push.push(model_dir / "checkpoints" / "30", "me/tiny")
    assert 'base_model: "google/tiny"\n' in files["README.md"].decode()


def test_lora_is_pushed_as_peft_for_its_base(golden_t5, client, tmp_path):
    config = dataclasses.replace(golden_t5.config, lora_rank=3)
    params = tiny.random_params(config)
    lora = {name: x for name, x in convert.tensors.flat(params).items() if "_lora/" in name}
    saving.save_params(tmp_path / "base", golden_t5.params, info=convert.info(golden_t5.config))
    info = convert.info(config) | {"base": checkpoint.base_of(tmp_path / "base")}
    saving.save_params(tmp_path / "own", checkpoint.nested(lora), info=info)
    files = {}
    with hub_server.serving("models", "me/lora", files) as address:
        client(address)
        with pytest.raises(UserError, match="needs --base=NAME"):
            push.push(tmp_path / "own", "me/lora", to="peft")
        with pytest.raises(UserError, match="is a path"):
            push.push(tmp_path / "own", "me/lora", to="peft", base=str(tmp_path))
        push.push(tmp_path / "own", "me/lora", to="peft", base="google/t5-v1_1-small")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < set(files)
    card = files["README.md"].decode()
    assert 'library_name: "peft"\nbase_model: "google/t5-v1_1-small"' in card
    assert f"LoRA parameters of google/t5-v1_1-small: {sum(x.size for x in lora.values()):,} parameters" in card
    assert "PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained('google/t5-v1_1-small'), 'me/lora')" in card


def test_a_card_of_ones_own_is_kept(golden, client, tmp_path):
    shutil.copytree(golden("hf_t5_v11"), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\nMine")
    files = {".gitattributes": b"", "README.md": b"old", "notes.txt": b"stay"}
    with hub_server.serving("models", "me/tiny", files) as address:
        client(address)
        push.push(tmp_path / "model", "me/tiny")
    assert files["README.md"] == b"---\nlicense: mit\n---\nMine"
    assert files["notes.txt"] == b"stay" and "model.safetensors" in files


def test_mistakes_are_one_line_with_the_cure(golden, client, tmp_path, monkeypatch, capsys):
    model = str(golden("hf_t5_v11"))

    def says(*arguments, source=model):
        assert push.main([source, *arguments]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("t5x_lite.convert.push: ")
        return line

    files = {}
    with hub_server.serving("models", "me/tiny", files) as address:
        client(address)
        assert "give OWNER/NAME" in says("tiny")
        assert "is not a model" in says("me/tiny", source=str(tmp_path))
        monkeypatch.setenv("HF_TOKEN", hub_server.READER)
        line = says("me/tiny")
        assert "me/tiny cannot" in line and "may not write there: log in with `hf auth login`, or set HF_TOKEN" in line
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert "no valid token: log in with `hf auth login`" in says("me/tiny")
        monkeypatch.delenv("HF_TOKEN")
        assert "no valid token: log in with `hf auth login`" in says("me/tiny")
        assert not files
        monkeypatch.setenv("HF_TOKEN", hub_server.WRITER)
        assert "may write to you" in says("you/tiny")
        files[".gitattributes"] = b""
        assert "me/tiny exists on the Hugging Face hub and is public" in says("me/tiny", "--private")
    assert "me/tiny cannot be written" in (line := says("me/tiny")) and "HF_ENDPOINT" in line
    with hub_server.serving("datasets", "me/tiny", {"data.csv": b"a"}) as address:
        client(address)
        assert "no model of that name" in says("me/tiny")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "To write me/tiny on the Hugging Face hub: pip install 't5x_lite[hub]'" in says("me/tiny")
    assert not list(Path(tmp_path).glob("t5x_lite_push_*"))
