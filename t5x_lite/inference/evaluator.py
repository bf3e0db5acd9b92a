"""Compute the metrics of SeqIO tasks: `Evaluation` runs each task's metrics through seqio.Evaluator.

The model is given as two functions on numpy batches with a fixed number of rows; the last batch is padded with rows of
0, whose results are dropped. This module uses SeqIO and text. It must not depend on the model, its decoding or its
devices. Every process makes the same calls for all examples; only a process with a `predictions` folder writes.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from etils import epath

from t5x_lite.data import packing, pipeline
from t5x_lite.errors import UserError
from t5x_lite.inference.jsonl import write_whole
from tasks import metrics as task_metrics

logger = logging.getLogger(__name__)

# encoder_input_tokens [B, S] -> token ids [B, T], int32.
Predict = Callable[[np.ndarray], Any]
# A batch as from pipeline.EvalBatches -> the targets' log-likelihoods [B], float32 (natural logarithm).
Score = Callable[[pipeline.Batch], Any]

Output = seqio.metrics.ModelOutputType


class Evaluation:
    """The metrics of a task, or of each task of a mixture, on one split. Reads the data once, for any number of runs.

    Args:
      name: task or mixture; tasks without the split or without metrics are skipped, which is logged.
      lengths: {"inputs": S, "targets": T}; longer inputs are truncated. Rows are sorted by length, and batches of short
        rows are narrower.
      batch_size: rows in each call of the model.
      num_examples: evaluate only the first `num_examples` of each task; None means all.
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
        with_split = [seqio.TaskRegistry.get(task) for task in pipeline.tasks_with_split(name, split)]
        without = [task.name for task in with_split if not task.metric_objs]
        if without:
            logger.info("Tasks without metrics other than the loss: %s.", ", ".join(without))
        for task in with_split:
            for metric in task.metric_objs:
                if metric.model_output_type == Output.SCORE_WITH_INTERMEDIATES:
                    raise UserError(f"Task {task.name} has a metric on intermediate values ({metric}), not supported.")
        self._batch_size = batch_size
        self._predictions = epath.Path(predictions) if predictions is not None else None
        self.tasks = [task.name for task in with_split if task.metric_objs]
        if self.tasks:
            pipeline.check_lengths(name, lengths)
            self._evaluator = seqio.Evaluator(
                name,
                seqio.EncDecFeatureConverter(pack=False),
                eval_split=split,
                use_cached=use_cached,
                seed=seed,
                sequence_length=lengths,
                num_examples=num_examples,
                async_compute_metrics=False,  # a thread would not inherit the transfer guard below
            )

    def run(self, predict: Predict, score: Score, *, step: int) -> dict[str, dict[str, float]]:
        """Return {task: {metric: value}}. `predict` and `score` are called only if a task's metrics need them.

        A row of the predictions has `inputs`, `targets`, `prediction` and, if the task has a metric on scores, `score`:
        the log-likelihood of the targets.
        """
        if not self.tasks:
            return {}

        def predictions(dataset: tf.data.Dataset) -> list[tuple[int, np.ndarray]]:
            return _numbered((n, _predicted(predict, rows)) for n, rows in self._rows(dataset))

        def scores(dataset: tf.data.Dataset) -> list[tuple[int, float]]:
            return _numbered((n, scored(score, rows)) for n, rows in self._rows(dataset))

        def scored_predictions(dataset: tf.data.Dataset) -> tuple[list[tuple[int, np.ndarray]], dict[str, list[float]]]:
            pairs, likelihoods = [], []
            for n, rows in self._rows(dataset):
                tokens = _predicted(predict, rows)
                pairs += _numbered([(n, tokens)])
                likelihoods += scored(score, packing.unpacked(rows[_INPUTS], tokens))[: len(n)]
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
                write_whole(self._predictions / f"{task}-{step}.jsonl", self._output_rows(task, outputs[task]))
        return {task: _floats(task, values) for task, values in metrics.result().items()}

    def _rows(self, dataset: tf.data.Dataset) -> Iterator[tuple[list[int], pipeline.Batch]]:
        for n, window in dataset.batch(packing.WINDOW * self._batch_size).prefetch(1).as_numpy_iterator():
            used_N = {k: _used(window[k]) for k in (_INPUTS, _TARGETS)}
            for group in packing.by_length((used_N[_INPUTS] + used_N[_TARGETS]).tolist(), self._batch_size):
                widths = {k: packing.width(int(used_N[k][group].max()), window[k].shape[1]) for k in used_N}
                rows = {k: v[group, : widths.get(k, widths[_TARGETS])] for k, v in window.items()}
                yield n[group].tolist(), pipeline.fill_up(rows, self._batch_size)

    def _output_rows(self, task: str, outputs: Mapping[Output, Any]) -> Iterator[dict[str, Any]]:
        tokens = outputs.get(Output.PREDICTION)
        if tokens is None and Output.PREDICTION_WITH_AUX in outputs:
            tokens, _ = outputs[Output.PREDICTION_WITH_AUX]
        scores = outputs.get(Output.SCORE)
        features = seqio.TaskRegistry.get(task).output_features
        examples = self._evaluator.cached_task_datasets[task].as_numpy_iterator()
        for i, example in enumerate(examples):
            row: dict[str, Any] = {k: text_of(example, k, features[k]) for k in ("inputs", "targets")}
            if tokens is not None:
                row["prediction"] = features["targets"].vocabulary.decode(tokens[i].tolist())
            if scores is not None:
                row["score"] = float(scores[i])
            yield row


def averages(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return {"glue": {"average": ...}}, and so for each benchmark all of whose tasks are in {task: {metric: score}}.

    The averages are those of the T5 paper, `tasks.metrics.AVERAGES`.
    """
    complete = {}
    for benchmark in task_metrics.AVERAGES:
        missing = task_metrics.average_missing(benchmark, scores)
        if not missing:
            complete[benchmark] = {"average": task_metrics.average(benchmark, scores)}
        elif sum(task.startswith(f"{benchmark}_") for task in scores) > 1:
            logger.info("No average of %s: %s missing.", benchmark, ", ".join(missing))
    return complete


def _used(tokens_NS: np.ndarray) -> np.ndarray:
    """Return the lengths [N] of N rows without padding."""
    return np.max((tokens_NS != 0) * np.arange(1, tokens_NS.shape[1] + 1), axis=1)


def _floats(task: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers; log and drop others (texts, images, histograms for TensorBoard)."""
    values = {k: v.value if isinstance(v, seqio.metrics.Scalar) else v for k, v in metrics.items()}
    others = [k for k, v in values.items() if isinstance(v, seqio.metrics.MetricValue) or np.ndim(v) > 0]
    if others:
        logger.info("Metrics of %s that are not numbers are dropped: %s.", task, ", ".join(others))
    return {k: float(v) for k, v in values.items() if k not in others}


# Batches and their results.

_INPUTS, _TARGETS = "encoder_input_tokens", "decoder_target_tokens"


def _predicted(predict: Predict, rows: pipeline.Batch) -> np.ndarray:
    tokens_BT = np.asarray(predict(rows[_INPUTS]))
    if tokens_BT.ndim != 2 or len(tokens_BT) != len(rows[_INPUTS]):
        raise UserError(f"predict gave tokens of shape {tokens_BT.shape}, expected [B, T], B = {len(rows[_INPUTS])}")
    return tokens_BT


def scored(score: Score, rows: pipeline.Batch) -> list[float]:
    scores_B = np.asarray(score(rows))
    if scores_B.shape != (len(rows[_INPUTS]),):
        raise UserError(f"score gave an array of shape {scores_B.shape}, expected [B], B = {len(rows[_INPUTS])}")
    return scores_B.astype(float).tolist()


def _numbered(batches: Iterable[tuple[list[int], Any]]) -> list[tuple[int, Any]]:
    """Pair each result with the index of its example, without the rows that pad the last batch."""
    return [pair for numbers, results in batches for pair in zip(numbers, results, strict=False)]


# Text.


def text_of(example: Mapping[str, Any], feature: str, spec: seqio.utils.Feature) -> str:
    """Return a feature's text before tokenization if the task kept it, else its decoded tokens."""
    text = example.get(f"{feature}_pretokenized")
    if text is None:
        text = spec.vocabulary.decode(example[feature].tolist())
    return text.decode() if isinstance(text, bytes) else str(text)
