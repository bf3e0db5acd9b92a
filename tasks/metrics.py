"""Metrics and postprocessors for GLUE, SQuAD and text-to-text tasks in general.

Metrics take decoded, postprocessed targets and predictions and return percentages. A prediction that cannot be parsed
counts as wrong and raises no error. Definitions are those of the t5 package (evaluation/metrics.py), for SQuAD those of
the official v1.1 script. Must not import: models, datasets, TensorFlow.
"""

import collections
import math
import re
import string
from collections.abc import Mapping, Sequence

import numpy as np

Metrics = dict[str, float]

# ------------------------------------------------------------------------------------------------- postprocessors


def string_to_class(text: str, labels: Sequence[str], **unused) -> int:
    """Return the index of `text` in the label words, or -1 (always wrong) if it is not one of them."""
    return labels.index(text) if text in labels else -1


def string_to_float(text: str, default: float = -1.0, **unused) -> float:
    """Return the number in `text`, or `default` if it is not a finite number."""
    try:
        value = float(text)
    except ValueError:
        return default
    return value if math.isfinite(value) else default


def span_answers(text: str, example: dict | None = None, is_target: bool = False) -> str | dict:
    """Return a prediction unchanged; for a target, all answers of the example and its context, for `span_squad`."""
    if not is_target:
        return text
    assert example is not None, "SeqIO passes the example with each target"
    context = example["context"]
    answers = qa_answers(text, example, is_target)
    return {"answers": answers, "context": context.decode() if isinstance(context, bytes) else str(context)}


def qa_answers(text: str, example: dict | None = None, is_target: bool = False) -> str | list[str]:
    """Return a prediction unchanged; for a target, all accepted answers of the example."""
    if not is_target:
        return text
    assert example is not None, "SeqIO passes the example with each target"
    return [a.decode() if isinstance(a, bytes) else str(a) for a in example["answers"]]


# -------------------------------------------------------------------------------------------------------------- classes


def accuracy(targets: Sequence, predictions: Sequence) -> Metrics:
    """Percentage of predictions equal to their targets."""
    return {"accuracy": 100 * float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))}


def f1_score_with_invalid(targets: Sequence[int], predictions: Sequence[int]) -> Metrics:
    """F1 of class 1 of two classes; any other prediction counts as the wrong class."""
    t, p = np.asarray(targets), np.asarray(predictions)
    p = np.where((p == 0) | (p == 1), p, 1 - t)
    both, either = np.sum((t == 1) & (p == 1)), np.sum(t == 1) + np.sum(p == 1)
    return {"f1": 100 * float(2 * both / either) if either else 0.0}


def matthews_corrcoef(targets: Sequence[int], predictions: Sequence[int]) -> Metrics:
    """Matthews correlation for any number of classes (invalid predictions are an extra class); 0 if undefined.

    Source: Gorodkin 2004, as in scikit-learn, which t5 uses.
    """
    t, p = np.asarray(targets), np.asarray(predictions)
    classes = np.union1d(t, p)
    t_count = np.array([np.sum(t == c) for c in classes], np.float64)
    p_count = np.array([np.sum(p == c) for c in classes], np.float64)
    n, right = float(t.size), float(np.sum(t == p))
    spread = (n**2 - p_count @ p_count) * (n**2 - t_count @ t_count)
    return {"matthews_corrcoef": 100 * float((right * n - t_count @ p_count) / math.sqrt(spread)) if spread else 0.0}


# -------------------------------------------------------------------------------------------------------------- numbers


def pearson_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> Metrics:
    """Pearson correlation; 0 if undefined (all predictions equal)."""
    return {"pearson_corrcoef": _correlation("pearsonr", targets, predictions)}


def spearman_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> Metrics:
    """Spearman rank correlation; 0 if undefined (all predictions equal)."""
    return {"spearman_corrcoef": _correlation("spearmanr", targets, predictions)}


def _correlation(name: str, targets: Sequence[float], predictions: Sequence[float]) -> float:
    if np.ptp(targets) == 0 or np.ptp(predictions) == 0:
        return 0.0
    import scipy.stats  # takes half a second to import

    return 100 * float(getattr(scipy.stats, name)(targets, predictions)[0])


# ----------------------------------------------------------------------------------------------------------------- text

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Normalise as SQuAD does: lower case, no ASCII punctuation, no articles, single spaces."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(target: str, prediction: str) -> float:
    """F1 of the words of two normalised texts, in 0..1; 0 if they have no common word."""
    t, p = target.split(), prediction.split()
    common = sum((collections.Counter(t) & collections.Counter(p)).values())
    if not common:
        return 0.0
    precision, recall = common / len(p), common / len(t)
    return 2 * precision * recall / (precision + recall)


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Metrics:
    """SQuAD v1.1 exact match and F1: for each question the best over its answers, after normalisation."""
    em, f1 = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        prediction = normalize_answer(prediction)
        normalized = [normalize_answer(answer) for answer in answers]
        em.append(any(answer == prediction for answer in normalized))
        f1.append(max(token_f1(answer, prediction) for answer in normalized))
    return {"em": 100 * float(np.mean(em)), "f1": 100 * float(np.mean(f1))}


def span_squad(targets: Sequence[Mapping], predictions: Sequence[str]) -> Metrics:
    """`squad` on the context words that predictions like "start: 3 end: 6" select; as in t5, see tasks.squad.

    Args:
      targets: {"answers": all answers, "context": text}, from `span_answers`.
      predictions: a prediction without two numbers in this form selects nothing.
    """
    texts = [_span(target["context"], prediction) for target, prediction in zip(targets, predictions, strict=True)]
    return squad([target["answers"] for target in targets], texts)


def _span(context: str, prediction: str) -> str:
    words = re.sub(r"\W", " ", prediction).split()
    try:
        start, end = int(words[1]), int(words[3])
    except (IndexError, ValueError):
        return ""
    return " ".join(re.sub(r"\W", " ", context).split()[start : end + 1])


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """ROUGE-1, ROUGE-2 and sentence-wise ROUGE-L (rougeLsum): mean F-measures by Google's rouge-score.

    Sentences are split as in t5. t5 returns the midpoint of a bootstrap, which is random and close to this mean.
    """
    from rouge_score import rouge_scorer  # slow to import

    names = ("rouge1", "rouge2", "rougeLsum")
    scorer = rouge_scorer.RougeScorer(names)
    pairs = zip(targets, predictions, strict=True)
    scores = [scorer.score(t.replace(" . ", " .\n"), p.replace(" . ", " .\n")) for t, p in pairs]
    return {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in names}


def text_match(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """Exact match without normalisation, and F1 of words after SQuAD's normalisation, for any text-to-text task."""
    f1 = [token_f1(normalize_answer(t), normalize_answer(p)) for t, p in zip(targets, predictions, strict=True)]
    equal = [t == p for t, p in zip(targets, predictions, strict=True)]
    return {"exact_match": 100 * float(np.mean(equal)), "f1": 100 * float(np.mean(f1))}


# ------------------------------------------------------------------------------------------------------------- averages

# The eight scores whose mean is the T5 paper's GLUE average; each is the mean of the listed metrics.
GLUE_AVERAGE: tuple[Mapping[str, tuple[str, ...]], ...] = (
    {"glue_cola_v002": ("matthews_corrcoef",)},
    {"glue_sst2_v002": ("accuracy",)},
    {"glue_mrpc_v002": ("f1", "accuracy")},
    {"glue_stsb_v002": ("pearson_corrcoef", "spearman_corrcoef")},
    {"glue_qqp_v002": ("f1", "accuracy")},
    {"glue_mnli_matched_v002": ("accuracy",), "glue_mnli_mismatched_v002": ("accuracy",)},
    {"glue_qnli_v002": ("accuracy",)},
    {"glue_rte_v002": ("accuracy",)},
)


def glue_missing(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the scores that {task: {metric: score}} lacks for the GLUE average, as "task/metric"."""
    needed = [(task, name) for part in GLUE_AVERAGE for task, names in part.items() for name in names]
    return [f"{task}/{name}" for task, name in needed if name not in scores.get(task, {})]


def glue_average(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Return the GLUE average of the T5 paper from {task: {metric: score}}; other tasks (WNLI, AX) are ignored.

    Raises ValueError if a score is missing, because an average of fewer tasks is not comparable.
    """
    if missing := glue_missing(scores):
        raise ValueError(f"no GLUE average without {', '.join(missing)}")
    return float(
        np.mean([np.mean([scores[task][name] for task in part for name in part[task]]) for part in GLUE_AVERAGE])
    )
