"""SQuAD v1.1 as text, in two spellings and closed-book.

  squad_v010_allanswers   t5's text, byte for byte: spaces round punctuation in question, context and answers. t5's
                          checkpoints and numbers belong to it; its exact match is against padded answers.
  squad_v110              the text as the dataset has it, scored as the official v1.1 script does.
  squad_v010_context_free t5's closed-book form: the question alone.

Reads squad/{train,dev}-v1.1.json, or TFDS squad/v1.1:3.0.0. Must not know: mixtures, models.
"""

import numpy as np
import seqio
import tensorflow as tf

from tasks import formats, metrics, preprocessors, sources, vocabulary


def read(paths: list[str], split: str) -> sources.Columns:
    """All questions of the files, with TFDS's features; `answers` are ragged."""
    rows = [row for path in paths for row in formats.squad_rows(path, formats.Skipped(path))]
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
    return sources.MemorySource(files, read)


source = sources.CorpusSource(
    folder="squad",
    files={"train": "train-v1.1.json", "validation": "dev-v1.1.json"},
    build=_read_files,
    tfds_name="squad/v1.1:3.0.0",
    tfds_splits=("train", "validation"),
)

_TASKS = {
    "squad_v010_allanswers": preprocessors.squad,
    "squad_v110": preprocessors.squad_unpadded,
    "squad_v010_context_free": preprocessors.squad_context_free,
}

for _name, _to_text in _TASKS.items():
    seqio.TaskRegistry.add(
        _name,
        source=source,  # pyright: ignore[reportArgumentType]  SeqIO says int where its own sources give None
        preprocessors=[
            _to_text,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        postprocess_fn=metrics.qa_answers,
        metric_fns=[metrics.squad],
        output_features=vocabulary.output_features(),
        task_cls=sources.CorpusTask,
    )
