"""T5Gemma through the command: a folder of Hugging Face, UL2's denoisers on one's own text, a stop, and back."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.test_readme import lines_of_text
from models import CONFIGS
from safetensors.numpy import load_file

from t5x_lite import convert
from t5x_lite.cli import main
from t5x_lite.convert import huggingface
from t5x_lite.metrics import metric_logger


def losses(model_dir: Path) -> dict[int, float]:
    records = metric_logger.read_metrics(model_dir)
    return {record["step"]: record["loss"] for record in records if record["split"] == "train"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("T5Gemma", marks=pytest.mark.exhaustive), "T5Gemma 2"])
def test_ul2_continues_a_checkpoint_and_a_stop_changes_no_bit(name, tmp_path, monkeypatch, same_root_logger):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(CONFIGS[name], vocab_size=384)
    params = config.network().init(jax.random.key(0), *(jnp.ones((1, 4), jnp.int32),) * 2)["params"]
    Path("hub").mkdir()
    huggingface.write(Path("hub"), config, nn.meta.unbox(params))
    convert.convert("hub", "start", "t5x_lite")
    Path("text.txt").write_text("\n".join(lines_of_text()[:1000]))

    settings = {
        "INITIAL_CHECKPOINT_PATH": "'start'",
        "MIXTURE_OR_TASK_NAME": "'files'",
        "TRAIN_FILES": "'text.txt'",
        "FILES_OBJECTIVE": "'ul2r'",
        "VOCABULARY": "'bytes'",
        "VOCABULARY_EXTRA_IDS": 100,
        "TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 64}",
        "BATCH_SIZE": 8,
        "DTYPE": "'float32'",
        "DROPOUT_RATE": 0.1,
        "LEARNING_RATE": 0.01,
        "WARMUP_STEPS": 1,
        "LOG_PERIOD": 1,
        "EVAL_PERIOD": 0,
        "CHECKPOINT_PERIOD": 3,
    }

    def train(model_dir: str, steps: int) -> None:
        flags = [f"--gin.{key}={value}" for key, value in (settings | {"TRAIN_STEPS": steps}).items()]
        files = ["--gin_file=start/model.gin", "--gin_file=runs/continue_ul2.gin"]
        assert main.main(["run.py", *files, *flags, f"--gin.MODEL_DIR='{model_dir}'"]) == 0

    train("whole", 6)
    train("parts", 3)
    train("parts", 6)
    whole = losses(Path("whole"))
    assert losses(Path("parts")) == whole and list(whole) == list(range(1, 7))
    assert whole[6] < whole[1] - 0.3

    convert.convert("whole", "back", "huggingface")
    before, after = (load_file(Path(folder, "model.safetensors")) for folder in ("hub", "back"))
    assert before.keys() == after.keys()
    assert any(np.abs(after[key] - before[key]).max() > 0.01 for key in before)
