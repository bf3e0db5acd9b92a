"""Closed-book question answering as in Roberts et al. 2020: `nq question: ...` -> answer, from what a model knows.

  natural_questions_open   `nq question: `          first answer; scored as SQuAD against all
  web_questions_open       `wq question: `          the same
  trivia_qa_open           `trivia_qa question: `   the answer's value; scored as TriviaQA against its aliases

As in google-research's t5_closed_book_qa, the validation split is the end of TFDS's training split, and the test split
the corpus's validation split (WebQuestions: test). NAME_test trains on all that is not tested: there TriviaQA's test
split has no answers, and the others' validation split is what is tested.

Reads nq_open/NQ-open.{train,dev}.jsonl, web_questions/webquestions.examples.{train,test}.json and
trivia_qa/triviaqa-unfiltered/unfiltered-web-*.json, or TFDS natural_questions_open:1.0.0, web_questions:1.0.0 and
trivia_qa/unfiltered.nocontext:1.1.0. TFDS's order, which says what is held out, is made here too. Must not import:
mixtures, models.
"""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping

import tensorflow as tf

from tasks import data_sources, metrics, preprocessors, readers, text_to_text, trivia_qa

Question = tuple[str, str, str, list[str]]  # TFDS's key, question, target, answers

# --------------------------------------------------------------------------------------------------------------- files


def nq_rows(path: str) -> Iterator[Question]:
    """Yield Natural Questions' rows; the target is the first answer."""
    skipped = readers.Skipped(path)
    for number, (where, row) in enumerate(readers.json_lines(path, skipped)):
        with skipped:
            answers = [readers.as_text(where, "answer", x) for x in readers.field(where, row, "answer", list)]
            if not answers:
                raise readers.BadRow(f"{where}: no answer")
            yield str(number), readers.field(where, row, "question"), answers[0], answers


_DESCRIPTION = re.compile(r"\(description (?:\"([^\"]+?)\"|([^)]+?))\)\w*")


def wq_rows(path: str) -> Iterator[Question]:
    """Yield WebQuestions' rows; the answers are the descriptions of `targetValue`, and the target is the first."""
    skipped = readers.Skipped(path)
    for number, (line, row) in enumerate(readers.json_rows(path, skipped)):
        with skipped:
            where = f"{path}:{line}"
            value = re.sub(r"^\(list |\)$", "", readers.field(where, row, "targetValue"))
            answers = ["".join(parts) for parts in _DESCRIPTION.findall(value)]
            if not answers:
                raise readers.BadRow(f"{where}: no (description ...) in targetValue {value[:60]!r}")
            yield str(number), readers.field(where, row, "utterance"), answers[0], answers


def tqa_rows(path: str) -> Iterator[Question]:
    """Yield TriviaQA's rows; the target is the answer's value, "<unk>" without an answer."""
    for row, _ in trivia_qa.questions(path):
        key = f"{os.path.basename(path)}_{row['question_id']}"
        yield key, row["question"], row["answer/value"], row["answer/aliases"]


def read(
    paths: list[str],
    split: str,
    rows: Callable[[str], Iterator[Question]],
    slices: Mapping[str, tuple[str, slice]],
) -> data_sources.Columns:
    """Return question, target and answers, of files or of a part of them.

    Args:
      slices: split -> the split of TFDS that it is a part of, and which part in TFDS's order. Others are whole.
    """
    questions = [row for path in paths for row in rows(path)]
    if split in slices:
        tfds_split, part = slices[split]
        order = sorted(questions, key=lambda row: hashlib.md5(f"{tfds_split}{row[0]}".encode()).digest())
        questions = order[part]
    _, texts, targets, answers = zip(*questions, strict=True) if questions else ((), (), (), ())
    return {
        "question": data_sources.texts_column(texts),
        "target": data_sources.texts_column(targets),
        "answers": data_sources.lists_column(answers),
    }


# ---------------------------------------------------------------------------------------------------------------- text


def with_prefix(dataset: tf.data.Dataset, prefix: str) -> tf.data.Dataset:
    """Make inputs `PREFIX question: ...` from TFDS's features of any of the corpora, or those of `read`."""

    def to_text(x: preprocessors.Example) -> preprocessors.Example:
        answers, target = x.get("answers", x.get("answer")), x.get("target")
        if isinstance(answers, dict):  # TriviaQA in TFDS
            answers, target = answers["aliases"], answers["value"]
        assert answers is not None
        target = answers[0] if target is None else target
        return {
            "inputs": tf.strings.join([f"{prefix} question: ", x["question"]]),
            "targets": target,
            "answers": answers,
        }

    return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE)


# --------------------------------------------------------------------------------------------------------------- tasks


@dataclasses.dataclass(frozen=True)
class ClosedBook:
    """A corpus of questions.

    Args:
      name: the task's name; NAME_test is the task for the test set.
      prefix: first word of the inputs.
      folder, tfds_name: where the corpus lies, and its name in TFDS.
      rows: reader of its files.
      files: TFDS's split -> file pattern.
      train_size: the number of TFDS's training examples that are trained on; the others are the validation split.
      test: TFDS's split that is the test split.
      final: splits of NAME_test -> TFDS's.
    """

    name: str
    prefix: str
    folder: str
    tfds_name: str
    rows: Callable[[str], Iterator[Question]]
    files: Mapping[str, str]
    train_size: int
    test: str
    final: Mapping[str, str]
    metric: Callable = metrics.squad


CONFIGS = (
    ClosedBook(
        "natural_questions_open", "nq", "nq_open", "natural_questions_open:1.0.0", nq_rows,
        {"train": "NQ-open.train.jsonl", "validation": "NQ-open.dev.jsonl"},
        79_168, "validation", {"train": "train", "validation": "validation"},
    ),
    ClosedBook(
        "web_questions_open", "wq", "web_questions", "web_questions:1.0.0", wq_rows,
        {"train": "webquestions.examples.train.json", "test": "webquestions.examples.test.json"},
        3_417, "test", {"train": "train", "validation": "test"},
    ),
    ClosedBook(
        "trivia_qa_open", "trivia_qa", "trivia_qa/triviaqa-unfiltered", "trivia_qa/unfiltered.nocontext:1.1.0",
        tqa_rows,
        {
            "train": "*-train.json",
            "validation": "*-dev.json",
            "test": "*test-without-answers.json",
            "train+validation": "*-[td]*[nv].json",
        },
        78_785, "validation", {"train": "train+validation", "test": "test"}, metrics.trivia_qa,
    ),
)  # fmt: skip


def _add(config: ClosedBook, name: str, splits: Mapping[str, str], slices: Mapping[str, tuple[str, slice]]) -> None:
    tfds_splits = dict(splits)
    for split, (tfds_split, part) in slices.items():
        start, stop = ("" if end is None else end for end in (part.start, part.stop))
        tfds_splits[split] = f"{tfds_split}[{start}:{stop}]"
    text_to_text.add(
        name,
        data_sources.CorpusSource(
            folder=config.folder,
            files={split: config.files[tfds_split] for split, tfds_split in splits.items()},
            build=functools.partial(
                data_sources.MemorySource, read=functools.partial(read, rows=config.rows, slices=slices)
            ),
            tfds_name=config.tfds_name,
            tfds_splits=tfds_splits,
        ),
        [functools.partial(with_prefix, prefix=config.prefix)],
        [config.metric],
        metrics.qa_answers,
    )


for _config in CONFIGS:
    _size = _config.train_size
    _add(
        _config,
        _config.name,
        {"train": "train", "validation": "train", "test": _config.test},
        {"train": ("train", slice(None, _size)), "validation": ("train", slice(_size, None))},
    )
    _add(_config, f"{_config.name}_test", _config.final, {})
