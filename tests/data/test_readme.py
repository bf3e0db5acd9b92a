"""The README's commands that go from a pre-trained model to answers do so, at small size, on the real files."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from t5x_lite.bert import BertConfig
from t5x_lite.bert.network import Bert
from t5x_lite.convert import huggingface
from t5x_lite.model.t5 import T5, T5Config

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
    "T5Config.dtype": "'float32'",
    "BATCH_SIZE": 4,
    "TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 8}",
    "TRAIN_STEPS": 2,
    "EVAL_EXAMPLES": 8,
    "EVAL_STEPS": 1,
}


def commands(heading: str) -> list[str]:
    """The shell commands of the first code block under a heading, without comments."""
    text = (ROOT / "README.md").read_text().split(f"# {heading}\n", 1)[1]
    block = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert block is not None
    lines = block[1].replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def carried_out(command: str, folder: pathlib.Path, options: dict[str, object]) -> str:
    """What the command prints, in `folder`; `options` are gin bindings for those that take them."""
    python = shlex.quote(sys.executable)
    command = command.replace("python run.py", f"{python} {ROOT}/run.py").replace("python -m", f"{python} -m")
    if "run.py" in command:
        command += "".join(f" {shlex.quote(f'--gin.{name}={value}')}" for name, value in options.items())
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_question_answering_in_four_steps(tmp_path, data_dir):
    config = T5Config(32, 48, 2, 16, 2, 2, vocab_size=32128, mlp_activations=("gelu", "linear"), tie_embeddings=False)
    tokens = jnp.ones((1, 1), jnp.int32)
    params = T5(config).init(jax.random.key(0), tokens, tokens)["params"]
    pretrained = tmp_path / "t5-v1_1-small"
    pretrained.mkdir()
    huggingface.write(pretrained, config, nn.meta.unbox(params))
    shutil.copyfile(data_dir / "vocab" / "sentencepiece.model", pretrained / "spiece.model")

    load, look, train, ask = commands("Question answering in four steps")
    carried_out(load, tmp_path, SMALL)
    assert "question: " in carried_out(look, tmp_path, SMALL)
    carried_out(train, tmp_path, SMALL)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "qa" / "metrics.jsonl").read_text().splitlines()]
    (scores,) = [row for row in rows if row["split"] == "validation"]
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

    load, look, train, write, ask = commands("BERT on a pair of sentences, in four steps")
    small = {"BATCH_SIZE": 4, "TASK_FEATURE_LENGTHS": "{'inputs': 64}", "TRAIN_STEPS": 2, "EVAL_EXAMPLES": 8}
    small |= {"WARMUP_STEPS": 1, "EVAL_STEPS": 1}
    carried_out(load, tmp_path, small)
    assert "[CLS]" in carried_out(look, tmp_path, small)
    carried_out(train, tmp_path, small)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "mrpc" / "metrics.jsonl").read_text().splitlines()]
    (scores,) = [row for row in rows if row["split"] == "validation"]
    assert scores["step"] == 2 and 0 <= scores["accuracy"] <= 100 and "f1" in scores
    carried_out(write, tmp_path, {})
    carried_out(ask, tmp_path, {})
    (answers,) = (tmp_path / "runs" / "mrpc" / "infer").glob("*.jsonl")
    assert json.loads(answers.read_text())["prediction"] in ("equivalent", "not_equivalent")
