"""What a run's records and predictions say: curves, best scores, confusions, the worst examples, the words that differ.

Takes what metrics.jsonl and predictions/*.jsonl hold once it is read. Must not know files, HTML, JAX or TensorFlow.
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
Row = Mapping[str, Any]  # `inputs`, `targets`; `prediction` and `score` where there are any

MAX_CLASSES = 12
MAX_LABEL = 40  # characters
ROWS_A_CLASS = 5  # at least, on average: short answers that hardly ever come twice are no classes

# --------------------------------------------------------------------------------------------------------------- curves


def curves(records: Sequence[Mapping[str, Any]]) -> tuple[Curve, Curves]:
    """The training loss and every validation metric, over steps; of a step that is there twice the later record counts.

    Losses are cross entropies (nats a target token) where the records tell them from their z-loss.
    """
    train: Curve = {}
    tasks: Curves = {}
    for record in records:
        loss = record.get("cross_ent_loss", record.get("loss"))
        if record["split"] == "train":
            found: Mapping[str, Any] = {"loss": loss}
            into = {"loss": train}
        else:
            others = {k: v for k, v in record.items() if k not in ("step", "split", "task", "loss", "cross_ent_loss")}
            found = {"loss": loss} | others
            into = tasks.setdefault(record.get("task", "validation"), {})
        for name, value in found.items():
            if value is not None:
                into.setdefault(name, {})[record["step"]] = float(value)
    ordered = {
        task: {name: dict(sorted(c.items())) for name, c in named.items()} for task, named in tasks.items() if named
    }
    return dict(sorted(train.items())), ordered


def lower_is_better(metric: str) -> bool:
    return not {"loss", "perplexity", "error", "wer", "cer", "mse", "mae"}.isdisjoint(metric.split("_"))


def best(metric: str, curve: Curve) -> tuple[int, float]:
    """The step of the best value, the first such step if there are several, and the value."""
    pick = min if lower_is_better(metric) else max
    return pick(curve.items(), key=lambda point: point[1])


def binned(curve: Curve, most: int) -> list[tuple[float, float, float, float]]:
    """(step, mean, least, greatest) of each of at most `most` groups of so many neighbouring points."""
    points = np.array(list(curve.items()), np.float64)
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[:, 0].mean(), g[:, 1].mean(), g[:, 1].min(), g[:, 1].max()) for g in groups]


# -------------------------------------------------------------------------------------------------------------- classes


def classes(rows: Sequence[Row]) -> list[str] | None:
    """The targets of a classification task, sorted; None where they are many, long or seldom the same, or nothing was
    predicted."""
    found = {row["targets"] for row in rows if "prediction" in row}
    if not 0 < len(found) <= min(MAX_CLASSES, len(rows) / ROWS_A_CLASS) or max(map(len, found)) > MAX_LABEL:
        return None
    return sorted(found, key=lambda label: (_number(label), label))


def confusion(rows: Sequence[Row], labels: Sequence[str]) -> np.ndarray:
    """How often each target (row) got each prediction (column) -> int [n, n + 1]; the last column is any other text."""
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), int)
    for row in rows:
        counts[place[row["targets"]], place.get(row["prediction"], len(labels))] += 1
    return counts


def numeric(rows: Sequence[Row]) -> bool:
    """Whether all targets are numbers, as STS-B's."""
    return bool(rows) and all(math.isfinite(_number(row["targets"])) for row in rows)


def distance(row: Row) -> float:
    """Between the numbers that target and prediction spell; infinite where the prediction spells none."""
    return abs(_number(row["prediction"]) - _number(row["targets"]))


def _number(text: str) -> float:
    """What the text spells; infinity if that is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return math.inf
    return value if math.isfinite(value) else math.inf


# ----------------------------------------------------------------------------------------------------------------- text

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = {"a", "an", "the"}


def words(text: str) -> list[str]:
    """As SQuAD's metric sees them: lower case, without ASCII punctuation and articles."""
    return [word for word in text.lower().translate(_PUNCTUATION).split() if word not in _ARTICLES]


def f1(row: Row) -> float:
    """F1 of the `words` of target and prediction, in 0..1: SQuAD's, but 1 for equal texts that have no words.

    A test holds it to tasks.metrics, which cannot be imported without TensorFlow.
    """
    if row["targets"] == row["prediction"]:
        return 1.0
    t, p = collections.Counter(words(row["targets"])), collections.Counter(words(row["prediction"]))
    return 2 * (t & p).total() / (t.total() + p.total()) if t and p else 0.0


Pieces = list[tuple[str, bool]]  # of a text, which they make up; and whether the other text lacks them


def differences(target: str, prediction: str) -> tuple[Pieces, Pieces]:
    """Both texts in pieces, those marked that the other lacks; what `words` does not see is no difference."""
    texts = [re.findall(r"\S+\s*|\s+", text) for text in (target, prediction)]
    keys = [["".join(words(token)) for token in tokens] for tokens in texts]
    places = [[i for i, key in enumerate(k) if key] for k in keys]
    seen = [[k[i] for i in place] for k, place in zip(keys, places, strict=True)]
    alone: tuple[set[int], set[int]] = (set(), set())
    for kind, *spans in difflib.SequenceMatcher(None, *seen, autojunk=False).get_opcodes():
        if kind != "equal":
            for side, (first, last) in enumerate((spans[:2], spans[2:])):
                alone[side].update(places[side][first:last])
    marked = [[(token, i in side) for i, token in enumerate(t)] for t, side in zip(texts, alone, strict=True)]
    return marked[0], marked[1]
