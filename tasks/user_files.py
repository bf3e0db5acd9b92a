"""Register a task for your own files in one call, without writing a preprocessor.

    register_files("mine", "data/*.jsonl", inputs_template="question: {question} context: {context}",
                   targets_template="{answer}")

Formats by extension: .txt (a document per line), .jsonl or .ndjson (an object per line), .json (an array of objects, or
one per line), .csv (header and standard quoting), .tsv (header; a quote is a character), each also with .gz; paths or
patterns, local or gs://. Up to `MEMORY_LIMIT` bytes are loaded into memory and fully
shuffled; larger data are streamed and shuffled in a buffer. Must not import: the public corpora, mixtures.
"""

import collections
import difflib
import functools
import itertools
import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from tasks import data_sources, metrics, objectives, readers, text_checks, vocabulary
from tasks.errors import MissingFileError, UserError

MEMORY_LIMIT = 256 * 2**20
_SHUFFLE_WINDOW = 10_000  # buffer for streamed data
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_STREAMED = (".txt", ".jsonl", ".ndjson")
_ENDINGS = (*_STREAMED, ".json", *_DELIMITERS)

Objective = Literal["text_to_text", "span_corruption"]
Templates = dict[str, str]  # feature -> template


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
    """Register a SeqIO task that reads the given files; an earlier task of the same name made here is replaced.

    Args:
      name: name of the task.
      train_files: one or more paths or patterns for the split `train`.
      eval_files: the same for `validation`; without it the task has no such split and is not evaluated.
      objective: "text_to_text" makes inputs and targets from each row by the two templates, and is scored by exact
        match and F1 of words; "span_corruption" pre-trains on the text of each row.
      inputs_template, targets_template: text with {column} for the values of a row; "{{" is a brace. For text_to_text.
      text_template: the same for span_corruption of files with columns. In a .txt file the line is the column `text`.

    Raises:
      MissingFileError: no file matches.
      UserError: unknown extension, template without a column, or a column missing from a file's first row. Later rows
        are checked when they are read (for data in memory, when the dataset is built). Bad rows can be skipped instead,
        see readers.set_bad_rows.
    """
    if objective == "text_to_text":
        templates = {"inputs": inputs_template, "targets": targets_template}
    elif objective == "span_corruption":
        templates = {"targets": text_template}
    else:
        raise UserError(f"objective {objective!r}: use 'text_to_text' or 'span_corruption'")
    paths = {"train": find(train_files, "TRAIN_FILES: ")}
    if eval_files:
        paths["validation"] = find(eval_files, "EVAL_FILES: ")
    for feature, template in templates.items():
        columns(feature, template)  # raises an error if there are no columns
    for split, files in paths.items():
        good = [path for path in files if _check_first_row(path, templates, objective)]
        if not good:
            raise UserError(f"{', '.join(files)}: no good row for {split}; see the log for the problems")

    all_files = [path for files in paths.values() for path in files]
    size = sum(tf.io.gfile.stat(path).length * (4 if path.endswith(".gz") else 1) for path in all_files)
    if size <= MEMORY_LIMIT:
        source: seqio.DataSource = data_sources.MemorySource(paths, functools.partial(_read, templates=templates))
        window = seqio.SHUFFLE_BUFFER_SIZE
    else:
        whole = [path for path in all_files if _ending(path) not in _STREAMED]
        if whole:
            raise UserError(
                f"{whole[0]} and the other files have about {size >> 20} MB; above {MEMORY_LIMIT >> 20} MB only "
                ".txt and .jsonl can be streamed: convert to .jsonl"
            )
        source = data_sources.LinesSource(paths, functools.partial(_fill_line, templates=templates), list(templates))
        window = _SHUFFLE_WINDOW
    if isinstance(seqio.TaskRegistry._REGISTRY.get(name), FilesTask):
        seqio.TaskRegistry.remove(name)
    logging.info("%s: %d files, %s", name, len(all_files), ", ".join(f"{s} {len(p)}" for s, p in paths.items()))
    text_to_text = objective == "text_to_text"
    task: Any = seqio.TaskRegistry.add(
        name,
        source=source,  # pyright: ignore[reportArgumentType]  SeqIO declares int, but its own sources return None
        preprocessors=[
            seqio.preprocessors.tokenize if text_to_text else objectives.tokenize,
            seqio.CacheDatasetPlaceholder(),
            *([] if text_to_text else [objectives.span_corruption]),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=vocabulary.output_features(),
        postprocess_fn=_given_back if text_to_text else None,
        metric_fns=[metrics.text_match] if text_to_text else [],
        shuffle_buffer_size=window,
        task_cls=FilesTask,
    )
    task.paths, task.templates, task._notes = paths, templates, {}
    return task


class FilesTask(data_sources.CorpusTask):
    """A task made by `register_files`.

    Attributes:
      paths: files by split.
      templates: template of each feature.
    """

    paths: Mapping[str, Sequence[str]]
    templates: Templates
    _notes: dict[tuple, list[str]]  # by lengths

    def notes(self, lengths: Mapping[str, int]) -> list[str]:
        """Return a line for each file and thing that a user should know: what is cut, unknown, empty, not given back.

        The texts of span corruption are split to fit, so they are never cut.
        """
        if (lines := self._notes.get(key := tuple(sorted(lengths.items())))) is not None:
            return lines
        self._notes[key] = lines = []
        if list(self.templates) == ["targets"]:
            lengths = {}
        for path in dict.fromkeys(path for files in self.paths.values() for path in files):
            skipped = readers.Skipped(path, log_rows="none")
            texts = _filled(path, self.templates, skipped)
            counts = text_checks.count(itertools.islice(texts, text_checks.MOST_ROWS), vocabulary.SHARED, lengths)
            of_first = f" (of the first {text_checks.MOST_ROWS:,} rows)" if next(texts, None) is not None else ""
            lines += [line + of_first for line in text_checks.sentences(path, counts, lengths)]
            if skipped.count:
                lines.append(f"{path}: {skipped.count:,} rows cannot be read and are skipped{of_first}")
        return lines


def _filled(path: str, templates: Templates, skipped: readers.Skipped) -> Iterator[dict[str, str]]:
    for number, row in rows(path, skipped):
        with skipped:
            yield dict(zip(templates, _fill(path, number, row, templates), strict=True))


def _given_back(text: str, is_target: bool = False, **unused) -> str:
    """Postprocess a target to what a model without a mistake writes; see text_checks.given_back."""
    if not is_target:
        return text
    possible = text_checks.given_back(vocabulary.SHARED, text)
    return text if possible is None else possible


def find(patterns: str | Sequence[str], prefix: str = "") -> list[str]:
    """Return the matching files, sorted; `prefix` begins the errors.

    Raises MissingFileError if none match, UserError for an unknown extension.
    """
    paths = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        pattern = os.path.expanduser(pattern)
        # A name with brackets or a backslash may be that of a file.
        candidates = [pattern] if tf.io.gfile.exists(pattern) else tf.io.gfile.glob(pattern)
        matches = [path for path in candidates if not tf.io.gfile.isdir(path)]
        if not matches:
            folder, name = os.path.split(pattern)
            others = tf.io.gfile.listdir(folder or ".") if tf.io.gfile.isdir(folder or ".") else []
            near = difflib.get_close_matches(name, others, n=1)
            hint = f" Did you mean {os.path.join(folder, near[0])}?" if near else ""
            raise MissingFileError(
                f"{prefix}no file matches {pattern!r} (relative paths start at the current folder).{hint}"
            )
        paths += matches
    for path in paths:
        if _ending(path) not in _ENDINGS:
            raise UserError(f"{path}: unknown format; known extensions: {', '.join(_ENDINGS)}, each also with .gz")
    for path, times in collections.Counter(paths).items():
        if times > 1:
            logging.warning("%s%s is named %d times, and read once.", prefix, path, times)
    return sorted(set(paths))


def _ending(path: str) -> str:
    name = path.removesuffix(".gz").rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[-1].lower() if "." in name else ""


# ---------------------------------------------------------------------------------------------------------------- rows


def has_rows(path: str) -> bool:
    """Return whether the format of a file has named columns."""
    return _ending(path) in (".jsonl", ".ndjson", ".json", *_DELIMITERS)


def rows(path: str, skipped: readers.Skipped) -> Iterator[tuple[int, dict]]:
    """Yield the rows of a file of any format with their line numbers; blank lines of plain text are skipped."""
    ending = _ending(path)
    if ending == ".json":
        yield from readers.json_rows(path, skipped)
        return
    if ending in _DELIMITERS:
        yield from readers.csv_rows(path, _DELIMITERS[ending], skipped, quoting=ending == ".csv")
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
        for number, row in rows(path, skipped):
            with skipped:
                for feature, text in zip(templates, _fill(path, number, row, templates), strict=True):
                    values[feature].append(text.encode())
    return {feature: np.array(column, object) for feature, column in values.items()}


def _fill_line(path: str, number: int, line: str, templates: Templates) -> list[str] | None:
    row = _line_row(path, number, line)
    return None if row is None else _fill(path, number, row, templates)


def _check_first_row(path: str, templates: Templates, objective: Objective) -> bool:
    """Raise an error if the first row is bad; if bad rows are skipped, return whether there is a good one."""
    if objective == "text_to_text" and _ending(path) == ".txt":
        raise UserError(
            f"{path}: plain text has no columns for inputs and targets: use .jsonl, .csv or .tsv, or the objective "
            "'span_corruption'"
        )
    skipped = readers.Skipped(path, log_rows="none")  # the reader logs them again
    for number, row in rows(path, skipped):
        with skipped:
            _check_columns(path, row, templates)
            _fill(path, number, row, templates)
            return True
    with readers.Skipped(path):
        raise skipped.last or readers.BadRow(f"{path}: has no rows")
    return False


def _check_columns(path: str, row: Mapping[str, Any], templates: Templates) -> None:
    """Raise BadRow if a file with a header lacks a template's column."""
    if _ending(path) not in _DELIMITERS:
        return
    present = list(row)
    for feature, template in templates.items():
        for column in columns(feature, template):
            if column in row:
                continue
            near = difflib.get_close_matches(column, present, n=1)
            cure = f" Did you mean {{{near[0]}}}?" if near else ""
            if len(present) == 1 and re.search(r"[;\t,|]", present[0]):
                cure = f" Its columns are not separated by {_DELIMITERS[_ending(path)]!r}."
            elif not near and len(present) == 2 and _ending(path) == ".tsv":
                cure = " If it has no header, make inputs and targets, with a tab between them, its first line."
            raise readers.BadRow(
                f"{path}:1: no column {column}, which the template of the {feature}, {template!r}, needs; it has: "
                f"{', '.join(present)}.{cure}"
            )


# ----------------------------------------------------------------------------------------------------------- templates


@functools.cache
def columns(feature: str, template: str) -> tuple[str, ...]:
    """Return the columns of a template."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{feature} template {template!r}: {error}; write a literal brace as '{{{{' or '}}}}'"
        ) from error
    fields = [(column, spec, conversion) for _, column, spec, conversion in parts if column is not None]
    if not fields or any(not column or spec or conversion for column, spec, conversion in fields):
        raise UserError(
            f"{feature} template {template!r}: it needs at least one {{column}}, and nothing else in braces"
        )
    return tuple(column for column, _, _ in fields)


def _fill(path: str, number: int, row: dict, templates: Templates) -> list[str]:
    filled = []
    for feature, template in templates.items():
        readers.check_columns(path, number, columns(feature, template), list(row))
        filled.append(substitute(path, number, row, template))
    return filled


def substitute(path: str, number: int, row: Mapping[str, Any], template: str) -> str:
    """Return the template with the row's values in place of its columns."""
    pieces = []
    for literal, column, _, _ in string.Formatter().parse(template):
        pieces.append(literal)
        if column is not None:
            pieces.append(readers.as_text(f"{path}:{number}", column, row[column]))
    return "".join(pieces)
