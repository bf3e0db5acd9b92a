"""The metrics that `METRICS` names, for texts of any task: from decoded targets and predictions to percentages.

A prediction that is not one of the classes, or not a number, counts as wrong and raises no error. Must not import:
models, datasets, TensorFlow.
"""

import collections
import difflib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tasks import metrics
from tasks.errors import UserError
from tasks.metrics import Metrics

Metric = Callable[[Sequence[str], Sequence[str]], Metrics]
text_match = metrics.text_match


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """Percentage of predictions equal to their targets, without normalisation."""
    return {"exact_match": 100 * float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))}


def f1(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """Mean F1 of the words of target and prediction, after SQuAD's normalisation."""
    return {"f1": metrics.text_match(targets, predictions)["f1"]}


def squad(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """SQuAD's exact match and F1 with a single answer for each question."""
    return metrics.squad([[target] for target in targets], predictions)


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """Percentage of predictions equal to their targets, white space around them aside."""
    return metrics.accuracy(_stripped(targets), _stripped(predictions))


def f1_macro(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """Mean over the classes among the targets of each class's F1, as scikit-learn's f1_score with these labels."""
    t, p = _stripped(targets), _stripped(predictions)
    right = collections.Counter(x for x, y in zip(t, p, strict=True) if x == y)
    sizes, predicted = collections.Counter(t), collections.Counter(p)
    scores = [2 * right[label] / (size + predicted[label]) for label, size in sizes.items()]
    return {"f1_macro": 100 * float(np.mean(scores))}


def matthews(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """Matthews correlation of any number of classes; predictions that are not targets are one class together."""
    classes = {label: k for k, label in enumerate(dict.fromkeys(_stripped(targets)))}
    t, p = ([classes.get(text, -1) for text in _stripped(texts)] for texts in (targets, predictions))
    return metrics.matthews_corrcoef(t, p)


def pearson(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """Pearson correlation of numbers; a prediction that is not a number counts as -1, as in t5."""
    return metrics.pearson_corrcoef(_numbers(targets), [metrics.string_to_float(text) for text in predictions])


def spearman(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """Spearman rank correlation of numbers; a prediction that is not a number counts as -1, as in t5."""
    return metrics.spearman_corrcoef(_numbers(targets), [metrics.string_to_float(text) for text in predictions])


def _stripped(texts: Iterable[str]) -> list[str]:
    return [text.strip() for text in texts]


def _numbers(targets: Sequence[str]) -> list[float]:
    for target in targets:
        check_number("a correlation", target)
    return [float(target) for target in targets]


def check_number(name: str, target: str) -> None:
    """Raise UserError if a target is not a number, which the metric `name` needs."""
    if np.isnan(metrics.string_to_float(target, default=float("nan"))):
        raise UserError(f"{name} needs targets that are numbers, not {target[:40]!r}: choose another of METRICS")


METRICS: dict[str, Metric] = {
    **{metric.__name__: metric for metric in (exact_match, f1, squad, accuracy, f1_macro, matthews, pearson, spearman)},
    "rouge": metrics.rouge,
    "bleu": metrics.bleu,
}
OF_NUMBERS = ("pearson", "spearman")


def named(names: str | Sequence[str] | None) -> list[Metric]:
    """Return metrics by name; None: exact match and F1. Raises UserError for a name that does not exist."""
    if names is None:
        return [metrics.text_match]
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METRICS)}."
            raise UserError(f"METRICS: no metric {name!r}; {hint}")
    chosen = [METRICS[name] for name in names]
    if len(chosen) > 1:
        keys: dict[str, str] = {}
        for name, metric in zip(names, chosen, strict=True):
            for key in metric(["0", "1"], ["0", "1"]):
                if key in keys:
                    raise UserError(f"METRICS: {keys[key]!r} and {name!r} both give {key!r}: leave one out")
                keys[key] = name
    return chosen
