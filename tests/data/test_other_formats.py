"""Runs that start from a model in another format: Hugging Face's folders and PEFT's, given as they are."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import t5x_lite
from t5x_lite import convert
from t5x_lite.cli import main
from t5x_lite.convert import tensors

SIZES = {"d_model": 12, "d_ff": 14, "num_heads": 2, "head_dim": 4, "num_encoder_layers": 3, "num_decoder_layers": 1}
TEXTS = ["find the river", "who wrote it?", "Ünïcode"]


@pytest.fixture
def byt5(golden, tmp_path):
    folder = shutil.copytree(golden("families") / "byt5", tmp_path / "byt5")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    return folder


@pytest.fixture
def flags(byt5, tmp_path):
    rows = [{"inputs": text, "targets": text[:4]} for text in TEXTS * 4]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    sizes = [f"--gin.T5Config.{name}={value}" for name, value in SIZES.items()]
    return [
        *("--gin_file=tests/tiny.gin", "--gin_file=runs/finetune.gin", *sizes),
        *("--gin.T5Config.vocab_size=384", "--gin.T5Config.mlp_activations=('gelu', 'linear')"),
        *("--gin.T5Config.relative_buckets=32", "--gin.T5Config.relative_max_distance=128"),
        *(f"--gin.INITIAL_CHECKPOINT_PATH='{byt5}'", f"--gin.TRAIN_FILES='{tmp_path}/rows.jsonl'"),
        *("--gin.FILES_OBJECTIVE='text_to_text'", "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}"),
        *("--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=8", "--gin.CHECKPOINT_PERIOD=2", "--gin.EVAL_PERIOD=100"),
        *(f"--gin.MODEL_DIR='{tmp_path}/run'", "--gin.DTYPE='float32'", f"--gin.INFER_INPUT='{tmp_path}/texts.txt'"),
    ]


@pytest.mark.slow
def test_a_hugging_face_folder_is_a_start_and_a_model_to_ask(byt5, flags, tmp_path, capsys, same_root_logger):
    output = tmp_path / "answers.jsonl"
    assert main.main(["run.py", *flags, "--mode=infer", f"--gin.INFER_OUTPUT='{output}'"]) == 0
    answers = [json.loads(line)["prediction"] for line in output.read_text().splitlines()]
    assert answers == t5x_lite.load(byt5).predict(TEXTS, max_length=16)

    lr = "--gin.LEARNING_RATE=1e-9"
    assert main.main(["run.py", *flags, lr]) == 0
    said = capsys.readouterr().err
    assert f"with the parameters of {byt5}, INITIAL_CHECKPOINT_PATH" in said
    (_, trained), (_, given) = convert.read(tmp_path / "run"), convert.read(byt5)
    for name, value in tensors.flat(given).items():
        np.testing.assert_allclose(tensors.flat(trained)[name], value, atol=1e-6, err_msg=name)

    other = [*flags, "--gin.T5Config.mlp_activations=('silu', 'linear')", f"--gin.MODEL_DIR='{tmp_path}/other'"]
    assert main.main(["run.py", *other]) == 0
    said = capsys.readouterr().err
    assert "another T5Config: mlp_activations = ['gelu', 'linear'] there, ['silu', 'linear'] in this run" in said


def test_what_does_not_fit_is_listed(flags, tmp_path, capsys, same_root_logger):
    assert main.main(["run.py", *flags, "--gin.T5Config.d_ff=20", f"--gin.MODEL_DIR='{tmp_path}/no'"]) == 2
    said = capsys.readouterr().err
    assert "encoder/layers/mlp/wo/kernel: checkpoint [3, 14, 12], this run [3, 20, 12]" in said
    assert "model.d_ff: checkpoint 14, this run 20" in said
    assert main.main(["run.py", *flags, "--gin.TRAIN_STEPS=None", "--gin.TOTAL_TRAIN_STEPS=9"]) == 2
    assert "holds no checkpoint with a step: set TRAIN_STEPS" in capsys.readouterr().err


@pytest.mark.slow
def test_lora_on_a_folder_and_a_lora_folder_itself(byt5, flags, tmp_path, capsys, same_root_logger):
    lora = [*flags, "--gin_file=adapt/lora.gin", "--gin.T5Config.lora_rank=2", "--gin.LEARNING_RATE=0.1"]
    assert main.main(["run.py", *lora]) == 0
    said = capsys.readouterr().err
    assert f"Checkpoints hold all parameters, for {byt5} is in another format" in said
    assert main.main(["run.py", *lora, "--gin.TRAIN_STEPS=4"]) == 0
    convert.convert(tmp_path / "run", tmp_path / "of_whole", "peft", str(byt5))
    assert main.main(["run.py", *lora, "--gin.FROZEN_DTYPE='int8'", f"--gin.MODEL_DIR='{tmp_path}/int8'"]) == 2

    convert.convert(byt5, tmp_path / "start", "t5x_lite")
    first = [*lora, f"--gin.INITIAL_CHECKPOINT_PATH='{tmp_path}/start'", f"--gin.MODEL_DIR='{tmp_path}/first'"]
    assert main.main(["run.py", *first]) == 0
    in_int8 = t5x_lite.load(tmp_path / "first", params_dtype="int8")
    assert {str(x.dtype) for x in tensors.flat(in_int8.params).values()} == {"int8", "float32", "bfloat16"}
    assert in_int8.predict(TEXTS, max_length=4)
    convert.convert(tmp_path / "first", tmp_path / "peft", "peft", str(byt5))
    again = [*lora, f"--gin.INITIAL_CHECKPOINT_PATH='{tmp_path}/peft'", f"--gin.MODEL_DIR='{tmp_path}/again'"]
    assert main.main(["run.py", *again, "--gin.LEARNING_RATE=1e-9"]) == 0
    (_, one), (_, other) = convert.read(tmp_path / "first"), convert.read(tmp_path / "again")
    moved = [name for name in tensors.flat(one) if name.endswith("_lora/b/kernel")]
    assert moved and all(np.asarray(tensors.flat(one)[name]).any() for name in moved)
    for name, value in tensors.flat(one).items():
        np.testing.assert_allclose(tensors.flat(other)[name], value, atol=1e-6, err_msg=name)
    assert load_file(tmp_path / "peft" / "adapter_model.safetensors")
