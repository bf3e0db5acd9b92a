"""Register a task for your own files in one call, without writing a preprocessor.

    register_files("mine", "data/*.jsonl", inputs_template="question: {question} context: {context}",
                   targets_template="{answer}")

file_formats.py has the formats, locations.py the places. Up to `MEMORY_LIMIT` bytes are loaded into memory and fully
shuffled; larger data are streamed and shuffled in a buffer. Must not import: the public corpora, mixtures.
"""

import difflib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
from absl import logging

from tasks import (
    data_sources,
    file_formats,
    locations,
    objectives,
    readers,
    templates,
    text_checks,
    text_metrics,
    ul2,
    vocabulary,
)
from tasks.errors import UserError
from tasks.templates import Templates

MEMORY_LIMIT = 256 * 2**20
_SHUFFLE_WINDOW = 10_000  # buffer for streamed data

TEXT_TO_TEXT = "text_to_text"
# The objectives that pre-train on text, by the names of FILES_OBJECTIVE.
OBJECTIVES: Mapping[str, Callable] = {
    **{
        objective.__name__: objective
        for objective in (
            *(objectives.span_corruption, objectives.iid_denoising, objectives.iid_drop_tokens),
            *(objectives.bert_style_denoising, objectives.mass_style_denoising, objectives.deshuffling),
            *(objectives.prefix_lm, objectives.lm, objectives.full_lm, ul2.ul2),
        )
    },
    "ul2r": functools.partial(ul2.ul2, denoisers=ul2.UL2R),
}
WITH_MODES = ("ul2", "ul2r")
# The settings of objectives, by the options that give them.
SETTINGS = {
    "noise_density": "NOISE_DENSITY",
    "mean_noise_span_length": "MEAN_NOISE_SPAN_LENGTH",
    "concatenate": "JOIN_TEXTS",
    "mode_tokens": "UL2_MODE_TOKENS",
}


def register_files(
    name: str,
    train_files: str | Sequence[str] | None,
    eval_files: str | Sequence[str] | None = None,
    *,
    objective: str = TEXT_TO_TEXT,
    inputs_template: str = "{inputs}",
    targets_template: str = "{targets}",
    text_template: str = "{text}",
    metrics: Sequence[text_metrics.Metric] = (text_metrics.text_match,),
    **settings: Any,
) -> "FilesTask":
    """Register a SeqIO task that reads the given files; an earlier task of the same name made here is replaced.

    Args:
      name: name of the task.
      train_files: one or more paths or patterns for the split `train`; None: the task is only evaluated.
      eval_files: the same for `validation`; without it the task has no such split and is not evaluated.
      objective: "text_to_text" makes inputs and targets from each row by the two templates, and is scored by exact
        match and F1 of words; the names of OBJECTIVES pre-train on the text of each row.
      inputs_template, targets_template: text with {column} for the values of a row; "{{" is a brace. For text_to_text.
      text_template: the same for the objectives on text. In a .txt file the line is the column `text`.
      metrics: of decoded targets and predictions, for text_to_text.
      settings: of the objective, by the names of its parameters (`SETTINGS`); None: the objective's own.

    Raises:
      MissingFileError: no file matches.
      UserError: unknown extension, template without a column, or a column missing from a file's first row. Later rows
        are checked when they are read (for data in memory, when the dataset is built). Bad rows can be skipped instead,
        see readers.set_bad_rows.
    """
    if objective == TEXT_TO_TEXT:
        wanted = {"inputs": inputs_template, "targets": targets_template}
    else:
        wanted = {"targets": text_template}
    steps = _steps(objective, settings)
    columns = templates.in_file(wanted)  # raises an error if a template has no columns
    paths = {}
    if train_files:
        paths["train"] = locations.find(train_files, "TRAIN_FILES: ")
    if eval_files:
        paths["validation"] = locations.find(eval_files, "EVAL_FILES: ")
    for split, files in paths.items():
        good = [path for path in files if _check_first_row(path, wanted, objective)]
        if not good:
            raise UserError(f"{', '.join(files)}: no good row for {split}; see the log for the problems")
        paths[split] = good

    all_files = [path for files in paths.values() for path in files]
    size = sum(file_formats.size(path, columns) for path in all_files)
    if size <= MEMORY_LIMIT:
        source: seqio.DataSource = data_sources.MemorySource(paths, functools.partial(_read, wanted=wanted))
        window = seqio.SHUFFLE_BUFFER_SIZE
    else:
        if whole := [p for p in all_files if file_formats.ending(p) == ".json" and readers.is_one_value(p)]:
            raise UserError(
                f"{whole[0]} and the other files have about {size >> 20} MB; above {MEMORY_LIMIT >> 20} MB an array "
                "in a .json cannot be streamed: convert it to .jsonl, an object on each line"
            )
        source = data_sources.RowsSource(paths, functools.partial(_stream, wanted=wanted), list(wanted))
        window = _SHUFFLE_WINDOW
    if isinstance(seqio.TaskRegistry._REGISTRY.get(name), FilesTask):
        seqio.TaskRegistry.remove(name)
    logging.info("%s: %d files, %s", name, len(all_files), ", ".join(f"{s} {len(p)}" for s, p in paths.items()))
    task: Any = seqio.TaskRegistry.add(
        name,
        source=source,  # pyright: ignore[reportArgumentType]  SeqIO declares int, but its own sources return None
        preprocessors=[
            objectives.tokenize if steps else seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            *(steps or [seqio.preprocessors.append_eos_after_trim]),
        ],
        output_features=vocabulary.output_features(),
        postprocess_fn=None if steps else _given_back,
        metric_fns=[] if steps else list(metrics),
        shuffle_buffer_size=window,
        task_cls=FilesTask,
    )
    task.paths, task.templates, task._notes = paths, wanted, {}
    return task


def _steps(objective: str, settings: Mapping[str, Any]) -> list[Callable]:
    """Return the preprocessors of an objective after tokenising, [] for text to text.

    Raises UserError for an unknown objective, or a setting that it does not have.
    """
    if objective != TEXT_TO_TEXT and objective not in OBJECTIVES:
        near = difflib.get_close_matches(objective, [TEXT_TO_TEXT, *OBJECTIVES], n=1)
        cure = f"did you mean {near[0]!r}?" if near else f"use {TEXT_TO_TEXT!r}, {', '.join(map(repr, OBJECTIVES))}"
        raise UserError(f"FILES_OBJECTIVE = {objective!r}: {cure}")
    function = OBJECTIVES.get(objective)
    known = inspect.signature(function).parameters if function else {}
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{SETTINGS[name]} = {value!r}: the objective {objective!r} has no such setting")
    if not 0 < given.get("noise_density", 0.5) <= 1:
        raise UserError(f"NOISE_DENSITY = {given['noise_density']}: it must be above 0, and at most 1")
    if not given.get("mean_noise_span_length", 1.0) >= 1:
        raise UserError(f"MEAN_NOISE_SPAN_LENGTH = {given['mean_noise_span_length']}: it must be at least 1")
    if function is None:
        return []
    chosen = functools.partial(function, **given) if given else function
    return [chosen] if objective == "full_lm" else [chosen, objectives.append_eos_after_trim]


class FilesTask(data_sources.CorpusTask):
    """A task made by `register_files`.

    Attributes:
      paths: files by split.
      templates: template of each feature.
    """

    paths: Mapping[str, Sequence[str]]
    templates: Templates
    _notes: dict[tuple, list[str]]  # by lengths

    def texts(self, split: str) -> Iterator[dict[str, str]]:
        """Yield the text of each feature of a split's rows."""
        for path in self.paths[split]:
            yield from _filled(path, self.templates, readers.Skipped(path, log_rows="none"))

    def num_rows(self, split: str) -> int:
        """Return the number of rows of a split; of streamed files they are counted, bad ones included."""
        known = self.source.num_input_examples(split)
        return sum(map(file_formats.num_rows, self.paths[split])) if known is None else known

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


def _given_back(text: str, is_target: bool = False, **unused) -> str:
    """Postprocess a target to what a model without a mistake writes; see text_checks.given_back."""
    if not is_target:
        return text
    possible = text_checks.given_back(vocabulary.SHARED, text)
    return text if possible is None else possible


# --------------------------------------------------------------------------------------------------------------- rows


def _filled(path: str, wanted: Templates, skipped: readers.Skipped) -> Iterator[dict[str, str]]:
    """Yield the text of each feature of the rows of a file."""
    for number, row in file_formats.rows(path, skipped, templates.in_file(wanted)):
        with skipped:
            yield dict(zip(wanted, templates.fill(f"{path}:{number}", row, wanted), strict=True))


def _read(paths: list[str], split: str, wanted: Templates) -> data_sources.Columns:
    texts = [text for path in paths for text in _filled(path, wanted, readers.Skipped(path))]
    return {feature: np.array([text[feature].encode() for text in texts], object) for feature in wanted}


def _stream(path: str, position: int, wanted: Templates) -> Iterator[tuple[int, list[str]]]:
    """Yield rows after the first `position`, which are read too."""
    texts = _filled(path, wanted, readers.Skipped(path))
    return ((k, list(text.values())) for k, text in enumerate(itertools.islice(texts, position, None), position + 1))


def _check_first_row(path: str, wanted: Templates, objective: str) -> bool:
    """Raise an error if the first row is bad; if bad rows are skipped, return whether there is a good one."""
    if objective == TEXT_TO_TEXT and not file_formats.has_columns(path):
        raise UserError(
            f"{path}: plain text has no columns for inputs and targets: use .jsonl, .csv or .tsv, or an objective "
            "on text, such as 'span_corruption'"
        )
    skipped = readers.Skipped(path, log_rows="none")  # the reader logs them again
    with skipped:
        if (names := file_formats.column_names(path)) is not None:
            _check_columns(path, names, wanted)
        for number, row in file_formats.rows(path, skipped, templates.in_file(wanted)):
            with skipped:
                if file_formats.ending(path) in file_formats.DELIMITERS:
                    _check_columns(path, list(row), wanted)
                templates.fill(f"{path}:{number}", row, wanted)
                return True
    with readers.Skipped(path):
        raise skipped.last or readers.BadRow(f"{path}: has no rows")
    return False


def _check_columns(path: str, present: Sequence[str], wanted: Templates) -> None:
    """Raise BadRow if a file lacks a template's column."""
    for feature, template in wanted.items():
        for column in templates.columns(feature, template):
            if column in present or column.split(".")[0] in present:
                continue
            delimiter = file_formats.DELIMITERS.get(file_formats.ending(path))
            near = difflib.get_close_matches(column, present, n=1)
            cure = f" Did you mean {{{near[0]}}}?" if near else ""
            if delimiter and len(present) == 1 and re.search(r"[;\t,|]", present[0]):
                cure = f" Its columns are not separated by {delimiter!r}."
            elif delimiter == "\t" and not near and len(present) == 2:
                cure = " If it has no header, make inputs and targets, with a tab between them, its first line."
            raise readers.BadRow(
                f"{path}:1: no column {column}, which the template of the {feature}, {template!r}, needs; it has: "
                f"{', '.join(present)}.{cure}"
            )
