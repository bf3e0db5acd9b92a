"""Every task's metrics, and nothing of the rows that only fill up a batch."""

import json
import logging

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.data import packing, pipeline
from t5x_lite.inference import evaluator
from tasks import metrics

VOCABULARY = seqio.ByteVocabulary()
FEATURES = {k: seqio.Feature(VOCABULARY, add_eos=True) for k in ("inputs", "targets")}
LENGTHS = {"inputs": 8, "targets": 6}
WORDS = ["one", "two", "three", "four", "five"]
LONG_WORDS = ["ab" * n for n in (1, 90, 2, 200, 3, 4, 40, 5, 6)]


def accuracy(targets, predictions):
    return {"accuracy": np.float32(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]) * 100)}


def likelihood(targets, scores):
    return {"likelihood": seqio.metrics.Scalar(float(np.mean(scores))), "note": seqio.metrics.Text("not a number")}


def confidence(targets, predictions, aux_values):
    assert len(aux_values["scores"]) == len(predictions) == len(targets)
    return {"confidence": np.mean(aux_values["scores"])}


def register(name, metric_fns, splits=("validation",), postprocess_fn=None, words=WORDS):
    def read(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"inputs": words, "targets": [w.upper() for w in words]})

    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(read, splits=splits),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features=FEATURES,
        metric_fns=metric_fns,
        postprocess_fn=postprocess_fn,
    )


@pytest.fixture(scope="module", autouse=True)
def registered():
    register("eval_test_all", [accuracy, likelihood, confidence])
    register("eval_test_first", [accuracy], postprocess_fn=lambda text, example, is_target: text[0])
    register("eval_test_train_only", [accuracy], splits=("train",))
    register("eval_test_unmeasured", [])
    register("eval_test_lengths", [accuracy, likelihood], words=LONG_WORDS)
    names = ["eval_test_all", "eval_test_first", "eval_test_train_only", "eval_test_unmeasured"]
    seqio.MixtureRegistry.add("eval_test_mix", names, default_rate=1)
    yield
    seqio.MixtureRegistry.remove("eval_test_mix")
    for name in (*names, "eval_test_lengths"):
        seqio.TaskRegistry.remove(name)


class Model:
    """Answers in capitals, save that it knows no "three"; a score is minus the number of target tokens."""

    def __init__(self):
        self.shapes = set()

    def predict(self, tokens_BS):
        self.shapes.add(tokens_BS.shape)
        answers = np.zeros((len(tokens_BS), 8), np.int32)
        for row, tokens in zip(answers, tokens_BS, strict=True):
            answer = VOCABULARY.encode(VOCABULARY.decode(tokens.tolist()).upper().replace("THREE", "TEN"))
            row[: len(answer) + 1] = [*answer, 1]
        return answers

    def score(self, batch):
        inputs, targets = batch["decoder_input_tokens"], batch["decoder_target_tokens"]
        self.shapes.add(batch["encoder_input_tokens"].shape)
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        assert not inputs[:, 0].any()
        assert np.array_equal(batch["decoder_loss_weights"] > 0, targets > 0)
        return -np.sum(targets > 0, axis=1).astype(np.float32)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_metric_of_every_task_that_has_the_split(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    evaluation = evaluator.Evaluation("eval_test_mix", LENGTHS, batch_size=2, predictions=tmp_path / "predictions")
    assert evaluation.tasks == ["eval_test_all", "eval_test_first"]
    assert "without the split 'validation': eval_test_train_only" in caplog.text
    assert "without metrics other than the loss: eval_test_unmeasured" in caplog.text
    model = Model()
    with jax.transfer_guard("disallow"):
        results = evaluation.run(model.predict, model.score, step=7)
    assert model.shapes == {(2, 8)}, "always whole batches"
    mean_length = np.mean([len(w) + 1 for w in WORDS])
    mean_answer = np.mean([len(w) + 1 for w in ("one", "two", "ten", "four", "five")])
    assert results == {
        "eval_test_all": {
            "accuracy": 80.0,
            "likelihood": pytest.approx(-mean_length),
            "confidence": pytest.approx(-mean_answer),
        },
        "eval_test_first": {"accuracy": 100.0},  # T of TEN is the T of THREE
    }
    assert "not numbers are dropped: note" in caplog.text
    written = lines(tmp_path / "predictions" / "eval_test_all-7.jsonl")
    assert written[2] == {"inputs": "three", "targets": "THREE", "prediction": "TEN", "score": -6.0}
    assert [row["inputs"] for row in written] == WORDS
    assert lines(tmp_path / "predictions" / "eval_test_first-7.jsonl")[0] == {
        "inputs": "one",
        "targets": "ONE",
        "prediction": "ONE",
    }
    assert results == evaluation.run(model.predict, model.score, step=8), "again, from what is kept"
    assert len(list((tmp_path / "predictions").iterdir())) == 4


def test_predictions_that_cannot_be_written_do_not_cost_the_scores(tmp_path, caplog):
    (tmp_path / "predictions").write_text("a file where the folder should be")
    model, options = Model(), {"batch_size": 2, "predictions": tmp_path / "predictions"}
    found = evaluator.Evaluation("eval_test_first", LENGTHS, **options).run(model.predict, model.score, step=7)
    assert found == {"eval_test_first": {"accuracy": 100.0}}
    assert "predictions/eval_test_first-7.jsonl could not be written" in caplog.text


def test_a_limit_and_a_task_that_cannot_be_evaluated():
    model = Model()
    limited = evaluator.Evaluation("eval_test_first", LENGTHS, batch_size=4, num_examples=3)
    always_t = np.full((4, 2), VOCABULARY.encode("T")[0], np.int32)
    results = limited.run(lambda _: always_t, model.score, step=0)
    assert results == {"eval_test_first": {"accuracy": pytest.approx(200 / 3)}}, "of ONE, TWO, THREE"
    nothing = evaluator.Evaluation("eval_test_train_only", LENGTHS, batch_size=4)
    assert nothing.tasks == []
    assert nothing.run(model.predict, model.score, step=0) == {}


def test_a_function_that_answers_in_the_wrong_shape_is_named():
    evaluation = evaluator.Evaluation("eval_test_all", LENGTHS, batch_size=2)
    model = Model()
    with pytest.raises(ValueError, match=r"predict gave tokens of shape \(2, 1, 8\), expected \[B, T\], B = 2"):
        evaluation.run(lambda tokens: model.predict(tokens)[:, None], model.score, step=0)
    with pytest.raises(ValueError, match=r"score gave an array of shape \(2, 1\), expected \[B\], B = 2"):
        evaluation.run(model.predict, lambda batch: model.score(batch)[:, None], step=0)


def test_fill_up_adds_rows_of_nothing():
    assert pipeline.fill_up({"a": np.ones((1, 2), np.int32)}, 3)["a"].tolist() == [[1, 1], [0, 0], [0, 0]]


def test_short_rows_share_narrow_batches_and_every_answer_finds_its_example(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 3)  # of 3 x 2 rows, and one of 3
    lengths, widths = {"inputs": 500, "targets": 450}, []
    evaluation = evaluator.Evaluation("eval_test_lengths", lengths, batch_size=2, predictions=tmp_path)

    def predict(tokens_BS):
        widths.append(tokens_BS.shape[1])
        capitals_BS = np.where(tokens_BS > 1, tokens_BS - 32, tokens_BS)
        return np.pad(capitals_BS, [(0, 0), (0, 450 - tokens_BS.shape[1])])

    found = evaluation.run(predict, Model().score, step=0)
    assert widths == [448, 64, 64, 128, 64]
    assert found["eval_test_lengths"]["accuracy"] == 100.0
    scores = [row["score"] for row in lines(tmp_path / "eval_test_lengths-0.jsonl")]
    assert scores == [-len(word) - 1 for word in LONG_WORDS]


@pytest.mark.parametrize("benchmark", ["glue", "super_glue"])
def test_a_benchmarks_average_stands_beside_its_tasks_or_the_log_says_what_it_lacks(benchmark, caplog):
    parts = metrics.AVERAGES[benchmark]
    scores = {task: dict.fromkeys(names, 50.0) for part in parts for task, names in part.items()}
    assert evaluator.averages(scores) == {benchmark: {"average": 50.0}}
    (task, (metric, *_)), *_ = parts[0].items()
    lacking = {name: values for name, values in scores.items() if name != task}
    caplog.set_level("INFO")
    assert evaluator.averages(lacking) == {}
    assert f"No average of {benchmark}: {task}/{metric} missing." in caplog.text
    caplog.clear()
    assert evaluator.averages({task: scores[task]}) == {}
    assert not caplog.text
