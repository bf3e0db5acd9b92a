"""Analyse a run's records and predictions: curves, best scores, confusion tables, worst examples, word differences.

Takes parsed rows of metrics.jsonl and predictions/*.jsonl. Must not depend on files, HTML, JAX or TensorFlow.
"""

import collections
import difflib
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Curve = dict[int, float]  # by step, in order
Curves = dict[str, dict[str, Curve]]  # by task and metric
Row = Mapping[str, Any]  # `inputs`, `targets`; `prediction` and `score` if given

MAX_CLASSES = 12
MAX_LABEL = 40  # characters
ROWS_A_CLASS = 5  # minimum on average: short answers that rarely repeat are not classes

# --------------------------------------------------------------------------------------------------------------- curves


def curves(records: Sequence[Mapping[str, Any]]) -> tuple[Curve, Curves]:
    """Return the training loss and every validation metric by step; a later record of a step replaces an earlier one.

    Losses are cross entropies (nats per target token) if the records separate them from the z-loss.
    """
    train: Curve = {}
    tasks: Curves = {}
    for record in records:
        loss = record.get("cross_ent_loss", record.get("loss"))
        if record["split"] == "train":
            values: Mapping[str, Any] = {"loss": loss}
            target = {"loss": train}
        else:
            others = {k: v for k, v in record.items() if k not in ("step", "split", "task", "loss", "cross_ent_loss")}
            values = {"loss": loss} | others
            target = tasks.setdefault(record.get("task", "validation"), {})
        for name, value in values.items():
            if value is not None:
                target.setdefault(name, {})[record["step"]] = float(value)
    ordered = {
        task: {name: dict(sorted(c.items())) for name, c in named.items()} for task, named in tasks.items() if named
    }
    return dict(sorted(train.items())), ordered


def lower_is_better(metric: str) -> bool:
    return not {"loss", "perplexity", "error", "wer", "cer", "mse", "mae"}.isdisjoint(metric.split("_"))


def best(metric: str, curve: Curve) -> tuple[int, float]:
    """Return the first step with the best value, and the value."""
    pick = min if lower_is_better(metric) else max
    return pick(curve.items(), key=lambda point: point[1])


def binned(curve: Curve, most: int) -> list[tuple[float, float, float, float]]:
    """Return (step, mean, min, max) of at most `most` groups of consecutive points."""
    points = np.array(list(curve.items()), np.float64)
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[:, 0].mean(), g[:, 1].mean(), g[:, 1].min(), g[:, 1].max()) for g in groups]


# -------------------------------------------------------------------------------------------------------------- classes


def classes(rows: Sequence[Row]) -> list[str] | None:
    """Return the sorted classes of a classification task; None if targets are many, long or rarely repeat, or there are
    no predictions."""
    labels = {row["targets"] for row in rows if "prediction" in row}
    if not 0 < len(labels) <= min(MAX_CLASSES, len(rows) / ROWS_A_CLASS) or max(map(len, labels)) > MAX_LABEL:
        return None
    return sorted(labels, key=lambda label: (_number(label), label))


def confusion(rows: Sequence[Row], labels: Sequence[str]) -> np.ndarray:
    """Return the confusion matrix, int [n, n + 1]: targets by predictions; the last column is any other text."""
    index = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), int)
    for row in rows:
        counts[index[row["targets"]], index.get(row["prediction"], len(labels))] += 1
    return counts


def numeric(rows: Sequence[Row]) -> bool:
    """Return whether all targets are numbers, as in STS-B."""
    return bool(rows) and all(math.isfinite(_number(row["targets"])) for row in rows)


def distance(row: Row) -> float:
    """Return |prediction - target|; infinity if the prediction is not a number."""
    return abs(_number(row["prediction"]) - _number(row["targets"]))


def _number(text: str) -> float:
    """Return the number in `text`; infinity if it is not a finite number."""
    try:
        value = float(text)
    except ValueError:
        return math.inf
    return value if math.isfinite(value) else math.inf


# ----------------------------------------------------------------------------------------------------------------- text

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = {"a", "an", "the"}


def words(text: str) -> list[str]:
    """Return the words that SQuAD's metric compares: lower case, without ASCII punctuation and articles."""
    return [word for word in text.lower().translate(_PUNCTUATION).split() if word not in _ARTICLES]


def f1(row: Row) -> float:
    """Return SQuAD's F1 of the `words` of target and prediction, in 0..1; 1 for equal texts without words.

    Not imported from tasks.metrics, which needs TensorFlow; a test compares the two.
    """
    if row["targets"] == row["prediction"]:
        return 1.0
    t, p = collections.Counter(words(row["targets"])), collections.Counter(words(row["prediction"]))
    return 2 * (t & p).total() / (t.total() + p.total()) if t and p else 0.0


Pieces = list[tuple[str, bool]]  # consecutive pieces of a text, and whether the other text lacks them


def differences(target: str, prediction: str) -> tuple[Pieces, Pieces]:
    """Split both texts into pieces, and mark those that the other text lacks; only `words` are compared."""
    texts = [re.findall(r"\S+\s*|\s+", text) for text in (target, prediction)]
    keys = [["".join(words(token)) for token in tokens] for tokens in texts]
    positions = [[i for i, key in enumerate(k) if key] for k in keys]
    compared = [[k[i] for i in indices] for k, indices in zip(keys, positions, strict=True)]
    unmatched: tuple[set[int], set[int]] = (set(), set())
    for kind, *spans in difflib.SequenceMatcher(None, *compared, autojunk=False).get_opcodes():
        if kind != "equal":
            for side, (first, last) in enumerate((spans[:2], spans[2:])):
                unmatched[side].update(positions[side][first:last])
    marked = [[(token, i in side) for i, token in enumerate(t)] for t, side in zip(texts, unmatched, strict=True)]
    return marked[0], marked[1]
