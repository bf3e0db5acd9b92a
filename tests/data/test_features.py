"""Feature-based transfer: pooled features of the encoder, kept on disk, and a linear head with the task's metrics."""

import functools
import json

import numpy as np
import pytest
import seqio
import tiny

from t5x_lite import linear_probe
from t5x_lite.inference.pretrained import LoadedModel
from t5x_lite.model.t5 import T5Config
from tasks import user_files

CONFIG = T5Config(16, 24, 2, 8, 1, 1, vocab_size=384, mlp_activations=("relu",), dtype="float32", dropout_rate=0.0)


@functools.cache
def model():
    return LoadedModel(CONFIG, tiny.random_params(CONFIG))


@pytest.fixture
def task(tmp_path, bytes_vocabulary):
    """Whether a row of letters has more a than b: a mean of features tells, the first letter does not."""
    random = np.random.default_rng(0)
    for split, count in (("train", 400), ("validation", 100)):
        rows = ["".join(random.choice(list("ab"), 9)) for _ in range(count)]
        lines = (json.dumps({"inputs": row, "targets": "many" if row.count("a") > 4 else "few"}) for row in rows)
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return user_files.register_files("letters", str(tmp_path / "train.jsonl"), str(tmp_path / "validation.jsonl"))


def test_features_are_the_mean_over_the_tokens_of_a_row_alone():
    rows = [np.array([5, 6, 7, 1], np.int32), np.array([9, 1], np.int32), np.arange(3, 40, dtype=np.int32)]
    found = linear_probe.features(model(), rows, length=33)
    for row, got in zip(rows, found, strict=True):
        alone = np.asarray(model().encode(row[None, :33]))[0].mean(axis=0)
        np.testing.assert_allclose(got, alone, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_a_head_finds_what_least_squares_finds_and_tells_classes_apart():
    random = np.random.default_rng(1)
    x_MD = random.normal(3, 2, (200, 4)).astype(np.float32)
    y_M = x_MD @ [1.0, -2.0, 0.5, 0.0] + 7
    head = linear_probe.fit(x_MD, [repr(float(y)) for y in y_M], l2=0.0)
    assert head.answers is None
    np.testing.assert_allclose([float(said) for said in head(x_MD)], y_M, atol=0.02)
    words = np.where(x_MD[:, 0] > x_MD[:, 1], "yes", "no")
    head = linear_probe.fit(x_MD, words.tolist())
    assert head.answers == ("no", "yes") and np.mean(np.array(head(x_MD)) == words) > 0.95
    with pytest.raises(ValueError, match="at least two classes"):
        linear_probe.fit(x_MD, ["yes"] * 200)


def test_transfer_beats_the_majority_and_computes_features_once(task, tmp_path, monkeypatch):
    loaded = []

    def load(path):
        loaded.append(path)
        return model()

    monkeypatch.setattr(linear_probe, "load", load)
    scores = linear_probe.transfer("a", task.name, tmp_path / "cache", length=16)
    assert scores["exact_match"] > 80 and loaded == ["a"]
    rows = [json.loads(line) for line in (tmp_path / "cache" / "letters.jsonl").read_text().splitlines()]
    assert len(rows) == 100 and rows[0].keys() == {"inputs", "targets", "prediction"}
    right = np.mean([row["targets"] == row["prediction"] for row in rows])
    assert 100 * right == pytest.approx(scores["exact_match"])

    assert linear_probe.transfer("a", task.name, tmp_path / "cache", length=16) == scores and loaded == ["a"]
    linear_probe.transfer("a", task.name, tmp_path / "cache", length=8)
    linear_probe.transfer("b", task.name, tmp_path / "cache", length=8)
    assert loaded == ["a", "a", "b"]


def test_what_has_no_metrics_or_no_model_is_refused(task, tmp_path, capsys):
    assert linear_probe.main([str(tmp_path), "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert linear_probe.main([str(tmp_path / "none"), task.name]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    seqio.MixtureRegistry.add("letters_mixed", [(task.name, 1.0)])
    with pytest.raises(ValueError, match="give a single task"):
        linear_probe.transfer("a", "letters_mixed", tmp_path)
