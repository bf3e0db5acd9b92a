"""The quickstart mixture: three tasks on the text that ships with Python, with their own small vocabulary.

  quickstart_span_corruption   T5's pre-training objective on the language reference and the docstrings
  quickstart_source            classification: "source sentence: ..." to the topic of the sentence: class, function,
                               module or language, in equal numbers
  quickstart_qa                SQuAD-style questions: the default of a parameter, given the signature and summary of a
                               function; the exception that a sentence mentions
  quickstart                   the mixture of the three

Text and vocabulary are loaded on first use. The vocabulary is trained on the training split in a few seconds and cached
in `$XDG_CACHE_HOME/t5x_lite` (or ~/.cache/t5x_lite). `baselines` returns reference scores.

Must not import: models, training.
"""

import collections
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import sentencepiece
import seqio
import tensorflow as tf
from absl import logging

from tasks import data_sources, metrics, objectives, preprocessors, stdlib_text
from tasks.errors import UserFileError
from tasks.vocabulary import trainer

# These lengths fit every example of the mixture; 32 is the length of span corruption targets for 128 inputs.
FEATURE_LENGTHS = {"inputs": 128, "targets": 32}
# Mixing rates. A span corruption example fills a row; three or four examples of the other tasks are packed into one.
RATES = {"quickstart_span_corruption": 1.0, "quickstart_source": 1.0, "quickstart_qa": 2.0}

EXTRA_IDS = 100
PIECES = 4096 - EXTRA_IDS
_TRAINER = {"size": PIECES, "character_coverage": 0.9999, "threads": 1}  # more threads would change the result

# ----------------------------------------------------------------------------------------------------------- vocabulary


def _vocabulary_lines() -> list[str]:
    """Return the training text of the vocabulary: the training split of all three tasks, and template words."""
    prose = [s for passage in stdlib_text.texts()["train"].passages for s in passage.sentences]
    question_lines = [f"question: {q.question} context: {q.context}" for q in stdlib_text.questions("train")]
    templates = [f"source sentence: {kind}" for kind in stdlib_text.KINDS] * (len(prose) // 50)
    return prose + question_lines + templates


def _cache_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "t5x_lite"


@functools.cache
def vocabulary_file() -> str:
    """Return the path of the SentencePiece model, trained now if it is not cached for this text.

    The model is written to a temporary file and renamed, so interrupted or concurrent runs are safe. Raises
    UserFileError if the cache folder cannot be written.
    """
    lines = _vocabulary_lines()
    settings = json.dumps([_TRAINER, sentencepiece.__version__])
    digest = hashlib.sha256("\n".join([settings, *lines]).encode()).hexdigest()
    path = _cache_folder() / f"quickstart-{digest[:16]}" / "sentencepiece.model"
    if not path.exists():
        logging.info("quickstart: training a vocabulary of %d pieces on %d lines, to %s", PIECES, len(lines), path)
        try:
            trainer.train(lines, str(path), **_TRAINER)
        except OSError as error:
            raise UserFileError(f"{error}: set XDG_CACHE_HOME to a writable folder for the vocabulary") from error
    return str(path)


class _Vocabulary(seqio.SentencePieceVocabulary):
    """The quickstart vocabulary, whose file is created on first use."""

    def __init__(self) -> None:
        super().__init__("", extra_ids=EXTRA_IDS)

    def __reduce__(self):
        return _the_vocabulary, ()  # copies are the same object

    @property
    def sentencepiece_model_file(self) -> str:
        return vocabulary_file()

    def _model_context(self):
        self._sentencepiece_model_file = vocabulary_file()
        return super()._model_context()


VOCABULARY = _Vocabulary()


def _the_vocabulary() -> _Vocabulary:
    return VOCABULARY


# ---------------------------------------------------------------------------------------------------------------- tasks


def _column(texts: list[str]) -> np.ndarray:
    return np.array([text.encode() for text in texts], object)


def _read_passages(paths: list[str], split: str) -> data_sources.Columns:
    passages = stdlib_text.texts()[split].passages
    return {"inputs": _column([""] * len(passages)), "targets": _column([" ".join(p.sentences) for p in passages])}


def _read_labelled(paths: list[str], split: str) -> data_sources.Columns:
    rows = stdlib_text.labelled_sentences(split)
    labels = np.array([stdlib_text.KINDS.index(kind) for _, kind in rows], np.int64)
    return {"sentence": _column([sentence for sentence, _ in rows]), "label": labels, "idx": np.arange(len(rows))}


def _read_questions(paths: list[str], split: str) -> data_sources.Columns:
    rows = stdlib_text.questions(split)
    answers, ends = _column([a for q in rows for a in q.answers]), np.cumsum([0] + [len(q.answers) for q in rows])
    return {
        "id": _column([f"{split}-{i}" for i in range(len(rows))]),
        "context": _column([q.context for q in rows]),
        "question": _column([q.question for q in rows]),
        "answers": {"text": tf.RaggedTensor.from_row_splits(answers, ends)},  # pyright: ignore[reportAttributeAccessIssue]
    }


_ORIGIN = {split: [f"the standard library's text, {split}"] for split in stdlib_text.SPLITS}
_TOKENIZE = [seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder()]
_LABELS = list(stdlib_text.KINDS)


def _add_task(name: str, read, steps: list, **settings) -> None:
    seqio.TaskRegistry.add(
        name,
        source=data_sources.MemorySource(_ORIGIN, read),
        preprocessors=[*steps, seqio.preprocessors.append_eos_after_trim],
        output_features={key: seqio.Feature(VOCABULARY, add_eos=True) for key in ("inputs", "targets")},
        task_cls=data_sources.CorpusTask,
        **settings,
    )


_add_task("quickstart_span_corruption", _read_passages, [*_TOKENIZE, objectives.span_corruption], metric_fns=[])
_add_task(
    "quickstart_source",
    _read_labelled,
    [functools.partial(preprocessors.glue, prefix="source", text_features=["sentence"], labels=_LABELS), *_TOKENIZE],
    postprocess_fn=functools.partial(metrics.string_to_class, labels=_LABELS),
    metric_fns=[metrics.accuracy],
)
_add_task(
    "quickstart_qa",
    _read_questions,
    [preprocessors.squad_unpadded, *_TOKENIZE],
    postprocess_fn=metrics.qa_answers,
    metric_fns=[metrics.squad],
)
seqio.MixtureRegistry.add("quickstart", list(RATES.items()))

# ------------------------------------------------------------------------------------------------------------ baselines


def baselines(feature_lengths: Mapping[str, int] = FEATURE_LENGTHS) -> dict[str, dict[str, float | str]]:
    """Return baseline scores on `validation` by task: metrics with the task's names, and `what`, a description.

    `loss` is in nats per target token, including EOS and sentinels; compare it with the cross entropy without z-loss.
    """
    return {
        "quickstart_span_corruption": _unigram_baseline(feature_lengths),
        "quickstart_source": _majority_baseline(),
        "quickstart_qa": _question_baseline(),
    }


def _unigram_baseline(feature_lengths: Mapping[str, int]) -> dict[str, float | str]:
    """Return the lowest loss of a model that ignores the inputs and the order of the target tokens."""
    task = seqio.get_mixture_or_task("quickstart_span_corruption")
    dataset = task.get_dataset(feature_lengths, "validation", shuffle=False, seed=0)
    counts = collections.Counter(int(token) for x in dataset.as_numpy_iterator() for token in x["targets"])
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    return {"loss": entropy, "what": "entropy of the validation targets' own token frequencies"}


def _majority_baseline() -> dict[str, float | str]:
    kinds = collections.Counter(kind for _, kind in stdlib_text.labelled_sentences("train"))
    majority = max(kinds, key=lambda kind: (kinds[kind], kind))
    rows = stdlib_text.labelled_sentences("validation")
    score = metrics.accuracy([kind for _, kind in rows], [majority] * len(rows))
    return {**score, "what": f"always {majority!r}, the most frequent class (or tied)"}


def _question_baseline() -> dict[str, float | str]:
    """Score, per form of question, the fixed answer or context position that is best on `train`."""
    rules: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for q in stdlib_text.questions("train"):
        accepted = {metrics.normalize_answer(answer) for answer in q.answers}
        words = q.context.split()
        positions = {i for i in range(-len(words), len(words)) if metrics.normalize_answer(words[i]) in accepted}
        rules[_form(q)].update([q.answers[0], *sorted(positions)])
    best = {form: counts.most_common(1)[0][0] for form, counts in rules.items()}

    def answer(q: stdlib_text.Question) -> str:
        rule, words = best[_form(q)], q.context.split()
        if isinstance(rule, str):
            return rule
        return words[rule] if -len(words) <= rule < len(words) else ""

    rows = stdlib_text.questions("validation")
    score = metrics.squad([list(q.answers) for q in rows], [answer(q) for q in rows])
    rule_texts = [f"{k} ...? {repr(rule) if isinstance(rule, str) else f'word {rule}'}" for k, rule in best.items()]
    return {
        **score,
        "what": f"the best fixed answer or context position per form of question ({', '.join(sorted(rule_texts))})",
    }


def _form(question: stdlib_text.Question) -> str:
    return question.question.split()[0]
