"""GLUE as text: all its tasks under T5's names (`glue_cola_v002`, ..., `glue_ax_v002`).

Reads the official glue/<Task>/*.tsv, or TFDS. t5 names TFDS's glue:1.0.0; 2.0.0 is what today's TFDS can prepare and
has the same features and label order (QQP has 363,846 rows where 1.0.0 had 363,849), so v002's text does not change.
TFDS numbers MRPC's rows (`idx`) by Microsoft's msr_paraphrase_train.txt, from which both splits were made. GLUE's own
download script leaves that file beside the TSV files; without it, each of these is numbered from 0, which the log says.

Must not know: mixtures, models.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from tasks import data_sources, metrics, preprocessors, readers, vocabulary

_TSV = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
_NLI = ("entailment", "neutral", "contradiction")


@dataclasses.dataclass(frozen=True)
class Glue:
    """One GLUE task.

    Args:
      name: as in TFDS and in the task's name.
      folder: its folder in the official release.
      text: TFDS feature to the column of the files.
      labels: the label words in order of their ids; none for STS-B, whose label is a number.
      label_column: the column of the label; a file without it (test sets) has label -1.
      metric_fns: t5's metrics.
      files: split to file name.
      prefix: the first word of the inputs, the name unless given.
      no_header: splits whose file has no header, with the position of each column.
      drop_broken_rows: whether rows that lack a column are dropped, with a count in the log, as TFDS does, or refused.
      numbered_by: the file whose rows `idx` counts, where it is not the split's own, and the columns that name a row.
    """

    name: str
    folder: str
    text: Mapping[str, str]
    labels: tuple[str, ...]
    label_column: str
    metric_fns: Sequence[Callable]
    files: Mapping[str, str] = dataclasses.field(default_factory=lambda: _TSV)
    prefix: str = ""
    no_header: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    drop_broken_rows: bool = False
    numbered_by: tuple[str, tuple[str, ...]] | None = None


def _pair(first: str, second: str) -> dict[str, str]:
    return {first: first, second: second}


_SENTENCES = _pair("sentence1", "sentence2")
_MNLI = {
    "folder": "MNLI",
    "text": {"premise": "sentence1", "hypothesis": "sentence2"},
    "labels": _NLI,
    "prefix": "mnli",
}
_COLA_COLUMNS = {"label": 1, "sentence": 3}

CONFIGS = (
    Glue(
        "cola", "CoLA", {"sentence": "sentence"}, ("unacceptable", "acceptable"), "label", [metrics.matthews_corrcoef],
        no_header={"train": _COLA_COLUMNS, "validation": _COLA_COLUMNS},
    ),
    Glue("sst2", "SST-2", {"sentence": "sentence"}, ("negative", "positive"), "label", [metrics.accuracy]),
    Glue(
        "mrpc", "MRPC", {"sentence1": "#1 String", "sentence2": "#2 String"}, ("not_equivalent", "equivalent"),
        "Quality", [metrics.f1_score_with_invalid, metrics.accuracy],
        numbered_by=("msr_paraphrase_train.txt", ("#1 ID", "#2 ID")),
    ),
    Glue(
        "qqp", "QQP", _pair("question1", "question2"), ("not_duplicate", "duplicate"), "is_duplicate",
        [metrics.f1_score_with_invalid, metrics.accuracy],
        drop_broken_rows=True,  # the official train.tsv has a few, and the published count is without them
    ),
    Glue(
        "stsb", "STS-B", _SENTENCES, (), "score",
        [metrics.pearson_corrcoef, metrics.spearman_corrcoef],
    ),
    Glue(
        "mnli", label_column="gold_label", metric_fns=[metrics.accuracy], **_MNLI,
        files={
            "train": "train.tsv",
            "validation_matched": "dev_matched.tsv",
            "validation_mismatched": "dev_mismatched.tsv",
            "test_matched": "test_matched.tsv",
            "test_mismatched": "test_mismatched.tsv",
        },
    ),
    Glue(
        "mnli_matched", label_column="gold_label", metric_fns=[metrics.accuracy], **_MNLI,
        files={"validation": "dev_matched.tsv", "test": "test_matched.tsv"},
    ),
    Glue(
        "mnli_mismatched", label_column="gold_label", metric_fns=[metrics.accuracy], **_MNLI,
        files={"validation": "dev_mismatched.tsv", "test": "test_mismatched.tsv"},
    ),
    Glue("qnli", "QNLI", _pair("question", "sentence"), ("entailment", "not_entailment"), "label", [metrics.accuracy]),
    Glue("rte", "RTE", _SENTENCES, ("entailment", "not_entailment"), "label", [metrics.accuracy]),
    Glue("wnli", "WNLI", _SENTENCES, ("not_entailment", "entailment"), "label", [metrics.accuracy]),
    Glue("ax", **{**_MNLI, "folder": "AX"}, label_column="", metric_fns=[], files={"test": "AX.tsv"}),
)  # fmt: skip


def read(paths: list[str], split: str, config: Glue) -> data_sources.Columns:
    """The examples of a split's TSV file, with TFDS's features: the text, `label` and `idx` (the row, from 0).

    Raises readers.BadRow for a header without the columns, a short row, an unknown label, unless such rows are skipped.
    """
    columns: dict[str, list] = {name: [] for name in (*config.text, "label", "idx")}
    positions = config.no_header.get(split)
    needed = [*config.text.values()] + [config.label_column] * (not split.startswith("test"))
    for path in paths:
        skipped = readers.Skipped(path)
        number = _numbers(path, split, config)
        for line, row in readers.tsv_rows(path, positions or needed, skipped):
            with skipped:
                lacking = [c for c in needed if c not in row or (c == config.label_column and not row[c])]
                if lacking:
                    error = readers.bad_row(path, line, f"no {', '.join(lacking)} in this row: mend or remove it")
                    if not config.drop_broken_rows:
                        raise error
                    skipped.add(error)
                    continue
                value = row.get(config.label_column, "")
                columns["label"].append(_label(value, config, path, line) if value else -1)
                columns["idx"].append(number(row, line - (1 if positions else 2)))
                for feature, column in config.text.items():
                    columns[feature].append(row[column])
    text = {feature: np.array([value.encode() for value in columns[feature]], object) for feature in config.text}
    label = np.array(columns["label"], np.int64 if config.labels else np.float32)
    return {**text, "label": label, "idx": np.array(columns["idx"], np.int32)}


def _numbers(path: str, split: str, config: Glue) -> Callable[[Mapping[str, str], int], int]:
    """A function of a row, and its place in the file, to its `idx`."""
    if config.numbered_by is None or split.startswith("test"):
        return lambda row, place: place
    name, key = config.numbered_by
    original = os.path.join(os.path.dirname(path), name)
    if not tf.io.gfile.exists(original):
        logging.info("%s: idx counts its own rows, for %s is not there", path, original)
        return lambda row, place: place
    rows = readers.tsv_rows(original, key, readers.Skipped(original, "refuse"))
    places = {tuple(row.get(column) for column in key): line - 2 for line, row in rows}

    def number(row: Mapping[str, str], place: int) -> int:
        named = tuple(row.get(column) for column in key)
        if named not in places:
            raise readers.bad_row(path, place + 2, f"{original} has no row {named}, by which this one is numbered")
        return places[named]

    return number


def _label(value: str, config: Glue, path: str, line: int) -> float:
    """A label as its id (written as a word or as an id), or STS-B's score."""
    try:
        if not config.labels and 0 <= float(value) <= 5:
            return float(value)
        if value in config.labels:
            return config.labels.index(value)
        if 0 <= int(value) < len(config.labels):
            return int(value)
    except ValueError:
        pass  # refused below with the rest
    raise readers.bad_row(
        path, line, f"unknown label {value!r}; {config.name} has {', '.join(config.labels) or 'numbers from 0 to 5'}"
    )


def _text_preprocessor(config: Glue) -> Callable:
    if not config.labels:
        return preprocessors.stsb
    return functools.partial(
        preprocessors.glue, prefix=config.prefix or config.name, text_features=tuple(config.text), labels=config.labels
    )


def _postprocessor(config: Glue) -> Callable:
    if not config.labels:
        return metrics.string_to_float
    return functools.partial(metrics.string_to_class, labels=config.labels)


for _config in CONFIGS:
    seqio.TaskRegistry.add(
        f"glue_{_config.name}_v002",
        source=data_sources.CorpusSource(  # pyright: ignore[reportArgumentType]  as in c4.py
            folder=f"glue/{_config.folder}",
            files=_config.files,
            build=functools.partial(data_sources.MemorySource, read=functools.partial(read, config=_config)),
            tfds_name=f"glue/{_config.name}:2.0.0",
            tfds_splits=tuple(_config.files),
        ),
        preprocessors=[
            _text_preprocessor(_config),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        postprocess_fn=_postprocessor(_config),
        metric_fns=_config.metric_fns,
        output_features=vocabulary.output_features(),
        task_cls=data_sources.CorpusTask,
    )
