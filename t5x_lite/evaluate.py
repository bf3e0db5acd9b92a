"""Metrics, predictions and scores of a model on SeqIO tasks and on plain files.

`Evaluation` runs every task's own metrics through seqio.Evaluator; `write_predictions` and `write_scores` go through
examples of a task or a file, batch by batch, and write JSON lines in input order. The model comes as two functions on
numpy batches of always the same number of rows; the last batch is filled up with rows of 0, whose results are dropped.

This module knows SeqIO and text. It must not know the model, how it decodes or where it runs. Every process goes
through all examples with the same calls; only the one that is given a place to write writes.
"""

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import seqio
import tensorflow as tf
from etils import epath

from t5x_lite import data, packing
from tasks import formats
from tasks.metrics import glue_average, glue_missing

logger = logging.getLogger(__name__)

# encoder_input_tokens [B, S] to token ids [B, T], int32.
Predict = Callable[[np.ndarray], Any]
# A batch as from data.EvalBatches to the targets' log-likelihoods [B], float32 (natural logarithm).
Score = Callable[[data.Batch], Any]

Output = seqio.metrics.ModelOutputType


class Evaluation:
    """The metrics of a task, or of each task of a mixture, on one split. Reads the data once, for any number of runs.

    Args:
      name: task or mixture; tasks without the split or without metrics are left out, which the log says.
      lengths: {"inputs": S, "targets": T}; longer inputs are cut. Where no example is as long, batches are narrower.
      batch_size: rows of each call of the model.
      num_examples: the first so many of each task; None for all.
      predictions: folder for `<task>-<step>.jsonl`; None writes nothing.
    """

    def __init__(
        self,
        name: str,
        lengths: Mapping[str, int],
        *,
        batch_size: int,
        split: str = "validation",
        num_examples: int | None = None,
        use_cached: bool = False,
        seed: int = 0,
        predictions: str | os.PathLike[str] | None = None,
    ):
        data.check_lengths(name, lengths)
        with_split = [seqio.TaskRegistry.get(task) for task in data.tasks_with_split(name, split)]
        without = [task.name for task in with_split if not task.metric_objs]
        if without:
            logger.info("No metrics beside the loss: %s.", ", ".join(without))
        for task in with_split:
            for metric in task.metric_objs:
                if metric.model_output_type == Output.SCORE_WITH_INTERMEDIATES:
                    raise ValueError(
                        f"Task {task.name} has a metric on intermediate values ({metric}); there are none."
                    )
        self._batch_size = batch_size
        self._predictions = epath.Path(predictions) if predictions is not None else None
        self.tasks = [task.name for task in with_split if task.metric_objs]
        if self.tasks:
            self._evaluator = seqio.Evaluator(
                name,
                seqio.EncDecFeatureConverter(pack=False),
                eval_split=split,
                use_cached=use_cached,
                seed=seed,
                sequence_length=lengths,
                num_examples=num_examples,
                async_compute_metrics=False,  # a thread would be out of the reach of the transfer guard below
            )
            self._used = _used([self._evaluator.cached_task_datasets[task] for task in self.tasks], lengths)

    def run(self, predict: Predict, score: Score, *, step: int) -> dict[str, dict[str, float]]:
        """{task: {metric: value}}. `predict` and `score` are only called where a task's metrics ask for it.

        A row of the predictions has `inputs`, `targets`, `prediction` and, where the task has a metric on scores,
        `score`: the log-likelihood of the targets.
        """
        if not self.tasks:
            return {}

        def predictions(dataset: tf.data.Dataset) -> list[tuple[int, np.ndarray]]:
            return _numbered((n, _predicted(predict, rows)) for n, rows in self._rows(dataset))

        def scores(dataset: tf.data.Dataset) -> list[tuple[int, float]]:
            return _numbered((n, _scored(score, rows)) for n, rows in self._rows(dataset))

        def scored_predictions(dataset: tf.data.Dataset) -> tuple[list[tuple[int, np.ndarray]], dict[str, list[float]]]:
            pairs, likelihoods = [], []
            for n, rows in self._rows(dataset):
                tokens = _predicted(predict, rows)
                pairs += _numbered([(n, tokens)])
                likelihoods += _scored(score, packing.unpacked(rows[_INPUTS], tokens))[: len(n)]
            return pairs, {"scores": likelihoods}

        functions = {
            Output.PREDICTION: predictions,
            Output.SCORE: scores,
            Output.PREDICTION_WITH_AUX: scored_predictions,
        }
        with jax.transfer_guard("allow"):  # SeqIO's metrics keep their masks on the device
            metrics, outputs = self._evaluator.evaluate(compute_metrics=True, step=step, model_fns=functions)
        if self._predictions is not None:
            for task in self.tasks:
                self._write(self._predictions / f"{task}-{step}.jsonl", task, outputs[task])
        return {task: _floats(task, values) for task, values in metrics.result().items()}

    def _rows(self, dataset: tf.data.Dataset) -> Iterator[tuple[list[int], data.Batch]]:
        for n, rows in dataset.batch(self._batch_size).prefetch(1).as_numpy_iterator():
            rows = {k: v[:, : self._used["inputs" if k == _INPUTS else "targets"]] for k, v in rows.items()}
            yield n.tolist(), data.fill_up(rows, self._batch_size)

    def _write(self, path: epath.Path, task: str, outputs: Mapping[Output, Any]) -> None:
        tokens = outputs.get(Output.PREDICTION)
        if tokens is None and Output.PREDICTION_WITH_AUX in outputs:
            tokens, _ = outputs[Output.PREDICTION_WITH_AUX]
        scores = outputs.get(Output.SCORE)
        features = seqio.TaskRegistry.get(task).output_features
        examples = self._evaluator.cached_task_datasets[task].as_numpy_iterator()
        with _writing(path) as write:
            for i, example in enumerate(examples):
                row: dict[str, Any] = {k: _text(example, k, features[k]) for k in ("inputs", "targets")}
                if tokens is not None:
                    row["prediction"] = features["targets"].vocabulary.decode(tokens[i].tolist())
                if scores is not None:
                    row["score"] = float(scores[i])
                write(row)


def averages(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """{"glue": {"average": ...}} of {task: {metric: score}}, as the T5 paper has it; without all its tasks, nothing."""
    missing = glue_missing(scores)
    if not missing:
        return {"glue": {"average": glue_average(scores)}}
    if sum(task.startswith("glue_") for task in scores) > 1:
        logger.info("No GLUE average, for want of %s.", ", ".join(missing))
    return {}


def _used(datasets: Iterable[tf.data.Dataset], lengths: Mapping[str, int]) -> dict[str, int]:
    """The longest example in steps of 64, at most `lengths`: what is wider than any example is only computed away."""
    used = dict.fromkeys(lengths, 1)
    for example in itertools.chain.from_iterable(dataset.as_numpy_iterator() for dataset in datasets):
        used = {k: max(used[k], len(example[k])) for k in used}
    return {k: min(length, -(-used[k] // 64) * 64) for k, length in lengths.items()}


def _floats(task: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are numbers; the log says which are not (texts, images, histograms for TensorBoard)."""
    values = {k: v.value if isinstance(v, seqio.metrics.Scalar) else v for k, v in metrics.items()}
    others = [k for k, v in values.items() if isinstance(v, seqio.metrics.MetricValue) or np.ndim(v) > 0]
    if others:
        logger.info("Metrics of %s that are not numbers are left out: %s.", task, ", ".join(others))
    return {k: float(v) for k, v in values.items() if k not in others}


# Examples one by one, from a task or from a file.


class Example(NamedTuple):
    """Text and tokens. `where` says for errors where it is from; without targets, both are None."""

    where: str
    inputs: str
    targets: str | None
    input_tokens: np.ndarray  # [<= S]
    target_tokens: np.ndarray | None  # [<= T]


def task_examples(
    task_name: str,
    lengths: Mapping[str, int],
    *,
    split: str = "validation",
    num_examples: int | None = None,
    use_cached: bool = False,
    seed: int = 0,
) -> Iterator[Example]:
    """The examples of one task in the order of its split."""
    data.check_lengths(task_name, lengths)
    data.check_split(task_name, split)
    task = seqio.TaskRegistry.get(task_name)
    dataset = task.get_dataset(lengths, split=split, shuffle=False, use_cached=use_cached, seed=seed, num_epochs=1)
    features = task.output_features
    for i, row in enumerate(dataset.take(-1 if num_examples is None else num_examples).as_numpy_iterator()):
        inputs, targets = (_text(row, k, features[k]) for k in ("inputs", "targets"))
        yield Example(f"{task_name}[{i}]", inputs, targets, row["inputs"], row["targets"])


def file_examples(
    path: str,
    features: Mapping[str, seqio.utils.Feature],
    lengths: Mapping[str, int],
    *,
    num_examples: int | None = None,
) -> Iterator[Example]:
    """One example a line: of a .jsonl file "inputs" and, where they are there, "targets"; of any other the line itself.

    A blank line of a text file is an example too, so that line n of the output belongs to line n of the input. Local
    or gs://, .gz too.

    Args:
      features: a task's output_features, for the vocabulary and whether an EOS is added; what `lengths` do not hold is
        cut.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not as said; the message has its number.
    """
    if not tf.io.gfile.exists(path):
        raise FileNotFoundError(f"There is no file {path!r} to read inputs from, seen from {os.getcwd()}.")
    rows = path.removesuffix(".gz").endswith(".jsonl")
    for number, line in itertools.islice(formats.lines(path), num_examples):
        row = formats.json_object(path, number, line) if rows else {"inputs": line}
        for key in ("inputs", "targets"):
            if not isinstance(row.get(key, "" if key == "targets" else None), str):
                raise formats.bad_row(path, number, f'"{key}" is {row.get(key)!r}, a string is due')
        tokens = {k: _tokens(row[k], features[k], lengths[k]) for k in ("inputs", "targets") if k in row}
        yield Example(f"{path}:{number}", row["inputs"], row.get("targets"), tokens["inputs"], tokens.get("targets"))


def write_predictions(
    examples: Iterable[Example],
    predict: Predict,
    path: str | os.PathLike[str] | None,
    *,
    vocabulary: seqio.Vocabulary,
    lengths: Mapping[str, int],
    batch_size: int,
    score: Score | None = None,
) -> int:
    """Writes `inputs`, `targets` (where there are), `prediction` and, with `score`, the prediction's log-likelihood.

    Args:
      path: the JSON lines; there only once all are written. None (on all processes but one) writes nothing.
      vocabulary: of the targets.

    Returns:
      The number of examples.
    """
    count = 0
    with _writing(path) as write, jax.transfer_guard("allow"):
        for group in _groups(examples, batch_size):
            rows = _batch(group, lengths, batch_size, [])
            predicted = _ended(_predicted(predict, rows), vocabulary)
            likelihoods = _scored(score, packing.unpacked(rows[_INPUTS], predicted)) if score else []
            for i, example in enumerate(group):
                row: dict[str, Any] = {"inputs": example.inputs}
                if example.targets is not None:
                    row["targets"] = example.targets
                row["prediction"] = vocabulary.decode(predicted[i].tolist())
                if score:
                    row["score"] = likelihoods[i]
                write(row)
            count += len(group)
    return count


def write_scores(
    examples: Iterable[Example],
    score: Score,
    path: str | os.PathLike[str] | None,
    *,
    lengths: Mapping[str, int],
    batch_size: int,
) -> int:
    """Writes `inputs`, `targets` and `score`, the log-likelihood of the targets; see `write_predictions`.

    Raises:
      ValueError: an example without targets.
    """
    count = 0
    with _writing(path) as write, jax.transfer_guard("allow"):
        for group in _groups(examples, batch_size):
            targets = []
            for example in group:
                if example.target_tokens is None:
                    raise ValueError(f'{example.where} has no "targets" to score. To predict them, use --mode=infer.')
                targets.append(example.target_tokens)
            likelihoods = _scored(score, _batch(group, lengths, batch_size, targets))
            for example, value in zip(group, likelihoods, strict=False):
                write({"inputs": example.inputs, "targets": example.targets, "score": value})
            count += len(group)
    return count


# Batches, and the model's answers to them.

_INPUTS = "encoder_input_tokens"


def _predicted(predict: Predict, rows: data.Batch) -> np.ndarray:
    tokens_BT = np.asarray(predict(rows[_INPUTS]))
    if tokens_BT.ndim != 2 or len(tokens_BT) != len(rows[_INPUTS]):
        raise ValueError(f"predict gave tokens of shape {tokens_BT.shape} for {len(rows[_INPUTS])} rows: [B, T] is due")
    return tokens_BT


def _scored(score: Score, rows: data.Batch) -> list[float]:
    scores_B = np.asarray(score(rows))
    if scores_B.shape != (len(rows[_INPUTS]),):
        raise ValueError(f"score gave an array of shape {scores_B.shape} for {len(rows[_INPUTS])} rows: [B] is due")
    return scores_B.astype(float).tolist()


def _numbered(batches: Iterable[tuple[list[int], Any]]) -> list[tuple[int, Any]]:
    """Each result with the number of its example; the rows that fill up the last batch have none."""
    return [pair for numbers, results in batches for pair in zip(numbers, results, strict=False)]


def _ended(tokens_BT: np.ndarray, vocabulary: seqio.Vocabulary) -> np.ndarray:
    """The tokens with 0 after the first EOS, so that nothing behind it counts."""
    is_end = tokens_BT == vocabulary.eos_id
    return np.where(np.cumsum(is_end, axis=1) - is_end > 0, 0, tokens_BT)


def _batch(group: list[Example], lengths: Mapping[str, int], rows: int, targets: list[np.ndarray]) -> data.Batch:
    inputs_BS = np.zeros((rows, lengths["inputs"]), np.int32)
    for i, example in enumerate(group):
        inputs_BS[i, : len(example.input_tokens)] = example.input_tokens
    targets_BT = np.zeros((rows, lengths["targets"]), np.int32)
    for i, tokens in enumerate(targets):
        targets_BT[i, : len(tokens)] = tokens
    return packing.unpacked(inputs_BS, targets_BT)


def _groups(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    remaining = iter(examples)
    while group := list(itertools.islice(remaining, size)):
        yield group


# Text.


def _tokens(text: str, feature: seqio.utils.Feature, length: int) -> np.ndarray:
    """As SeqIO's tokenize and append_eos_after_trim: an EOS even where the text is cut."""
    tokens = list(feature.vocabulary.encode(text))
    if feature.add_eos:
        tokens = [*tokens[: length - 1], feature.vocabulary.eos_id]
    return np.asarray(tokens[:length], np.int32)


def _text(example: Mapping[str, Any], feature: str, spec: seqio.utils.Feature) -> str:
    """A feature as it was before tokenizing where the task kept that, else decoded."""
    text = example.get(f"{feature}_pretokenized")
    if text is None:
        text = spec.vocabulary.decode(example[feature].tolist())
    return text.decode() if isinstance(text, bytes) else str(text)


@contextlib.contextmanager
def _writing(path: str | os.PathLike[str] | None) -> Iterator[Callable[[Mapping[str, Any]], Any]]:
    """Gives a function that writes one JSON line; the file takes its name when all went well."""
    if path is None:
        yield lambda row: None
        return
    final = epath.Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.parent / f"{final.name}.partial"
    with partial.open("w") as file:
        yield lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(final)
