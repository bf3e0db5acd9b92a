"""GLUE as text-to-text tasks under T5's names (`glue_cola_v002`, ..., `glue_ax_v002`).

Reads the official glue/<Task>/*.tsv, or TFDS. t5 uses TFDS glue:1.0.0; current TFDS can prepare 2.0.0, which has the
same features and label order (QQP has 363,846 rows, 363,849 in 1.0.0), so the text of v002 does not change. TFDS
numbers MRPC's rows (`idx`) by Microsoft's msr_paraphrase_train.txt, the source of both splits. GLUE's download script
puts that file next to the TSV files; without it, each split is numbered from 0, which is logged.

Must not import: mixtures, models.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from tasks import data_sources, metrics, preprocessors, readers, text_to_text

_TSV = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
_NLI = ("entailment", "neutral", "contradiction")


@dataclasses.dataclass(frozen=True)
class Glue:
    """One GLUE task.

    Args:
      name: name in TFDS and in the task's name.
      folder: folder in the official release.
      text: TFDS feature -> column of the files.
      labels: label words in the order of their ids; empty for STS-B, whose label is a number.
      label_column: column of the label; in files without it (test sets) the label is -1.
      metric_fns: t5's metrics.
      files: split -> file name.
      prefix: first word of the inputs; default: `name`.
      no_header: splits whose file has no header, with the position of each column.
      drop_broken_rows: drop and count rows that lack a column, as TFDS does; otherwise they raise an error.
      numbered_by: the file whose rows `idx` counts, if not the split's own, and the columns that identify a row.
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
        drop_broken_rows=True,  # the official train.tsv has a few; the published count excludes them
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
    """Return the examples of a split's TSV file, with TFDS's features: the text, `label` and `idx` (the row, from 0).

    Raises readers.BadRow for a missing column, a short row or an unknown label, unless bad rows are skipped.
    """
    columns: dict[str, list] = {name: [] for name in (*config.text, "label", "idx")}
    positions = config.no_header.get(split)
    needed = [*config.text.values()] + [config.label_column] * (not split.startswith("test"))
    for path in paths:
        skipped = readers.Skipped(path)
        number = _numbers(path, split, config)
        for line, row in readers.tsv_rows(path, positions or needed, skipped):
            with skipped:
                missing = [c for c in needed if c not in row or (c == config.label_column and not row[c])]
                if missing:
                    error = readers.bad_row(path, line, f"no {', '.join(missing)} in this row: correct or remove it")
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
    """Return a function from a row and its index in the file to its `idx`."""
    if config.numbered_by is None or split.startswith("test"):
        return lambda row, index: index
    name, key = config.numbered_by
    original = os.path.join(os.path.dirname(path), name)
    if not tf.io.gfile.exists(original):
        logging.info("%s: idx counts the rows of this file, because %s does not exist", path, original)
        return lambda row, index: index
    rows = readers.tsv_rows(original, key, readers.Skipped(original, "refuse"))
    indices = {tuple(row.get(column) for column in key): line - 2 for line, row in rows}

    def number(row: Mapping[str, str], index: int) -> int:
        row_key = tuple(row.get(column) for column in key)
        if row_key not in indices:
            raise readers.bad_row(path, index + 2, f"{original} has no row {row_key}, which `idx` needs")
        return indices[row_key]

    return number


def _label(value: str, config: Glue, path: str, line: int) -> float:
    """Return the id of a label, given as a word or an id, or STS-B's score."""
    try:
        if not config.labels and 0 <= float(value) <= 5:
            return float(value)
        if value in config.labels:
            return config.labels.index(value)
        if 0 <= int(value) < len(config.labels):
            return int(value)
    except ValueError:
        pass  # raises the error below
    raise readers.bad_row(
        path, line, f"unknown label {value!r}; {config.name} has {', '.join(config.labels) or 'numbers from 0 to 5'}"
    )


def _text_preprocessor(config: Glue) -> Callable:
    if not config.labels:
        return preprocessors.stsb
    names = tuple(sorted(config.text))
    return functools.partial(
        preprocessors.glue, prefix=config.prefix or config.name, text_features=names, labels=config.labels
    )


def _postprocessor(config: Glue) -> Callable:
    if not config.labels:
        return metrics.string_to_float
    return functools.partial(metrics.string_to_class, labels=config.labels)


def source(config: Glue, splits: Sequence[str] | None = None) -> data_sources.CorpusSource:
    """Return the source of one task, of some of its splits or of all."""
    splits = tuple(config.files) if splits is None else tuple(splits)
    return data_sources.CorpusSource(
        folder=f"glue/{config.folder}",
        files={split: config.files[split] for split in splits},
        build=functools.partial(data_sources.MemorySource, read=functools.partial(read, config=config)),
        tfds_name=f"glue/{config.name}:2.0.0",
        tfds_splits=splits,
    )


for _config in CONFIGS:
    text_to_text.add(
        f"glue_{_config.name}_v002",
        source(_config),
        [_text_preprocessor(_config)],
        _config.metric_fns,
        _postprocessor(_config),
    )
