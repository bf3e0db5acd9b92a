"""Metrics and postprocessors for GLUE, SuperGLUE, question answering, translation and text-to-text tasks in general.

Metrics take decoded, postprocessed targets and predictions and return percentages. A prediction that cannot be parsed
counts as wrong and raises no error. Definitions are those of the t5 package (evaluation/metrics.py), for SQuAD those of
the official v1.1 script. Must not import: models, datasets, TensorFlow.
"""

import collections
import functools
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    context = _given(example)["context"]
    answers = qa_answers(text, example, is_target)
    return {"answers": answers, "context": context.decode() if isinstance(context, bytes) else str(context)}


def qa_answers(text: str, example: dict | None = None, is_target: bool = False) -> str | list[str]:
    """Return a prediction unchanged; for a target, all accepted answers of the example."""
    if not is_target:
        return text
    return [a.decode() if isinstance(a, bytes) else str(a) for a in _given(example)["answers"]]


def multirc(text: str, example: dict | None = None, is_target: bool = False) -> dict:
    """Return {"value": class of "False" or "True"}; for a target also its "group", the question."""
    value = {"value": string_to_class(text, ("False", "True"))}
    return value | {"group": int(_given(example)["idx/question"])} if is_target else value


def record(text: str, example: dict | None = None, is_target: bool = False) -> dict:
    """Return {"value": prediction}; for a target {"value": all answers, "group": (passage, query)}."""
    if not is_target:
        return {"value": text}
    example = _given(example)
    group = int(example["idx/passage"]), int(example["idx/query"])
    return {"value": qa_answers(text, example, is_target), "group": group}


_DETERMINERS = frozenset(
    "a an few her his each every many much my our some that the their these this those which whose your".split()
)


def wsc_simple(text: str, example: dict | None = None, is_target: bool = False) -> int:
    """Return 1 if a predicted noun is the example's candidate, else 0; for a target, the label.

    Either may have more words than the other ("bunny", "the fuzzy bunny"), but a possessive is never equal to a noun
    without one. Case and determiners do not count. A prediction without other words is -1, which is always wrong.
    """
    example = _given(example)
    if is_target:
        return int(example["label"])
    candidate = example["targets_pretokenized"]
    candidate = candidate.decode() if isinstance(candidate, bytes) else str(candidate)
    predicted, wanted = _without_determiners(text), _without_determiners(candidate)
    if not predicted:
        return -1
    if ("'" in predicted) != ("'" in wanted):
        return 0
    predicted, wanted = set(predicted.split(" ")), set(wanted.split(" "))
    return int(predicted <= wanted or wanted <= predicted)


def _without_determiners(text: str) -> str:
    return " ".join(word for word in text.strip().lower().split(" ") if word not in _DETERMINERS)


def _given(example: dict | None) -> dict:
    assert example is not None, "SeqIO passes the example with each target and prediction"
    return example


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


def mean_3class_f1(targets: Sequence[int], predictions: Sequence[int]) -> Metrics:
    """Mean F1 of the three classes of CommitmentBank; the F1 of a class that never occurs is 0.

    A prediction that is none of the classes only lacks in its target's recall.
    """
    t, p = np.asarray(targets), np.asarray(predictions)
    right = np.array([np.sum((t == c) & (p == c)) for c in range(3)])
    either = np.array([np.sum(t == c) + np.sum(p == c) for c in range(3)])
    return {"mean_3class_f1": 100 * float(np.mean(2 * right / np.maximum(either, 1)))}


# --------------------------------------------------------------------------------------------------------------- groups


def multirc_f1_over_all_answers(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> Metrics:
    """F1 of MultiRC's answers, each counted by itself; see `f1_score_with_invalid`."""
    return f1_score_with_invalid([t["value"] for t in targets], [p["value"] for p in predictions])


def all_match(targets: Sequence, predictions: Sequence) -> Metrics:
    """Exact match of two whole lists: 100 or 0."""
    return {"exact_match": 100.0 * (list(targets) == list(predictions))}


def mean_group_metric(metric: Callable[..., Metrics]) -> Callable[..., Metrics]:
    """Return the mean of a metric over groups of examples, where targets and predictions are {"value": ...}.

    Targets also have their "group". A group of which only some examples are evaluated counts like a whole one.
    """

    def mean_over_groups(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> Metrics:
        groups: dict[Any, tuple[list, list]] = collections.defaultdict(lambda: ([], []))
        for target, prediction in zip(targets, predictions, strict=True):
            groups[target["group"]][0].append(target["value"])
            groups[target["group"]][1].append(prediction["value"])
        scores = [metric(*pair) for pair in groups.values()]
        return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]} if scores else {}

    return _named(mean_over_groups, f"mean_group_{metric.__name__}")


def deduplicate_metric(metric: Callable[..., Metrics]) -> Callable[..., Metrics]:
    """Return a metric of the first example of each group: ReCoRD has one for each of a question's answers."""

    def of_first_in_group(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> Metrics:
        first: dict[Any, tuple] = {}
        for target, prediction in zip(targets, predictions, strict=True):
            first.setdefault(target["group"], (target["value"], prediction["value"]))
        return metric([target for target, _ in first.values()], [prediction for _, prediction in first.values()])

    return _named(of_first_in_group, f"deduplicated_{metric.__name__}")


def _named(function: Callable[..., Metrics], name: str) -> Callable[..., Metrics]:
    function.__name__ = function.__qualname__ = name
    return function


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


_TRIVIA_QA_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4`", " "))


def normalize_trivia_qa(text: str) -> str:
    """Normalise as TriviaQA does: like SQuAD, but punctuation, to which some quotes belong, becomes a space."""
    text = text.lower().translate(_TRIVIA_QA_PUNCTUATION)
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
    return _qa(normalize_answer, targets, predictions)


def trivia_qa(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Metrics:
    """TriviaQA's exact match and F1: `squad` with TriviaQA's normalisation."""
    return _qa(normalize_trivia_qa, targets, predictions)


def _qa(normalize: Callable[[str], str], targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Metrics:
    em, f1 = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        prediction = normalize(prediction)
        normalized = [normalize(answer) for answer in answers]
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


def bleu(targets: Sequence[str] | Sequence[Sequence[str]], predictions: Sequence[str]) -> Metrics:
    """BLEU of a corpus by sacreBLEU, with its international tokeniser and exponential smoothing, cased.

    Args:
      targets: one reference for each prediction, or, as in sacreBLEU and t5, lists of references, each of all examples.
    """
    import sacrebleu  # slow to import

    references: list[Any] = [targets] if isinstance(targets[0], str) else [*targets]
    score = sacrebleu.corpus_bleu(
        predictions, references, smooth_method="exp", smooth_value=0.0, lowercase=False, tokenize="intl",
        use_effective_order=False,
    )  # fmt: skip
    return {"bleu": float(score.score)}


def sequence_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """Percentage of predictions that are their target, letter by letter."""
    return {"sequence_accuracy": accuracy(targets, predictions)["accuracy"]}


def text_match(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """Exact match without normalisation, and F1 of words after SQuAD's normalisation, for any text-to-text task."""
    f1 = [token_f1(normalize_answer(t), normalize_answer(p)) for t, p in zip(targets, predictions, strict=True)]
    equal = [t == p for t, p in zip(targets, predictions, strict=True)]
    return {"exact_match": 100 * float(np.mean(equal)), "f1": 100 * float(np.mean(f1))}


# ------------------------------------------------------------------------------------------------------------- averages

# The parts of a benchmark's average in the T5 paper; each is the mean of the listed metrics.
Average = Sequence[Mapping[str, tuple[str, ...]]]

GLUE_AVERAGE: Average = (
    {"glue_cola_v002": ("matthews_corrcoef",)},
    {"glue_sst2_v002": ("accuracy",)},
    {"glue_mrpc_v002": ("f1", "accuracy")},
    {"glue_stsb_v002": ("pearson_corrcoef", "spearman_corrcoef")},
    {"glue_qqp_v002": ("f1", "accuracy")},
    {"glue_mnli_matched_v002": ("accuracy",), "glue_mnli_mismatched_v002": ("accuracy",)},
    {"glue_qnli_v002": ("accuracy",)},
    {"glue_rte_v002": ("accuracy",)},
)
SUPER_GLUE_AVERAGE: Average = (
    {"super_glue_boolq_v102": ("accuracy",)},
    {"super_glue_cb_v102": ("mean_3class_f1", "accuracy")},
    {"super_glue_copa_v102": ("accuracy",)},
    {"super_glue_multirc_v102": ("f1", "exact_match")},
    {"super_glue_record_v102": ("f1", "em")},
    {"super_glue_rte_v102": ("accuracy",)},
    {"super_glue_wic_v102": ("accuracy",)},
    {"super_glue_wsc_v102_simple_eval": ("accuracy",)},
)
# Name in the results -> parts. A benchmark's tasks have names that begin with it.
AVERAGES: Mapping[str, Average] = {"glue": GLUE_AVERAGE, "super_glue": SUPER_GLUE_AVERAGE}


def average_missing(benchmark: str, scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the scores that {task: {metric: score}} lacks for a benchmark's average, as "task/metric"."""
    scores = _without_sentinels(scores)
    needed = [(task, name) for part in AVERAGES[benchmark] for task, names in part.items() for name in names]
    return [f"{task}/{name}" for task, name in needed if name not in scores.get(task, {})]


def average(benchmark: str, scores: Mapping[str, Mapping[str, float]]) -> float:
    """Return the T5 paper's average of a benchmark from {task: {metric: score}}; other tasks (WNLI, AX) are ignored.

    Raises ValueError if a score is missing, because an average of fewer tasks is not comparable.
    """
    if missing := average_missing(benchmark, scores):
        raise ValueError(f"no average of {benchmark} without {', '.join(missing)}")
    scores = _without_sentinels(scores)
    parts = ([scores[task][name] for task in part for name in part[task]] for part in AVERAGES[benchmark])
    return float(np.mean([np.mean(part) for part in parts]))


def _without_sentinels(scores: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
    """Return scores in which a twin with a sentinel (see tasks.sentinels) stands for its task, if that is not there."""
    return {task.replace("_1_sentinel", ""): values for task, values in scores.items()} | dict(scores)


glue_average = functools.partial(average, "glue")
super_glue_average = functools.partial(average, "super_glue")
