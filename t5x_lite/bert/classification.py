"""Classes for texts and pairs of texts: the metrics of tasks, and predictions for tasks and files of any size.

What inference/evaluator.py and batch_prediction.py are to models that write text, for an encoder with a classification
head. The model comes as a function on numpy batches of always the same number of rows. This module knows SeqIO and
text; it must not know the model or where it runs. Every process goes through all examples with the same calls; only the
one that is given a place to write writes.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import seqio
from etils import epath

from t5x_lite.bert.feature_converters import ClassifierFeatureConverter, pair
from t5x_lite.data import packing, pipeline
from t5x_lite.errors import UserError
from t5x_lite.inference import batch_prediction
from t5x_lite.inference.batch_prediction import Example, Source
from t5x_lite.inference.evaluator import text_of
from t5x_lite.inference.jsonl import write_whole
from tasks import bert, readers

logger = logging.getLogger(__name__)

# {"inputs": [B, S], "segments": [B, S]} to the logits of the classes [B, N], float32; of a number, [B, 1].
Classify = Callable[[pipeline.Batch], Any]


class Answer(NamedTuple):
    """A class by its id and word with its log-likelihood, or a number, which has none."""

    value: int | float
    text: str
    score: float | None

    @property
    def row(self) -> dict[str, Any]:
        return {"prediction": self.text} | ({} if self.score is None else {"score": self.score})


class Evaluation:
    """The metrics of a task, or of each task of a mixture, on one split. Reads the data once, for any number of runs.

    Args: those of evaluator.Evaluation. A metric is a function of the classes that are right and those predicted, by
    their ids, or of numbers. Examples whose label is not known have predictions and no part in it.

    Raises:
      ValueError: a metric asks for something else.
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
        """{task: {metric: value}}. A row of the predictions has `inputs`, `targets`, `prediction` and its `score`."""
        found = {}
        for task in self._tasks:
            examples = self._examples[task.name]
            answers: dict[int, Answer] = {}
            for group in packing.by_length([len(e.input_tokens) for e in examples], self._batch_size):
                chosen = [examples[i] for i in group]
                width = batch_prediction.width(chosen, self._lengths, "inputs")
                said = answered(classify, chosen, width, self._batch_size, task.output_features["label"])
                answers |= zip(group, said, strict=True)
            labels = [np.asarray(example.target_tokens).item() for example in examples]
            known = [i for i, label in enumerate(labels) if label >= 0]
            right, values = [labels[i] for i in known], [answers[i].value for i in known]
            found[task.name] = {}
            for metric in task.metric_fns if known else ():
                found[task.name] |= metric(right, values)
            if self._predictions is not None:
                rows = (_said(example) | answers[i].row for i, example in enumerate(examples))
                write_whole(self._predictions / f"{task.name}-{step}.jsonl", rows)
        return found


def answered(
    classify: Classify, group: Sequence[Example], width: int, rows: int, label: seqio.utils.Feature
) -> list[Answer]:
    """What the model says of at most `rows` examples, none longer than `width`."""
    batch = {
        "inputs": batch_prediction.padded([example.input_tokens for example in group], width, rows),
        "segments": batch_prediction.padded([np.asarray(example.segments) for example in group], width, rows),
    }
    logits_BN = np.asarray(classify(batch), np.float32)
    if logits_BN.shape != (rows, label.vocabulary.vocab_size):
        raise UserError(
            f"classify gave an array of shape {logits_BN.shape} for {rows} rows of {label.vocabulary.vocab_size} "
            "classes: [B, N] is due"
        )
    if label.dtype.is_floating:
        return [Answer(float(x), f"{x:.3f}", None) for x in logits_BN[: len(group), 0]]
    log_likelihoods_BN = scipy.special.log_softmax(logits_BN, axis=-1)[: len(group)]
    best_B = np.argmax(log_likelihoods_BN, axis=-1).tolist()
    return [Answer(i, word(label, i), row[i].item()) for i, row in zip(best_B, log_likelihoods_BN, strict=True)]


def word(label: seqio.utils.Feature, value: int | float) -> str:
    """A class by its name, where the task gives them names; a number as it is; "<unk>" for what is not known."""
    words = getattr(label.vocabulary, "words", ())
    if value < 0 and not label.dtype.is_floating:
        return "<unk>"
    return words[int(value)] if words else f"{value:g}"


# Examples: a label is their target, as text and as an array of one.


def task_source(task_name: str, lengths: Mapping[str, int], **options: Any) -> Source:
    """The examples of one task in the order of its split. Args: those of batch_prediction.task_source."""
    pipeline.check_lengths(task_name, lengths, ClassifierFeatureConverter())
    return batch_prediction.task_source(task_name, lengths, **options, example=_labelled)


def _labelled(where: str, row: Mapping[str, Any], features: Mapping[str, seqio.utils.Feature]) -> Example:
    text = text_of(row, "inputs", features["inputs"])
    right = word(features["label"], row["label"].item())
    return Example(where, text, right, row["inputs"], row["label"], row["segments"])


def file_source(
    path: str, vocabulary: seqio.Vocabulary, lengths: Mapping[str, int], *, num_examples: int | None = None
) -> Source:
    """One example a line: of a .jsonl file "inputs", or "sentence1" and "sentence2"; of any other the line itself.

    "targets", where they are there, go into the results. For the rest see batch_prediction.file_source.
    """
    ids = bert.special(vocabulary)

    def texts(row: Mapping[str, Any]) -> list[Any]:
        return [row.get(key) for key in (("inputs",) if "inputs" in row else ("sentence1", "sentence2"))]

    def check(number: int, row: Mapping[str, Any]) -> None:
        if not all(isinstance(text, str) for text in (*texts(row), row.get("targets", ""))):
            said = '"inputs", or "sentence1" and "sentence2", and "targets" if there, must be strings'
            raise readers.bad_row(path, number, f"{said}; the row has {', '.join(row) or 'nothing'}")

    def example(where: str, row: Mapping[str, Any]) -> Example:
        first, *rest = (list(vocabulary.encode(text)) for text in texts(row))
        tokens, segments = pair(first, rest[0] if rest else None, ids.cls, ids.sep, lengths["inputs"])
        return Example(where, " [SEP] ".join(texts(row)), row.get("targets"), tokens, None, segments)

    return batch_prediction.lines_source(path, check, example, lengths, num_examples)


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
    """Writes `inputs`, `targets` (where there are), `prediction` and, of a class, its log-likelihood as `score`.

    Args: those of batch_prediction.write_predictions; `label` is the task's feature, which names the classes.

    Returns:
      The number of lines, those of an earlier start included.
    """

    def answer(group: list[Example]) -> batch_prediction.Rows:
        answers = answered(classify, group, batch_prediction.width(group, lengths, "inputs"), batch_size, label)
        return [_said(example) | found.row for example, found in zip(group, answers, strict=True)]

    return batch_prediction.write(source, answer, path, batch_size, {"mode": "infer", **about, **source.about})


def _said(example: Example) -> dict[str, str]:
    return {"inputs": example.inputs} | ({} if example.targets is None else {"targets": example.targets})
