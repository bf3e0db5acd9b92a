"""SQuAD v1.1 as text, in two spellings, closed-book, and by position in the context.

  squad_v010_allanswers   t5's text, byte for byte: spaces round punctuation in question, context and answers. t5's
                          checkpoints and numbers belong to it; its exact match is against padded answers.
  squad_v110              the text as the dataset has it, scored as the official v1.1 script does.
  squad_v010_context_free t5's closed-book form: the question alone.
  squad_v010_allanswers_span
                          t5's answer by position: "start: 3 end: 6". Its metric counts places in another way than its
                          targets do: a model that predicts all of them gets an EM of 13 on the dev set.

Reads squad/{train,dev}-v1.1.json, or TFDS squad/v1.1:3.0.0. Must not know: mixtures, models.
"""

import numpy as np
import seqio
import tensorflow as tf

from tasks import data_sources, metrics, preprocessors, readers, vocabulary


def read(paths: list[str], split: str) -> data_sources.Columns:
    """All questions of the files, with TFDS's features; `answers` are ragged."""
    rows = [row for path in paths for row in readers.squad_rows(path, readers.Skipped(path))]
    texts = {
        name: np.array([row[name].encode() for row in rows], object) for name in ("id", "title", "context", "question")
    }
    ends = np.cumsum([0] + [len(row["answers"]["text"]) for row in rows])
    text = np.array([a.encode() for row in rows for a in row["answers"]["text"]], object)
    start = np.array([s for row in rows for s in row["answers"]["answer_start"]], np.int32)
    answers = {
        "text": tf.RaggedTensor.from_row_splits(text, ends),  # pyright: ignore[reportAttributeAccessIssue]
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
    """t5's span form: for targets the first and last place of the first answer in the context; nothing if not found.

    Places count what lies between single spaces once all that is not an ASCII letter, digit or _ is a space, so that
    two spaces hold an empty word; t5's metric, in turning places back to words, counts no empty ones. Both are kept as
    they are in t5, and so is that an answer is not looked for at the very end.
    """
    context, answer = _words(x["context"]), _words(x["targets"])
    starts = tf.range(tf.maximum(tf.size(context) - tf.size(answer), 0))
    windows = tf.gather(context, starts[:, None] + tf.range(tf.size(answer))[None])
    found = tf.boolean_mask(starts, tf.reduce_all(windows == answer, axis=1))[:1]
    first, last = tf.strings.as_string(found), tf.strings.as_string(found + tf.size(answer) - 1)
    return {**x, "targets": tf.strings.reduce_join(tf.strings.join(["start: ", first, " end: ", last]))}


def _words(text: tf.Tensor) -> tf.Tensor:
    return tf.strings.split(tf.strings.regex_replace(text, r"\W", " "), " ")


def leave_out_without_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Passes over examples whose answer was not found, as t5 does, in evaluation too."""
    return dataset.filter(lambda x: tf.strings.length(x["targets"]) > 0)


_ANSWERS = (metrics.qa_answers, metrics.squad)
_TASKS = {
    "squad_v010_allanswers": ([preprocessors.squad], *_ANSWERS),
    "squad_v110": ([preprocessors.squad_unpadded], *_ANSWERS),
    "squad_v010_context_free": ([preprocessors.squad_context_free], *_ANSWERS),
    "squad_v010_allanswers_span": (
        [preprocessors.squad, span_targets, leave_out_without_targets],
        metrics.span_answers,
        metrics.span_squad,
    ),
}

for _name, (_to_text, _answers, _metric) in _TASKS.items():
    seqio.TaskRegistry.add(
        _name,
        source=source,  # pyright: ignore[reportArgumentType]  SeqIO says int where its own sources give None
        preprocessors=[
            *_to_text,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        postprocess_fn=_answers,
        metric_fns=[_metric],
        output_features=vocabulary.output_features(),
        task_cls=data_sources.CorpusTask,
    )
