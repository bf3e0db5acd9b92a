"""Write predictions or scores for the examples of a task or a file, as JSON lines in the order of the input.

Examples are processed a window at a time. Within a window they are sorted by length, so that rows of similar length
share a narrow batch; the results are written before the next window is read. After a crash the same call resumes after
the written results, with the same windows and therefore the same batches (`ResumableJsonlWriter`).

The model is given as functions on numpy batches. This module uses SeqIO and text. It must not depend on the model, its
decoding or its devices. Every process makes the same calls for all examples; only the first one writes.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data import packing, pipeline
from t5x_lite.errors import MissingFileError, UserError
from t5x_lite.inference.evaluator import Score, scored, text_of
from t5x_lite.inference.jsonl import Progress, ResumableJsonlWriter
from tasks import file_formats, locations, readers
from tasks import templates as row_templates

# encoder_input_tokens [B, S] -> N results for each row: token ids [B, N, T], int32, best first, and their
# log-likelihoods [B, N], float32, which are -inf for missing results.
Generate = Callable[[np.ndarray], tuple[Any, Any]]

Rows = list[dict[str, Any]]


# Single examples, from a task or a file.


class Example(NamedTuple):
    """Text and tokens. `where` is its origin, for error messages; without targets, both of their fields are None."""

    where: str
    inputs: str
    targets: str | None
    input_tokens: np.ndarray  # [<= S]
    target_tokens: np.ndarray | None  # [<= T]
    segments: np.ndarray | None = None  # [<= S], for classification


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples in a fixed order.

    read: given an index from 0, an iterator over the examples from there on.
    total: number of examples, for the progress display; None if unknown.
    about: settings that identify these examples; written to the results' `.made_from.json`.
    """

    read: Callable[[int], Iterator[Example]]
    total: int | None
    about: Mapping[str, Any]


def _text_to_text(where: str, row: Mapping[str, Any], features: Mapping[str, seqio.utils.Feature]) -> Example:
    """Make an Example from SeqIO's features; a language model's task has no inputs."""
    texts = {k: text_of(row, k, features[k]) for k in ("inputs", "targets") if k in row}
    tokens = row.get("inputs", np.zeros(0, np.int32))
    return Example(where, texts.get("inputs", ""), texts["targets"], tokens, row["targets"])


def task_source(
    task_name: str,
    lengths: Mapping[str, int],
    *,
    split: str = "validation",
    num_examples: int | None = None,
    use_cached: bool = False,
    seed: int = 0,
    example: Callable[[str, Mapping[str, Any], Mapping[str, seqio.utils.Feature]], Example] = _text_to_text,
) -> Source:
    """Return the examples of one task in the order of its split.

    Args:
      example: makes an Example from its origin, its features as SeqIO gives them, and the task's output_features.
    """
    pipeline.check_split(task_name, split)
    task = seqio.TaskRegistry.get(task_name)

    def read(start: int) -> Iterator[Example]:
        dataset = task.get_dataset(lengths, split=split, shuffle=False, use_cached=use_cached, seed=seed, num_epochs=1)
        dataset = dataset.take(-1 if num_examples is None else num_examples).skip(start)
        for i, row in enumerate(dataset.as_numpy_iterator(), start):
            yield example(f"{task_name}[{i}]", row, task.output_features)

    total = min((n for n in (num_examples, task.num_input_examples(split)) if n is not None), default=None)
    about = {"task": task_name, "split": split, "examples": num_examples, "cached": use_cached, "seed": seed}
    return Source(read, total, about | {"lengths": dict(lengths)})


TEMPLATES = {"inputs": "{inputs}", "targets": "{targets}"}


def file_source(
    path: str,
    features: Mapping[str, seqio.utils.Feature],
    lengths: Mapping[str, int],
    *,
    num_examples: int | None = None,
    with_targets: bool = False,
    templates: Mapping[str, str] = TEMPLATES,
) -> Source:
    """Return one example for each row of a file with columns (.jsonl, .json, .csv, .tsv), or for each line of another.

    The rows are read as those of TRAIN_FILES. A blank line of a text file is also an example, so that line n of the
    output belongs to line n of the input. The file may be local or gs://, and .gz. It is first read once, to count its
    rows and to reject a bad one before hours of work.

    Args:
      features: a task's output_features, for the vocabulary and whether to add an EOS (never to a language model's
        inputs). Examples are truncated to `lengths`.
      with_targets: reject rows without targets.
      templates: text of "inputs" and "targets", with {column} for the columns; a row that has not all of them may have
        the finished text under "inputs" and "targets".

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: a row is invalid (the message has its number), or `lengths` lacks "inputs".
    """
    if "inputs" not in lengths:
        raise UserError(f"TASK_FEATURE_LENGTHS={dict(lengths)} has no length for the inputs of {path}")
    features = {"inputs": dataclasses.replace(features["targets"], add_eos=False), **features}

    def texts(number: int, row: Mapping[str, Any]) -> dict[str, str]:
        filled: dict[str, str] = {}
        for key in ("inputs", "targets"):
            template = templates.get(key, TEMPLATES[key])
            if row_templates.has(row, row_templates.columns(key, template)):
                filled[key] = row_templates.substitute(f"{path}:{number}", row, template)
            elif key in row:
                filled[key] = readers.as_text(f"{path}:{number}", key, row[key])
            elif key == "inputs":
                row_templates.substitute(f"{path}:{number}", row, template)  # raises an error
            elif with_targets:
                raise readers.bad_row(path, number, 'no "targets" to score. To predict them, use --mode=infer.')
        return filled

    def example(where: str, row: Mapping[str, Any]) -> Example:
        tokens = {k: _tokens(row[k], features[k], lengths[k]) for k in ("inputs", "targets") if k in row}
        return Example(where, row["inputs"], row.get("targets"), tokens["inputs"], tokens.get("targets"))

    return lines_source(path, texts, example, lengths, num_examples)


def lines_source(
    path: str,
    texts: Callable[[int, Mapping[str, Any]], Mapping[str, Any]],
    example: Callable[[str, Mapping[str, Any]], Example],
    lengths: Mapping[str, int],
    num_examples: int | None,
) -> Source:
    """Like `file_source`: `texts` makes the texts of a row, or raises BadRow; `example` makes an Example of these."""
    with locations.readable(path, "INFER_INPUT: "):
        if path.startswith(locations.HUB) or tf.io.gfile.isdir(path):
            files = locations.find(path, "INFER_INPUT: ")
            if len(files) > 1:
                raise UserError(
                    f"INFER_INPUT = {path!r} has {len(files)} files: name one of them, such as {files[0]!r}"
                )
            path = files[0]
        is_missing = not tf.io.gfile.exists(path)
    if is_missing:
        raise MissingFileError(f"The input file INFER_INPUT = {path!r} does not exist (current folder: {os.getcwd()}).")

    def rows(log_rows: Literal["all", "none"]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        skipped = readers.Skipped(path, log_rows=log_rows)
        if not file_formats.has_columns(path):
            yield from ((number, {"inputs": line}) for number, line in readers.lines(path, skipped))
            return
        for number, row in file_formats.rows(path, skipped):
            with skipped:
                yield number, texts(number, row)

    total, digest = 0, hashlib.sha256()
    for _, row in itertools.islice(rows("all"), num_examples):
        total += 1
        digest.update(json.dumps(row).encode() + b"\n")

    def read(start: int) -> Iterator[Example]:
        for number, row in itertools.islice(rows("none"), start, num_examples):
            yield example(f"{path}:{number}", row)

    about = {"file": path, "examples": total, "sha256": digest.hexdigest()}
    return Source(read, total, about | {"lengths": dict(lengths)})


def _tokens(text: str, feature: seqio.utils.Feature, length: int) -> np.ndarray:
    """Tokenize as SeqIO's tokenize and append_eos_after_trim: truncated text also ends with EOS."""
    tokens = list(feature.vocabulary.encode(text))
    if feature.add_eos:
        tokens = [*tokens[: length - 1], feature.vocabulary.eos_id]
    return np.asarray(tokens[:length], np.int32)


# Writing results.


def write_predictions(
    source: Source,
    generate: Generate,
    path: str | os.PathLike[str],
    *,
    vocabulary: seqio.Vocabulary,
    lengths: Mapping[str, int],
    batch_size: int,
    about: Mapping[str, Any],
) -> int:
    """Write `inputs`, `targets` (if any), `prediction` and `score`, the prediction's log-likelihood.

    If `generate` returns several results, `predictions` and `scores` are lists, best first.

    Args:
      path: the JSON lines file, which appears once all lines are written; see `ResumableJsonlWriter`.
      vocabulary: the vocabulary of the targets.
      about: other settings that the results depend on, such as the checkpoint and decoding options.

    Returns:
      The number of lines, including those of an interrupted run.
    """

    def answer(group: list[Example]) -> Rows:
        inputs_BS = padded([example.input_tokens for example in group], width(group, lengths, "inputs"), batch_size)
        tokens_BNT, scores_BN = (np.asarray(x) for x in generate(inputs_BS))
        if tokens_BNT.ndim != 3 or tokens_BNT.shape[:2] != scores_BN.shape or len(tokens_BNT) != batch_size:
            raise UserError(
                f"generate gave tokens of shape {tokens_BNT.shape} and scores of shape {scores_BN.shape} for "
                f"{batch_size} rows, expected [B, N, T] and [B, N]"
            )
        rows = []
        for example, tokens_NT, scores_N in zip(group, tokens_BNT, scores_BN, strict=False):
            texts = [vocabulary.decode(tokens.tolist()) for tokens in _ended(tokens_NT, vocabulary)]
            row: dict[str, Any] = {"inputs": example.inputs}
            if example.targets is not None:
                row["targets"] = example.targets
            if len(texts) == 1:
                row |= {"prediction": texts[0], "score": float(scores_N[0])}
            else:
                exists = np.isfinite(scores_N)
                row["predictions"] = [text for text, is_result in zip(texts, exists, strict=True) if is_result]
                row["scores"] = scores_N[exists].astype(float).tolist()
            rows.append(row)
        return rows

    return write(source, answer, path, batch_size, {"mode": "infer", **about, **source.about})


def write_scores(
    source: Source,
    score: Score,
    path: str | os.PathLike[str],
    *,
    lengths: Mapping[str, int],
    batch_size: int,
    about: Mapping[str, Any],
) -> int:
    """Write `inputs`, `targets` and `score`, the log-likelihood of the targets; see `write_predictions`.

    Raises:
      ValueError: an example has no targets.
    """

    def answer(group: list[Example]) -> Rows:
        targets = []
        for example in group:
            if example.target_tokens is None:
                raise UserError(f'{example.where} has no "targets" to score. To predict them, use --mode=infer.')
            targets.append(example.target_tokens)
        inputs = [example.input_tokens for example in group]
        batch = packing.unpacked(
            padded(inputs, width(group, lengths, "inputs"), batch_size),
            padded(targets, width(group, lengths, "targets"), batch_size),
        )
        return [
            {"inputs": example.inputs, "targets": example.targets, "score": value}
            for example, value in zip(group, scored(score, batch), strict=False)
        ]

    return write(source, answer, path, batch_size, {"mode": "score", **about, **source.about})


def write(
    source: Source,
    answer: Callable[[list[Example]], Rows],
    path: str | os.PathLike[str],
    batch_size: int,
    about: Mapping[str, Any],
) -> int:
    """Write the rows that `answer` returns for each batch of examples; see the module docstring."""
    results = ResumableJsonlWriter(path, about, packing.WINDOW * batch_size)
    if results.complete:
        return results.count
    examples = source.read(results.count)
    with results, Progress(results.count, source.total) as progress, jax.transfer_guard("allow"):
        while window := list(itertools.islice(examples, packing.WINDOW * batch_size)):
            rows: Rows = [{}] * len(window)
            for group in packing.by_length([_length(example) for example in window], batch_size):
                for i, row in zip(group, answer([window[i] for i in group]), strict=True):
                    rows[i] = row
                progress.add(len(group))
            results.add(rows)
    return results.count


def _length(example: Example) -> int:
    return len(example.input_tokens) + (0 if example.target_tokens is None else len(example.target_tokens))


def width(group: list[Example], lengths: Mapping[str, int], feature: str) -> int:
    """Return the width of a batch of these examples; see packing.width."""
    longest = max(len(getattr(example, f"{feature[:-1]}_tokens")) for example in group)
    return packing.width(longest, lengths.get(feature, 1))


def padded(tokens: list[np.ndarray], width: int, rows: int) -> np.ndarray:
    """Pad to [rows, width]. Remaining rows repeat the last example, so that they do not decode longer than it."""
    array = np.zeros((rows, width), np.int32)
    for row, values in zip(array, itertools.chain(tokens, itertools.repeat(tokens[-1])), strict=False):
        row[: len(values)] = values
    return array


def _ended(tokens_NT: np.ndarray, vocabulary: seqio.Vocabulary) -> np.ndarray:
    """Replace tokens after the first EOS with 0."""
    is_end = tokens_NT == vocabulary.eos_id
    return np.where(np.cumsum(is_end, axis=1) - is_end > 0, 0, tokens_NT)
