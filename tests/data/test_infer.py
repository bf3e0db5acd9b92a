"""Predictions and scores of tasks and files: in their order, whatever was sorted, killed and gone on with."""

import gzip
import json

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.inference import batch_prediction

VOCABULARY = seqio.ByteVocabulary()
FEATURES = {k: seqio.Feature(VOCABULARY, add_eos=True) for k in ("inputs", "targets")}
LENGTHS = {"inputs": 8, "targets": 6}
WORDS = ["one", "two", "three", "four", "five"]
TASK = "infer_test"


@pytest.fixture(scope="module", autouse=True)
def registered():
    def read(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"inputs": WORDS, "targets": [w.upper() for w in WORDS]})

    seqio.TaskRegistry.add(
        TASK,
        source=seqio.FunctionDataSource(read, splits=("validation",)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features=FEATURES,
    )
    yield
    seqio.TaskRegistry.remove(TASK)


class Model:
    """Answers in capitals, `results` times; its score is minus the number of tokens. Dies at call number `dies_at`."""

    def __init__(self, results=1, dies_at=None):
        self.results, self.dies_at, self.shapes = results, dies_at, []

    def called(self, tokens_BS):
        if len(self.shapes) == self.dies_at:
            raise KeyboardInterrupt
        self.shapes.append(tokens_BS.shape)

    def generate(self, tokens_BS):
        self.called(tokens_BS)
        answers = np.zeros((len(tokens_BS), self.results, tokens_BS.shape[1] + 9), np.int32)
        for row, tokens in zip(answers, tokens_BS, strict=True):
            for n, result in enumerate(row):
                answer = VOCABULARY.encode(VOCABULARY.decode(tokens.tolist()).upper() + "!" * n)
                result[: len(answer) + 1] = [*answer, 1]
        scores = -np.sum(answers > 0, axis=-1).astype(np.float32)
        return answers, np.where(np.arange(self.results) < 2, scores, -np.inf)

    def score(self, batch):
        self.called(batch["encoder_input_tokens"])
        inputs, targets = batch["decoder_input_tokens"], batch["decoder_target_tokens"]
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        assert np.array_equal(batch["decoder_loss_weights"] > 0, targets > 0)
        return -np.sum(targets > 0, axis=1).astype(np.float32)


def predict(source, model, path, lengths=LENGTHS, batch_size=2, **about):
    with jax.transfer_guard("disallow"):
        return batch_prediction.write_predictions(
            *(source, model.generate, path), vocabulary=VOCABULARY, lengths=lengths, batch_size=batch_size, about=about
        )


def score(source, model, path, **about):
    return batch_prediction.write_scores(source, model.score, path, lengths=LENGTHS, batch_size=2, about=about)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_and_scores_of_a_task_in_its_order(tmp_path):
    model, path = Model(), tmp_path / "out" / "predictions.jsonl"
    assert predict(batch_prediction.task_source(TASK, LENGTHS), model, path) == 5
    assert lines(path) == [
        {"inputs": w, "targets": w.upper(), "prediction": w.upper(), "score": -len(w) - 1.0} for w in WORDS
    ]
    assert model.shapes == [(2, 8)] * 3, "always whole batches"
    few = batch_prediction.task_source(TASK, LENGTHS, num_examples=2)
    assert score(few, model, tmp_path / "scores.jsonl") == 2
    assert lines(tmp_path / "scores.jsonl")[1] == {"inputs": "two", "targets": "TWO", "score": -4.0}


def test_several_results_for_each_input_as_many_as_there_are(tmp_path):
    predict(batch_prediction.task_source(TASK, LENGTHS, num_examples=1), Model(results=3), tmp_path / "p.jsonl")
    expected = {"inputs": "one", "targets": "ONE", "predictions": ["ONE", "ONE!"], "scores": [-4.0, -5.0]}
    assert lines(tmp_path / "p.jsonl") == [expected]


def test_predictions_count_nothing_behind_the_end(tmp_path):
    tokens = np.array([[[*VOCABULARY.encode("AB"), 1, *VOCABULARY.encode("CD")]]] * 2, np.int32)
    model = Model()
    model.generate = lambda _: (tokens, np.zeros((2, 1)))
    predict(batch_prediction.task_source(TASK, LENGTHS, num_examples=1), model, tmp_path / "p.jsonl")
    assert lines(tmp_path / "p.jsonl")[0]["prediction"] == "AB"
    model.generate = lambda _: (tokens[:, 0], np.zeros(2))
    with pytest.raises(ValueError, match=r"generate gave tokens of shape \(2, 5\) .* for 2 rows, expected \[B, N, T\]"):
        predict(batch_prediction.task_source(TASK, LENGTHS), model, tmp_path / "q.jsonl")


@pytest.mark.parametrize("name", ["lines.txt", "lines.txt.gz"])
def test_a_text_file_is_answered_line_by_line_blank_ones_too(tmp_path, name):
    content = b"one\n\nfour and more\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    source = batch_prediction.file_source(str(tmp_path / name), FEATURES, LENGTHS)
    assert source.total == 3
    examples = list(source.read(0))
    assert [(e.inputs, e.targets, e.target_tokens) for e in examples] == [
        ("one", None, None),
        ("", None, None),
        ("four and more", None, None),
    ]
    assert examples[2].input_tokens.tolist() == [*VOCABULARY.encode("four an"), 1], "cut, and ended all the same"
    assert [e.where for e in source.read(1)] == [f"{tmp_path / name}:2", f"{tmp_path / name}:3"]
    assert predict(source, Model(), tmp_path / "out.jsonl") == 3
    assert lines(tmp_path / "out.jsonl") == [
        {"inputs": "one", "prediction": "ONE", "score": -4.0},
        {"inputs": "", "prediction": "", "score": -1.0},
        {"inputs": "four and more", "prediction": "FOUR AN", "score": -8.0},
    ]
    with pytest.raises(ValueError, match=rf'{name}:3 has no "targets" to score'):
        score(source, Model(), tmp_path / "scores.jsonl")
    assert not (tmp_path / "scores.jsonl").exists()


def test_tokens_of_a_file_are_those_of_the_task(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"inputs": w, "targets": w.upper(), "id": 1}) + "\n" for w in WORDS))
    from_file = batch_prediction.file_source(str(path), FEATURES, LENGTHS, with_targets=True).read(2)
    from_task = batch_prediction.task_source(TASK, LENGTHS).read(2)
    for a, b in zip(from_file, from_task, strict=True):
        assert (a.inputs, a.targets) == (b.inputs, b.targets)
        assert np.array_equal(a.input_tokens, b.input_tokens)
        assert np.array_equal(a.target_tokens, b.target_tokens)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"rows\.jsonl:2: not JSON"),
        ('{"text": "x"}', r"rows\.jsonl:2: no column inputs; it has: text"),
        ("[1]", "expected a JSON object"),
        ('{"inputs": "x"}', r'rows\.jsonl:2: no "targets" to score'),
    ],
)
def test_a_bad_row_is_named_before_anything_is_computed(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"inputs": "x", "targets": "y"}}\n{row}\n')
    with pytest.raises(ValueError, match=message):
        batch_prediction.file_source(str(path), FEATURES, LENGTHS, with_targets=True)
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.txt' does not exist"):
        batch_prediction.file_source("nowhere.txt", FEATURES, LENGTHS)


def test_a_language_models_task_has_no_inputs_and_its_file_none_that_end(tmp_path):
    def read(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"targets": WORDS})

    seqio.TaskRegistry.add(
        "infer_test_lm",
        source=seqio.FunctionDataSource(read, splits=("validation",)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={"targets": FEATURES["targets"]},
    )
    model, path = Model(), tmp_path / "scores.jsonl"
    try:
        batch_prediction.write_scores(
            *(batch_prediction.task_source("infer_test_lm", {"targets": 6}), model.score, path),
            lengths={"targets": 6}, batch_size=2, about={},
        )  # fmt: skip
    finally:
        seqio.TaskRegistry.remove("infer_test_lm")
    assert lines(path)[2] == {"inputs": "", "targets": "three", "score": -6.0}
    assert set(model.shapes) == {(2, 1)}
    (tmp_path / "in.txt").write_text("one\n")
    features = {"targets": FEATURES["targets"]}
    (example,) = batch_prediction.file_source(str(tmp_path / "in.txt"), features, LENGTHS).read(0)
    assert example.input_tokens.tolist() == VOCABULARY.encode("one")
    with pytest.raises(ValueError, match="no length for the inputs"):
        batch_prediction.file_source(str(tmp_path / "in.txt"), features, {"targets": 6})


def long_file(path, count):
    texts = ["x" * (i * 37 % 250) for i in range(count)]
    path.write_text("".join(f"{text}\n" for text in texts))
    return texts


def test_rows_of_similar_length_share_a_narrow_batch_and_come_back_in_order(tmp_path):
    texts = long_file(tmp_path / "in.txt", 150)
    lengths, model = {"inputs": 256, "targets": 4}, Model()
    source = batch_prediction.file_source(str(tmp_path / "in.txt"), FEATURES, lengths)
    predict(source, model, tmp_path / "out.jsonl", lengths, batch_size=4)
    assert [row["inputs"] for row in lines(tmp_path / "out.jsonl")] == texts
    assert [row["prediction"] for row in lines(tmp_path / "out.jsonl")] == [text.upper() for text in texts]
    widths = [width for _, width in model.shapes]
    assert set(widths) == {64, 128, 192, 256}
    assert widths[:16] == sorted(widths[:16], reverse=True), "a window"
    assert sum(widths) * 4 < 1.2 * sum(len(text) + 1 + 32 for text in texts), "little is padding"
    examples = [[batch_prediction.Example("", "", None, np.ones(n), None)] for n in range(1, 2049)]
    assert {batch_prediction.width(group, {"inputs": 2048}, "inputs") for group in examples} == set(
        range(256, 2049, 256)
    )


def test_what_was_written_before_a_stop_is_gone_on_with_to_the_same_bytes(tmp_path):
    long_file(tmp_path / "in.txt", 150)
    lengths = {"inputs": 256, "targets": 4}
    source = batch_prediction.file_source(str(tmp_path / "in.txt"), FEATURES, lengths)
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    predict(source, Model(), whole, lengths)
    calls = 0
    for dies_at in (5, 20, 35, 17, None):  # 75 calls in all, 16 to a window
        model = Model(dies_at=dies_at)
        try:
            assert predict(source, model, parts, lengths) == 150
        except KeyboardInterrupt:
            assert not parts.exists()
            with (tmp_path / "parts.jsonl.partial").open("a") as file:
                file.write('{"inputs": "to')  # the line that a kill tears
        calls += len(model.shapes)
    assert parts.read_bytes() == whole.read_bytes()
    assert calls == 5 + 20 + 35 + 17 + (75 - 16 - 32 - 16)
    names = ["in.txt", *(f"{n}.jsonl{end}" for n in ("parts", "whole") for end in ("", ".made_from.json"))]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    again = Model()
    assert predict(source, again, parts, lengths) == 150, "it is complete"
    assert not again.shapes


def test_what_another_run_has_begun_is_refused_and_what_it_has_ended_is_replaced(tmp_path, caplog):
    long_file(tmp_path / "in.txt", 50)
    lengths, out = {"inputs": 256, "targets": 4}, tmp_path / "out.jsonl"
    source = batch_prediction.file_source(str(tmp_path / "in.txt"), FEATURES, lengths)
    with pytest.raises(KeyboardInterrupt):
        predict(source, Model(dies_at=20), out, lengths, checkpoint="a", decoding={"method": "greedy"})
    written = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(
        ValueError, match=r'out\.jsonl\.partial was started with other settings \(checkpoint was "a", is "b"\)'
    ):
        predict(source, Model(), out, lengths, checkpoint="b", decoding={"method": "greedy"})
    (tmp_path / "in.txt").write_text("another\n" * 50)
    changed = batch_prediction.file_source(str(tmp_path / "in.txt"), FEATURES, lengths)
    with pytest.raises(ValueError, match=r"other settings \(sha256 was"):
        predict(changed, Model(), out, lengths, checkpoint="a", decoding={"method": "greedy"})
    assert (tmp_path / "out.jsonl.partial").read_bytes() == written
    predict(source, Model(), out, lengths, checkpoint="a", decoding={"method": "greedy"})
    assert "exists, and will be replaced" not in caplog.text
    predict(changed, Model(), out, lengths, checkpoint="a", decoding={"method": "greedy"})
    assert "exists, and will be replaced" in caplog.text
    assert lines(out)[7]["prediction"] == "ANOTHER"
    with pytest.raises(ValueError, match=r"gs://b/out\.jsonl"):
        predict(source, Model(), "gs://b/out.jsonl", lengths)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", 'word,answer\none,x\n"two, three",y\n'),
        ("rows.TSV", "word\tanswer\none\tx\ntwo, three\ty\n"),
        ("rows.json", '[{"word": "one"}, {"word": "two, three", "answer": "y"}]'),
        ("rows.jsonl", '{"word": "one"}\n{"inputs": "say two, three"}\n'),
    ],
)
def test_rows_of_a_file_are_read_as_in_training_through_the_runs_templates(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    templates = {"inputs": "say {word}", "targets": "{answer}"}
    source = batch_prediction.file_source(str(tmp_path / name), FEATURES, LENGTHS, templates=templates)
    assert [example.inputs for example in source.read(0)] == ["say one", "say two, three"]
    assert source.total == 2
