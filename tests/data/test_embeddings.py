"""Sentence embeddings from the command line: trained on one's own pairs, evaluated by retrieval, written for a file."""

import json
import random

import numpy as np
import pytest

import t5x_lite
from t5x_lite.cli import main


@pytest.mark.slow
def test_pairs_are_trained_on_evaluated_and_embedded(tmp_path, bytes_vocabulary, same_root_logger):
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(40)]
    rows = [json.dumps({"inputs": f"find {word}", "targets": word.upper()}) for word in words]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    (tmp_path / "texts.txt").write_text("find me\n\nthe third\n")
    run = tmp_path / "run"
    flags = [
        *("--gin_file=tests/tiny.gin", "--gin_file=models/t5_encoder.gin", "--gin_file=runs/finetune_embeddings.gin"),
        *("--gin.INITIAL_CHECKPOINT_PATH=None", "--gin.FILES_OBJECTIVE='text_to_text'", "--gin.VOCABULARY='bytes'"),
        f"--gin.TRAIN_FILES='{tmp_path}/pairs.jsonl'",
        f"--gin.EVAL_FILES='{tmp_path}/pairs.jsonl'",
        *("--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16}", "--gin.t5_encoder.embed_dim=12"),
        *("--gin.TRAIN_STEPS=4", "--gin.WARMUP_STEPS=1", "--gin.EVAL_PERIOD=4", "--gin.CHECKPOINT_PERIOD=4"),
        *("--gin.BATCH_SIZE=16", f"--gin.MODEL_DIR='{run}'", "--gin.DTYPE='float32'"),
    ]
    assert main.main(["run.py", *flags]) == 0
    scores = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert {"retrieval@1", "retrieval@5", "retrieval@10", "mrr", "loss"} <= scores.keys()
    assert 0 <= scores["retrieval@1"] / 100 <= scores["mrr"] / 100 <= 1
    predictions = [json.loads(line) for line in (run / "predictions" / "files-4.jsonl").read_text().splitlines()]
    assert len(predictions) == 40 and {row["prediction"] for row in predictions} <= {word.upper() for word in words}

    config = f"--gin_file={run}/config.gin"
    assert main.main(["run.py", config, "--mode=infer", f"--gin.INFER_INPUT='{tmp_path}/texts.txt'"]) == 0
    written = [json.loads(line) for line in (run / "infer" / "texts-4.jsonl").read_text().splitlines()]
    assert [row["inputs"] for row in written] == ["find me", "", "the third"]
    model = t5x_lite.load(run)
    embeddings = np.array([row["embedding"] for row in written])
    assert embeddings.shape == (3, 12)
    np.testing.assert_allclose(model.embed(["find me", "", "the third"]), embeddings, atol=1e-5)
    assert main.main(["run.py", config, "--mode=score", f"--gin.INFER_INPUT='{tmp_path}/texts.txt'"]) == 2
