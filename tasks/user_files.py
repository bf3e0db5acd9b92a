"""Your own files as a task, in one call and without writing a preprocessor.

    register_files("mine", "data/*.jsonl", inputs_template="question: {question} context: {context}",
                   targets_template="{answer}")

Formats by ending: .txt (a document a line), .jsonl (an object a line), .csv, .tsv (a header and the usual quotes), each
also with .gz; local or gs://; names or patterns. Up to `MEMORY_LIMIT` bytes are held in memory and shuffled whole;
beyond that, lines are streamed and shuffled in windows. Must not know: the public corpora, mixtures.
"""

import functools
import string
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from tasks import data_sources, metrics, objectives, readers, vocabulary
from tasks.errors import MissingFileError, UserError

MEMORY_LIMIT = 256 * 2**20
_SHUFFLE_WINDOW = 10_000  # for what is streamed
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ENDINGS = (".txt", ".jsonl", *_DELIMITERS)

Objective = Literal["text_to_text", "span_corruption"]
Templates = dict[str, str]  # feature to template


def register_files(
    name: str,
    train_files: str | Sequence[str],
    eval_files: str | Sequence[str] | None = None,
    *,
    objective: Objective = "text_to_text",
    inputs_template: str = "{inputs}",
    targets_template: str = "{targets}",
    text_template: str = "{text}",
) -> seqio.Task:
    """Registers a SeqIO task that reads the given files; a task of the same name registered here before is replaced.

    Args:
      name: the task's name.
      train_files: a path or pattern, or several, for the split `train`.
      eval_files: likewise for `validation`; without it the task has no such split and is not evaluated.
      objective: "text_to_text" turns each row into inputs and targets by the two templates, and is scored by exact
        match and F1 of words; "span_corruption" pre-trains on each row's text.
      inputs_template, targets_template: text with {column} where a row's value goes; "{{" is a brace. For text_to_text.
      text_template: likewise, for span corruption of files with columns. In a .txt file the line is the column `text`.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: an ending it does not know, a template without a column, a column missing from a file's first row.
        Later rows are checked as they are read (those of files held in memory: when the dataset is made). Bad rows may
        be skipped instead: readers.set_bad_rows.
    """
    if objective == "text_to_text":
        templates = {"inputs": inputs_template, "targets": targets_template}
    elif objective == "span_corruption":
        templates = {"targets": text_template}
    else:
        raise UserError(f"objective {objective!r}: use 'text_to_text' or 'span_corruption'")
    paths = {"train": find(train_files)}
    if eval_files:
        paths["validation"] = find(eval_files)
    for feature, template in templates.items():
        _columns(feature, template)  # refuses a template that names none
    for split, found in paths.items():
        good = [path for path in found if _check_first_row(path, templates, objective)]
        if not good:
            raise UserError(f"{', '.join(found)}: not one good row for {split}; the log says what is bad")

    everything = [path for found in paths.values() for path in found]
    size = sum(tf.io.gfile.stat(path).length * (4 if path.endswith(".gz") else 1) for path in everything)
    if size <= MEMORY_LIMIT:
        source: seqio.DataSource = data_sources.MemorySource(paths, functools.partial(_read, templates=templates))
        window = seqio.SHUFFLE_BUFFER_SIZE
    else:
        delimited = [path for path in everything if _ending(path) in _DELIMITERS]
        if delimited:
            raise UserError(
                f"{delimited[0]} and the other files come to about {size >> 20} MB; beyond {MEMORY_LIMIT >> 20} MB "
                "only .txt and .jsonl can be streamed: convert to .jsonl"
            )
        source = data_sources.LinesSource(paths, functools.partial(_fill_line, templates=templates), list(templates))
        window = _SHUFFLE_WINDOW
    if isinstance(seqio.TaskRegistry._REGISTRY.get(name), FilesTask):
        seqio.TaskRegistry.remove(name)
    logging.info("%s: %d files, %s", name, len(everything), ", ".join(f"{s} {len(p)}" for s, p in paths.items()))
    text_to_text = objective == "text_to_text"
    return seqio.TaskRegistry.add(
        name,
        source=source,  # pyright: ignore[reportArgumentType]  SeqIO says int where its own sources give None
        preprocessors=[
            seqio.preprocessors.tokenize if text_to_text else objectives.tokenize,
            seqio.CacheDatasetPlaceholder(),
            *([] if text_to_text else [objectives.span_corruption]),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=vocabulary.output_features(),
        metric_fns=[metrics.text_match] if text_to_text else [],
        shuffle_buffer_size=window,
        task_cls=FilesTask,
    )


class FilesTask(data_sources.CorpusTask):
    """A task made by `register_files`."""


def find(patterns: str | Sequence[str]) -> list[str]:
    """The files that match, sorted. Raises FileNotFoundError where none does, ValueError for a strange ending."""
    found = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = [path for path in tf.io.gfile.glob(pattern) if not tf.io.gfile.isdir(path)]
        if not matches:
            raise MissingFileError(f"no file matches {pattern!r} (relative paths start at the current folder)")
        found += matches
    for path in found:
        if _ending(path) not in _ENDINGS:
            raise UserError(f"{path}: cannot tell its format; known endings: {', '.join(_ENDINGS)}, each also with .gz")
    return sorted(set(found))


def _ending(path: str) -> str:
    name = path.removesuffix(".gz").rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[-1].lower() if "." in name else ""


# ---------------------------------------------------------------------------------------------------------------- rows


def _rows(path: str, skipped: readers.Skipped) -> Iterator[tuple[int, dict]]:
    """The rows of a file of any known format, with their line numbers; blank lines of plain text hold none."""
    if _ending(path) in _DELIMITERS:
        yield from readers.csv_rows(path, _DELIMITERS[_ending(path)], skipped)
        return
    for number, line in readers.lines(path, skipped):
        with skipped:
            row = _line_row(path, number, line)
            if row is None:
                skipped.blank += 1
            else:
                yield number, row


def _line_row(path: str, number: int, line: str) -> dict | None:
    if _ending(path) == ".txt":
        return {"text": line} if line.strip() else None
    return readers.json_object(path, number, line)


def _read(paths: list[str], split: str, templates: Templates) -> data_sources.Columns:
    values: dict[str, list[bytes]] = {feature: [] for feature in templates}
    for path in paths:
        skipped = readers.Skipped(path)
        for number, row in _rows(path, skipped):
            with skipped:
                for feature, text in zip(templates, _fill(path, number, row, templates), strict=True):
                    values[feature].append(text.encode())
    return {feature: np.array(column, object) for feature, column in values.items()}


def _fill_line(path: str, number: int, line: str, templates: Templates) -> list[str] | None:
    row = _line_row(path, number, line)
    return None if row is None else _fill(path, number, row, templates)


def _check_first_row(path: str, templates: Templates, objective: Objective) -> bool:
    """Refuses a file whose first row is bad; where bad rows are skipped, gives whether there is a good one."""
    if objective == "text_to_text" and _ending(path) == ".txt":
        raise UserError(
            f"{path}: plain text has no columns for inputs and targets: use .jsonl, .csv or .tsv, or the objective "
            "'span_corruption'"
        )
    skipped = readers.Skipped(path)
    for number, row in _rows(path, skipped):
        with skipped:
            _fill(path, number, row, templates)
            return True
    with skipped:
        raise readers.BadRow(f"{path}: holds no {'good ' if skipped.count else ''}rows")
    return False


# ----------------------------------------------------------------------------------------------------------- templates


@functools.cache
def _columns(feature: str, template: str) -> tuple[str, ...]:
    """The columns that a template names."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{feature} template {template!r}: {error}; write a literal brace as '{{{{' or '}}}}'"
        ) from error
    named = [(column, spec, conversion) for _, column, spec, conversion in parts if column is not None]
    if not named or any(not column or spec or conversion for column, spec, conversion in named):
        raise UserError(
            f"{feature} template {template!r}: name columns as {{column}}, at least one, nothing else in braces"
        )
    return tuple(column for column, _, _ in named)


def _fill(path: str, number: int, row: dict, templates: Templates) -> list[str]:
    filled = []
    for feature, template in templates.items():
        columns = _columns(feature, template)
        readers.check_columns(path, number, columns, list(row))
        filled.append(_substitute(path, number, row, template))
    return filled


def _substitute(path: str, number: int, row: dict, template: str) -> str:
    pieces = []
    for literal, column, _, _ in string.Formatter().parse(template):
        pieces.append(literal)
        if column is not None:
            pieces.append(readers.as_text(f"{path}:{number}", column, row[column]))
    return "".join(pieces)
