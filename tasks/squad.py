"""SQuAD v1.1 tasks: with and without padded punctuation, closed-book, and with span targets.

  squad_v010_allanswers   t5's text, byte for byte: spaces around punctuation in question, context and answers. Use it
                          with t5's checkpoints and published scores; exact match compares padded answers.
  squad_v010              the same under an older name. t5's compares predictions with the letters of one answer.
  squad_v110              the dataset's text unchanged, scored like the official v1.1 script.
  squad_v010_context_free t5's closed-book task: the question only.
  squad_v010_allanswers_span
                          t5's span targets: "start: 3 end: 6". t5's metric counts positions differently from its
                          targets: a model that predicts every target gets an EM of 13 on the dev set.

Reads squad/{train,dev}-v1.1.json, or TFDS squad/v1.1:3.0.0. Must not import: mixtures, models.
"""

import numpy as np
import seqio
import tensorflow as tf

from tasks import data_sources, metrics, preprocessors, readers, text_to_text


def read(paths: list[str], split: str) -> data_sources.Columns:
    """Return all questions of the files, with TFDS's features; `answers` are ragged."""
    rows = [row for path in paths for row in readers.squad_rows(path, readers.Skipped(path))]
    texts = {
        name: data_sources.texts_column([row[name] for row in rows]) for name in ("id", "title", "context", "question")
    }
    ends = np.cumsum([0] + [len(row["answers"]["text"]) for row in rows])
    start = np.array([s for row in rows for s in row["answers"]["answer_start"]], np.int32)
    answers = {
        "text": data_sources.lists_column([row["answers"]["text"] for row in rows]),
        "answer_start": tf.RaggedTensor.from_row_splits(start, ends),  # pyright: ignore[reportAttributeAccessIssue]
    }
    return {**texts, "answers": answers}


def _read_files(files: dict[str, list[str]]) -> seqio.DataSource:
    return data_sources.MemorySource(files, read)


source = data_sources.CorpusSource(
    folder="squad",
    files={"train": "train-v1.1.json", "validation": "dev-v1.1.json"},
    build=_read_files,
    tfds_name="squad/v1.1:3.0.0",
    tfds_splits=("train", "validation"),
)


@seqio.map_over_dataset
def span_targets(x: preprocessors.Example) -> preprocessors.Example:
    """Make t5's span targets: positions of the first and last word of the first answer; empty if it is not found.

    Every character except ASCII letters, digits and _ becomes a space, and positions count the words between single
    spaces, including the empty word between two spaces. t5's metric does not count empty words. Both are kept as in t5,
    as is the fact that an answer at the very end of the context is not found.
    """
    context, answer = _words(x["context"]), _words(x["targets"])
    starts = tf.range(tf.maximum(tf.size(context) - tf.size(answer), 0))
    windows = tf.gather(context, starts[:, None] + tf.range(tf.size(answer))[None])
    start = tf.boolean_mask(starts, tf.reduce_all(windows == answer, axis=1))[:1]
    first, last = tf.strings.as_string(start), tf.strings.as_string(start + tf.size(answer) - 1)
    return {**x, "targets": tf.strings.reduce_join(tf.strings.join(["start: ", first, " end: ", last]))}


def _words(text: tf.Tensor) -> tf.Tensor:
    return tf.strings.split(tf.strings.regex_replace(text, r"\W", " "), " ")


def leave_out_without_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Drop examples whose answer was not found, also in evaluation, as t5 does."""
    return dataset.filter(lambda x: tf.strings.length(x["targets"]) > 0)


_ANSWERS = (metrics.qa_answers, metrics.squad)
_TASKS = {
    "squad_v010_allanswers": ([preprocessors.squad], *_ANSWERS),
    "squad_v010": ([preprocessors.squad], *_ANSWERS),
    "squad_v110": ([preprocessors.squad_unpadded], *_ANSWERS),
    "squad_v010_context_free": ([preprocessors.squad_context_free], *_ANSWERS),
    "squad_v010_allanswers_span": (
        [preprocessors.squad, span_targets, leave_out_without_targets],
        metrics.span_answers,
        metrics.span_squad,
    ),
}

for _name, (_to_text, _answers, _metric) in _TASKS.items():
    text_to_text.add(_name, source, _to_text, [_metric], _answers)
