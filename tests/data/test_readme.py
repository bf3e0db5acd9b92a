"""The commands of README and guides that go from data to a model do so, at small size."""

import json
import os
import pathlib
import pydoc_data.topics
import shlex
import shutil
import subprocess

import flax.linen as nn
import forks
import jax
import jax.numpy as jnp
import pytest
from pages import GUIDES, README, ROOT, blocks, commands

from t5x_lite.bert import BertConfig
from t5x_lite.bert.network import Bert
from t5x_lite.convert import huggingface
from t5x_lite.model.t5 import T5, T5Config
from tasks import vocabulary

SMALL = {
    "T5Config.dtype": "'float32'",
    "BATCH_SIZE": 4,
    "TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 8}",
    "TRAIN_STEPS": 2,
    "EVAL_EXAMPLES": 8,
    "EVAL_STEPS": 1,
}
# In the place of a model file's sizes.
TINY = {"d_model": 32, "d_ff": 48, "num_heads": 2, "head_dim": 16, "num_encoder_layers": 2, "num_decoder_layers": 2}
TINY = {f"T5Config.{name}": value for name, value in TINY.items()}


def carried_out(command: str, folder: pathlib.Path, options: dict[str, object]) -> str:
    """What the command prints, in `folder`; `options` are gin bindings for those that take them."""
    python = shlex.join(forks.python())
    command = command.replace("python run.py", f"{python} {ROOT}/run.py").replace("python -m", f"{python} -m")
    if "run.py" in command:
        command += "".join(f" {shlex.quote(f'--gin.{name}={value}')}" for name, value in options.items())
    environment = os.environ | forks.devices(1) | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def write_t5(folder: pathlib.Path, vocab_size: int = 32128) -> None:
    """A Hugging Face folder of a tiny T5 1.1 with random weights, without a tokenizer."""
    config = T5Config(
        32, 48, 2, 16, 2, 2, vocab_size=vocab_size, mlp_activations=("gelu", "linear"), tie_embeddings=False
    )
    tokens = jnp.ones((1, 1), jnp.int32)
    params = T5(config).init(jax.random.key(0), tokens, tokens)["params"]
    folder.mkdir()
    huggingface.write(folder, config, nn.meta.unbox(params))


def lines_of_text() -> list[str]:
    """Plain text that ships with every Python."""
    topics = pydoc_data.topics.topics
    lines = [line.strip() for topic in sorted(topics) for line in topics[topic].splitlines()]
    return [line for line in lines if len(line) > 20]


def validation_scores(model_dir: pathlib.Path) -> dict[str, float]:
    """Of the only evaluation."""
    rows = [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]
    (scores,) = [row for row in rows if row["split"] == "validation"]
    return scores


@pytest.mark.slow
def test_fine_tune_a_checkpoint_then_use_it(tmp_path):
    """README, and the guides on inference, decoding and watching, which use its model."""
    rows = ["text,label", '"A warm, funny film, and never dull.",positive', "Two hours that I want back.,negative"]
    for name in ("reviews.csv", "check.csv"):
        (tmp_path / name).write_text("\n".join(rows) + "\n")
    pretrained = tmp_path / "flan-t5-small"
    write_t5(pretrained, vocab_size=512)
    vocabulary.train(iter(lines_of_text()), str(pretrained / "spiece.model"), 400)

    heading = "Fine-tune a checkpoint that you have"
    (tmp_path / "reviews.gin").write_text(blocks(README, "python", heading)[0])
    load, look, train, write, ask = commands(README, heading)
    carried_out(load, tmp_path, SMALL)
    assert "review: A warm, funny film" in carried_out(look, tmp_path, SMALL)
    carried_out(train, tmp_path, SMALL)
    scores = validation_scores(tmp_path / "runs" / "reviews")
    assert scores["step"] == 2 and 0 <= scores["exact_match"] <= scores["f1"] <= 100
    carried_out(write, tmp_path, SMALL)
    assert (tmp_path / "reviews-t5" / "config.json").exists() and (tmp_path / "reviews-t5" / "spiece.model").exists()
    assert len(carried_out(ask, tmp_path, SMALL).splitlines()) == 1

    for command in (c for page in ("inference", "decoding", "watching") for c in commands(GUIDES / f"{page}.md")):
        carried_out(command, tmp_path, {})
    for name in ("answers", "beams"):
        assert len((tmp_path / f"{name}.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "scores.jsonl").read_text())["score"] < 0
    assert (tmp_path / "exported" / "predict.jax_export").exists() and (tmp_path / "mine" / "config.json").exists()


@pytest.mark.slow
def test_pre_training_from_raw_text(tmp_path):
    lines = lines_of_text()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train-0.txt").write_text("\n".join(lines[100:]) + "\n")
    (tmp_path / "text" / "check.txt").write_text("\n".join(lines[:100]) + "\n")
    page, heading = GUIDES / "pretraining.md", "In your language, from raw text to a model"
    learn, check, look, train, write = commands(page, heading)
    small = SMALL | TINY | {"TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 16}", "T5Config.vocab_size": 640}
    assert "--size=32000" in learn
    carried_out(learn.replace("--size=32000", "--size=500"), tmp_path, {})
    assert "600 ids with 100 sentinels" in carried_out(check, tmp_path, {})
    assert "<extra_id_0>" in carried_out(look, tmp_path, small)
    carried_out(train, tmp_path, small)
    assert validation_scores(tmp_path / "runs" / "mine")["loss"] > 0
    carried_out(write, tmp_path, {})
    assert json.loads((tmp_path / "mine-t5" / "config.json").read_text())["vocab_size"] == 640


@pytest.mark.slow
def test_own_data(tmp_path):
    make, train, make_questions, look, make_text, pretrain = commands(GUIDES / "own-data.md")
    small = SMALL | TINY | {"VOCABULARY": "'bytes'", "T5Config.vocab_size": 384}
    carried_out(make, tmp_path, {})
    carried_out(train, tmp_path, small)
    carried_out(make_questions, tmp_path, {})
    assert "question: Who wrote the notes? context: Ada" in carried_out(look, tmp_path, small)
    carried_out(make_text, tmp_path, {})
    lengths = {"TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 64}", "VOCABULARY_EXTRA_IDS": 100}
    assert "[X]" in carried_out(pretrain, tmp_path, small | lengths)


@pytest.mark.slow
def test_mixtures_and_vocabularies(tmp_path):
    *shown, make_news, make_chat, mix = commands(GUIDES / "mixtures.md")
    for command in shown:
        assert "passes over the data" in carried_out(command, tmp_path, {})
    for command in (make_news, make_chat):
        carried_out(command, tmp_path, {})
    small = SMALL | TINY | {"VOCABULARY": "'bytes'", "T5Config.vocab_size": 384}
    assert "title: Rain" in carried_out(
        mix, tmp_path, small | {"TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 32}"}
    )
    (tmp_path / "data").mkdir()
    rows = (json.dumps({"text": line}) + "\n" for line in lines_of_text())
    (tmp_path / "data" / "a.jsonl").write_text("".join(rows))
    learn, check = commands(GUIDES / "vocabularies.md")
    carried_out(learn.replace("--size=8000", "--size=500"), tmp_path, {})
    assert "500 pieces" in carried_out(check, tmp_path, {})


@pytest.mark.slow
def test_question_answering_in_four_steps(tmp_path, data_dir):
    pretrained = tmp_path / "t5-v1_1-small"
    write_t5(pretrained)
    shutil.copyfile(data_dir / "vocab" / "sentencepiece.model", pretrained / "spiece.model")

    page = GUIDES / "finetuning.md"
    load, look, train, ask = commands(page, "Question answering in four steps")
    carried_out(load, tmp_path, SMALL)
    assert "question: " in carried_out(look, tmp_path, SMALL)
    carried_out(train, tmp_path, SMALL)
    scores = validation_scores(tmp_path / "runs" / "qa")
    assert scores["step"] == 2 and 0 <= scores["em"] <= scores["f1"] <= 100
    answers = carried_out(ask, tmp_path, SMALL).splitlines()
    assert len(answers) == 1


@pytest.mark.slow
def test_bert_on_a_pair_of_sentences_in_four_steps(tmp_path, data_dir):
    pretrained = tmp_path / "bert-base-uncased"
    pretrained.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-$"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (pretrained / "vocab.txt").write_text("\n".join(pieces) + "\n")
    config = BertConfig(32, 48, 2, 2, vocab_size=len(pieces), max_length=64)
    params = Bert(config).init(jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
    huggingface.write(pretrained, config, nn.meta.unbox(params))

    page = GUIDES / "bert.md"
    load, look, train, write, ask = commands(page, "A pair of sentences, in four steps")
    small = {"BATCH_SIZE": 4, "TASK_FEATURE_LENGTHS": "{'inputs': 64}", "TRAIN_STEPS": 2, "EVAL_EXAMPLES": 8}
    small |= {"WARMUP_STEPS": 1, "EVAL_STEPS": 1}
    carried_out(load, tmp_path, small)
    assert "[CLS]" in carried_out(look, tmp_path, small)
    carried_out(train, tmp_path, small)
    scores = validation_scores(tmp_path / "runs" / "mrpc")
    assert scores["step"] == 2 and 0 <= scores["accuracy"] <= 100 and "f1" in scores
    carried_out(write, tmp_path, {})
    carried_out(ask, tmp_path, {})
    (answers,) = (tmp_path / "runs" / "mrpc" / "infer").glob("*.jsonl")
    assert json.loads(answers.read_text())["prediction"] in ("equivalent", "not_equivalent")
