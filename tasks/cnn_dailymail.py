"""CNN/DailyMail under t5's name `cnn_dailymail_v002`: `summarize: ARTICLE` -> highlights, scored by ROUGE.

Reads cnn_dailymail/{train,validation,test}.csv (columns id, article, highlights, as on Hugging Face and Kaggle), or
TFDS cnn_dailymail:3.4.0. The text is not changed: files made like TFDS before 3.2 have a space before an added full
stop, which ROUGE ignores. The whole train.csv (1.3 GB) is loaded into memory. Must not import: mixtures, models.
"""

import functools

import numpy as np
import seqio
import tensorflow as tf

from tasks import data_sources, metrics, preprocessors, readers, text_to_text

FEATURES = ("id", "article", "highlights")
_SPLITS = ("train", "validation", "test")


def read(paths: list[str], split: str) -> data_sources.Columns:
    """Return all rows of the CSV files, with TFDS's features except the publisher."""
    columns: dict[str, list[bytes]] = {name: [] for name in FEATURES}
    for path in paths:
        skipped = readers.Skipped(path)
        for line, row in readers.csv_rows(path, ",", skipped):
            with skipped:
                readers.check_columns(path, line, FEATURES, row)
                for name, values in columns.items():
                    values.append(row[name].encode())
    return {name: np.array(values, object) for name, values in columns.items()}


@seqio.map_over_dataset
def summarize(x: preprocessors.Example) -> preprocessors.Example:
    """Make t5's inputs `summarize: ARTICLE` and targets, one highlight per line."""
    return {"inputs": tf.strings.join(["summarize:", x["article"]], " "), "targets": x["highlights"]}


text_to_text.add(
    "cnn_dailymail_v002",
    data_sources.CorpusSource(
        folder="cnn_dailymail",
        files={split: f"{split}.csv" for split in _SPLITS},
        build=functools.partial(data_sources.MemorySource, read=read),
        tfds_name="cnn_dailymail:3.4.0",
        tfds_splits=_SPLITS,
    ),
    [summarize],
    [metrics.rouge],
)
