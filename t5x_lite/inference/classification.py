"""Classification of texts and text pairs: task metrics, and predictions for tasks and files of any size.

This is the counterpart of evaluator.py and batch_prediction.py for a model with a head for classes. The model is passed
as a function on numpy batches with a fixed number of rows. This module handles SeqIO and text; it must not depend on
the model or on where it runs. Every process goes through all examples with the same calls; only the process that is
given a path writes.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import seqio
from etils import epath

from t5x_lite.data import packing, pipeline
from t5x_lite.data.feature_converters import ClassifierFeatureConverter
from t5x_lite.errors import UserError
from t5x_lite.inference import batch_prediction
from t5x_lite.inference.batch_prediction import Example, Source
from t5x_lite.inference.evaluator import text_of
from t5x_lite.inference.jsonl import write_whole
from tasks import readers

logger = logging.getLogger(__name__)

# {"inputs": [B, S]}, and "segments" if the task has them -> logits of the classes [B, N], float32; B numbers in
# regression, [B, 1].
Classify = Callable[[pipeline.Batch], Any]
# (tokens of a text, those of a second one or None, S) -> row of at most S tokens, and its segments if there are any.
MakeRow = Callable[[list[int], list[int] | None, int], tuple[np.ndarray, np.ndarray | None]]


class Answer(NamedTuple):
    """A class (id, name and log-likelihood), or a number with no score."""

    value: int | float
    text: str
    score: float | None

    @property
    def row(self) -> dict[str, Any]:
        return {"prediction": self.text} | ({} if self.score is None else {"score": self.score})


class Evaluation:
    """The metrics of a task, or of each task of a mixture, on one split. Data are read once, for any number of runs.

    The arguments are those of evaluator.Evaluation. A metric is a function of (targets, predictions), as class ids or
    numbers. Examples without a known label are predicted but not scored.

    Raises:
      UserError: a metric takes other arguments.
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
        self._lengths, self._batch_size = dict(lengths), batch_size
        self._predictions = epath.Path(predictions) if predictions is not None else None
        self._tasks = [seqio.TaskRegistry.get(task) for task in pipeline.tasks_with_split(name, split)]
        self._examples: dict[str, list[Example]] = {}
        for task in self._tasks:
            if others := [fn for fn in task.metric_fns if fn not in task.predict_metric_fns]:
                raise UserError(f"{task.name}: {others} must be functions of (targets, predictions) for a classifier")
            options = {"split": split, "num_examples": num_examples, "use_cached": use_cached, "seed": seed}
            self._examples[task.name] = list(task_source(task.name, lengths, **options).read(0))

    def run(self, classify: Classify, *, step: int) -> dict[str, dict[str, float]]:
        """Return {task: {metric: value}}. Prediction rows have `inputs`, `targets`, `prediction` and `score`."""
        scores = {}
        for task in self._tasks:
            examples = self._examples[task.name]
            answers: dict[int, Answer] = {}
            for group in packing.by_length([len(e.input_tokens) for e in examples], self._batch_size):
                batch = [examples[i] for i in group]
                width = batch_prediction.width(batch, self._lengths, "inputs")
                predicted = answered(classify, batch, width, self._batch_size, task.output_features["label"])
                answers |= zip(group, predicted, strict=True)
            labels = [np.asarray(example.target_tokens).item() for example in examples]
            labelled = [i for i, label in enumerate(labels) if label >= 0]
            targets, predictions = [labels[i] for i in labelled], [answers[i].value for i in labelled]
            scores[task.name] = {}
            for metric in task.metric_fns if labelled else ():
                scores[task.name] |= metric(targets, predictions)
            if self._predictions is not None:
                rows = (_text_fields(example) | answers[i].row for i, example in enumerate(examples))
                write_whole(self._predictions / f"{task.name}-{step}.jsonl", rows)
        return scores


def answered(
    classify: Classify, group: Sequence[Example], width: int, rows: int, label: seqio.utils.Feature
) -> list[Answer]:
    """Classify at most `rows` examples, none longer than `width`."""
    batch = {"inputs": batch_prediction.padded([example.input_tokens for example in group], width, rows)}
    segments = [example.segments for example in group if example.segments is not None]
    if segments:
        batch["segments"] = batch_prediction.padded(segments, width, rows)
    logits_BN = np.asarray(classify(batch), np.float32)
    if logits_BN.shape != (rows, label.vocabulary.vocab_size):
        raise UserError(
            f"classify returned an array of shape {logits_BN.shape}, expected [B, N] = "
            f"{(rows, label.vocabulary.vocab_size)}"
        )
    if label.dtype.is_floating:
        return [Answer(float(x), f"{x:.3f}", None) for x in logits_BN[: len(group), 0]]
    log_likelihoods_BN = scipy.special.log_softmax(logits_BN, axis=-1)[: len(group)]
    best_B = np.argmax(log_likelihoods_BN, axis=-1).tolist()
    return [Answer(i, word(label, i), row[i].item()) for i, row in zip(best_B, log_likelihoods_BN, strict=True)]


def word(label: seqio.utils.Feature, value: int | float) -> str:
    """Return the name of a class (its id if the task has no names), a number as text, or "<unk>" if unknown."""
    words = getattr(label.vocabulary, "words", ())
    if value < 0 and not label.dtype.is_floating:
        return "<unk>"
    return words[int(value)] if words else f"{value:g}"


# The target of an example is its label, as text and as an array of size 1.


def task_source(task_name: str, lengths: Mapping[str, int], **options: Any) -> Source:
    """Return the examples of a task in the order of its split. Arguments: see batch_prediction.task_source."""
    pipeline.check_lengths(task_name, lengths, ClassifierFeatureConverter())
    return batch_prediction.task_source(task_name, lengths, **options, example=_labelled)


def _labelled(where: str, row: Mapping[str, Any], features: Mapping[str, seqio.utils.Feature]) -> Example:
    text = text_of(row, "inputs", features["inputs"])
    label = word(features["label"], row["label"].item())
    return Example(where, text, label, row["inputs"], row["label"], row.get("segments"))


def file_source(
    path: str,
    vocabulary: seqio.Vocabulary,
    lengths: Mapping[str, int],
    make_row: MakeRow,
    between: str,
    num_examples: int | None = None,
) -> Source:
    """Return one example per row or line: "inputs", or "sentence1" and "sentence2", or the line of a text file.

    Two texts with `between` in "inputs" are a pair, as results have them. "targets", if given, are copied to the
    results. For the rest see batch_prediction.file_source.

    Args:
      between: stands between two texts in the results.
    """

    def columns(row: Mapping[str, Any]) -> tuple[str, ...]:
        if "inputs" in row and "sentence1" in row:
            raise UserError(f"{path} has inputs and sentence1: a row is one text, or a pair of sentence1 and sentence2")
        return ("inputs",) if "inputs" in row else ("sentence1", "sentence2")

    def texts(number: int, row: Mapping[str, Any]) -> dict[str, str]:
        readers.check_columns(path, number, columns(row), list(row))
        names = (*columns(row), *(["targets"] if "targets" in row else []))
        return {name: readers.as_text(f"{path}:{number}", name, row[name]) for name in names}

    def example(where: str, row: Mapping[str, Any]) -> Example:
        given = row["inputs"].split(f" {between} ") if "inputs" in row else [row[name] for name in columns(row)]
        if len(given) > 2:
            raise UserError(f"{where}: it has more than two texts, with {between} between them")
        first, *rest = (list(vocabulary.encode(text)) for text in given)
        tokens, segments = make_row(first, rest[0] if rest else None, lengths["inputs"])
        return Example(where, f" {between} ".join(given), row.get("targets"), tokens, None, segments)

    return batch_prediction.lines_source(path, texts, example, lengths, num_examples)


def write_predictions(
    source: Source,
    classify: Classify,
    path: str | os.PathLike[str],
    *,
    label: seqio.utils.Feature,
    lengths: Mapping[str, int],
    batch_size: int,
    about: Mapping[str, Any],
) -> int:
    """Write `inputs`, `targets` (if given), `prediction` and, for a class, its log-likelihood as `score`.

    The arguments are those of batch_prediction.write_predictions; `label` is the task's feature, with the class names.

    Returns:
      The number of lines, including those written before an interruption.
    """

    def predict(group: list[Example]) -> batch_prediction.Rows:
        answers = answered(classify, group, batch_prediction.width(group, lengths, "inputs"), batch_size, label)
        return [_text_fields(example) | answer.row for example, answer in zip(group, answers, strict=True)]

    return batch_prediction.write(source, predict, path, batch_size, {"mode": "infer", **about, **source.about})


def _text_fields(example: Example) -> dict[str, str]:
    return {"inputs": example.inputs} | ({} if example.targets is None else {"targets": example.targets})
