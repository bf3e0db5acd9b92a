"""TriviaQA with context, `trivia_qa_v010`: an example for each answer in each document that has it.

Reads trivia_qa/, the unpacked triviaqa-rc.tar.gz: qa/*-{train,dev}.json and qa/*test-without-answers.json name
documents in evidence/{wikipedia,web}/, which are read when their question's turn comes; those that are not there are
left out, as in TFDS, and the log says so. Or reads TFDS trivia_qa/rc:1.1.0. Must not import: mixtures, models.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf
from absl import logging

from tasks import block_source, data_sources, objectives, preprocessors, readers, text_to_text

# --------------------------------------------------------------------------------------------------------------- files

# What TFDS has of a question, as far as the text needs it.
FEATURES = {
    "question": str,
    "question_id": str,
    "answer/value": str,
    "answer/aliases": list,
    "answer/normalized_aliases": list,
}
_CONTEXTS = {"entity_pages/wiki_context": list, "search_results/search_context": list}
_FIELDS = frozenset(
    "Data Answer Question QuestionId Aliases NormalizedAliases Value EntityPages SearchResults Filename".split()
)


def questions(path: str) -> list[tuple[dict, dict[str, list[str]]]]:
    """Return a file's questions, each with the `FEATURES` and the names of its documents.

    Without an answer (test sets) the value is "<unk>". Raises BadRow for a question without what is needed.
    """
    content = readers.json_file(path, lambda x: {name: value for name, value in x.items() if name in _FIELDS})
    skipped, rows = readers.Skipped(path), []
    for number, item in enumerate(readers.field(path, content, "Data", list), start=1):
        with skipped:
            where = f"{path}: question {number}"
            question = readers.field(where, item, "Question").strip()
            answer = readers.field(where, item, "Answer", dict) if "Answer" in item else {}
            value = readers.field(where, answer, "Value").strip() if answer else "<unk>"
            row = {
                "question": question,
                "question_id": readers.field(where, item, "QuestionId"),
                "answer/value": value,
                "answer/aliases": _texts(where, answer, "Aliases"),
                "answer/normalized_aliases": _texts(where, answer, "NormalizedAliases"),
            }
            rows.append((row, {name: _documents(where, item, name) for name in ("EntityPages", "SearchResults")}))
    skipped.log()
    return rows


def _texts(where: str, answer: Mapping[str, Any], name: str) -> list[str]:
    values = readers.field(where, answer, name, list) if answer else []
    return [readers.as_text(where, name, value).strip() for value in values]


def _documents(where: str, item: Mapping[str, Any], name: str) -> list[str]:
    documents = readers.field(where, item, name, list) if name in item else []
    named = [document for document in documents if not isinstance(document, dict) or "Filename" in document]
    return [readers.field(where, document, "Filename") for document in named]


class _Questions:
    """The questions of a split, for `block_source.BlockSource`."""

    def __init__(self, paths: Sequence[str], split: str):
        self._rows = [(path, *row) for path in paths for row in questions(path)]
        self.size = self.examples = len(self._rows)
        self._missing = 0

    def read(self, block: int) -> list[block_source.Row]:
        path, row, documents = self._rows[block]
        evidence = os.path.join(os.path.dirname(os.path.dirname(path)), "evidence")
        pages = self._contexts(os.path.join(evidence, "wikipedia"), documents["EntityPages"])
        results = self._contexts(os.path.join(evidence, "web"), documents["SearchResults"])
        return [row | dict(zip(_CONTEXTS, (pages, results), strict=True))]

    def _contexts(self, folder: str, names: Sequence[str]) -> list[str]:
        texts = []
        for name in names:
            path = os.path.join(folder, name)
            if tf.io.gfile.exists(path):
                with tf.io.gfile.GFile(path, "rb") as file:
                    texts.append(readers.decode(path, file.read(), 1).strip())
            else:
                self._missing += 1
                if self._missing in (1, 10, 100, 1_000, 10_000, 100_000):
                    logging.warning("TriviaQA: %d documents left out, the last: %s does not exist", self._missing, path)
        return texts


def _read_files(files: dict[str, list[str]]) -> seqio.DataSource:
    return block_source.BlockSource(files, _Questions, FEATURES | _CONTEXTS)


# ---------------------------------------------------------------------------------------------------------------- text


def question_and_context(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Make `question: ... context: ...` for each document and each answer in it, with padded punctuation.

    The documents of Wikipedia come first, then those of the web; the target is a normalised answer. An answer is in a
    document if it is so as a pattern, without regard to the case of ASCII letters.
    """

    def examples(x: preprocessors.Example) -> preprocessors.Example:
        documents = [x["entity_pages"]["wiki_context"], x["search_results"]["search_context"]]
        contexts_C = preprocessors.pad_punctuation(tf.concat(documents, axis=0))
        answers_A = preprocessors.pad_punctuation(x["answer"]["normalized_aliases"])
        patterns_A = tf.strings.lower(tf.strings.join([".*", answers_A, ".*"]))
        lower_C = tf.strings.lower(contexts_C)
        in_document_AC = tf.map_fn(
            lambda pattern: tf.strings.regex_full_match(lower_C, pattern), patterns_A, fn_output_signature=tf.bool
        )
        places = tf.where(tf.transpose(in_document_AC))  # of a document and an answer
        question = preprocessors.pad_punctuation(x["question"])
        inputs_C = tf.strings.join(["question:", question, "context:", contexts_C], " ")
        inputs = tf.gather(preprocessors.one_space(inputs_C), places[:, 0])
        return {"inputs": inputs, "targets": tf.gather(answers_A, places[:, 1])}

    return dataset.map(examples, num_parallel_calls=tf.data.AUTOTUNE).unbatch()


def truncate_inputs(dataset: tf.data.Dataset, sequence_length: objectives.Lengths | None) -> tf.data.Dataset:
    """Cut inputs that are too long to a random stretch around the target's first occurrence.

    Long inputs without the target's tokens are dropped, as in t5. EOS is not counted: it takes the place of the last.
    """
    room = objectives.needed_lengths(sequence_length, "inputs")["inputs"]

    @seqio.map_over_dataset(num_seeds=1)
    def cut(x: preprocessors.Example, seed: tf.Tensor) -> preprocessors.Example:
        inputs, targets = x["inputs"], x["targets"]
        size, answer = tf.size(inputs), tf.size(targets)
        starts = tf.range(tf.maximum(size - answer + 1, 0))
        windows = tf.gather(inputs, starts[:, None] + tf.range(answer)[None])
        place = tf.boolean_mask(starts, tf.reduce_all(windows == targets, axis=1))[:1]

        def stretch() -> tf.Tensor:
            first = tf.maximum(0, place[0] - (room - answer))
            last = tf.minimum(place[0], size - room)
            start = tf.random.stateless_uniform([], minval=first, maxval=last + 1, dtype=tf.int32, seed=seed)
            return inputs[start : start + room]

        fits = tf.logical_and(tf.size(place) > 0, answer <= room)
        cut_inputs = tf.cond(size > room, lambda: tf.cond(fits, stretch, lambda: inputs[:0]), lambda: inputs)
        return {"inputs": cut_inputs, "targets": targets}

    pieces = cut(dataset)  # pyright: ignore[reportCallIssue]  SeqIO gives the seeds
    return pieces.filter(lambda x: tf.size(x["inputs"]) > 0)


text_to_text.add(
    "trivia_qa_v010",
    data_sources.CorpusSource(
        folder="trivia_qa",
        files={
            "train": "qa/*-train.json",
            "validation": "qa/*-dev.json",
            "test": "qa/*test-without-answers.json",
        },
        build=_read_files,
        tfds_name="trivia_qa/rc:1.1.0",
        tfds_splits=("train", "validation", "test"),
    ),
    [question_and_context],
    [],
    after_cache=[truncate_inputs],
)
