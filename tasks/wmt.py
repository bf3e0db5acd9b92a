"""WMT's translation tasks under T5's names: `translate English to German: ...`, scored by sacreBLEU.

Reads the folder of a language pair, such as wmt14_de-en, or TFDS. A split is what begins with its name: files
`train.de` and `train.en`, or a folder `train/` with WMT's downloads, unpacked and under their own names:

  europarl-v7.de-en.de, .en             parallel lines; each line is a sentence
  newstest2014-deen-src.de.sgm, -ref.en.sgm
                                        validation and test sets in SGML, of which the <seg> are read
  europarl-v9.de-en.tsv                 both sides in a line

As in TFDS, pairs with an empty side and lines of a .tsv with another number of columns are left out, and entities such
as &amp; stay. A corpus that is published as TMX is also to be had as parallel lines, from OPUS ("moses"). Must not
import: mixtures, models.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from tasks import block_source, data_sources, metrics, preprocessors, readers, text_to_text
from tasks.errors import UserError

LANGUAGES = {"de": "German", "en": "English", "fr": "French", "ro": "Romanian"}
_LINES = 1024  # of a block
_CHUNK = 1 << 24
_SEGMENT = re.compile(r"<seg id=\"\d+\">(.*)</seg>")

# --------------------------------------------------------------------------------------------------------------- files


class _Block(NamedTuple):
    """Lines of one file, or of two: from `starts` to `stops` in bytes (to the end if that is None)."""

    paths: tuple[str, ...]
    line: int  # number of the first, from 1
    starts: tuple[int, ...]
    stops: tuple[int | None, ...]


class Pairs:
    """The sentence pairs of a split's files, for `block_source.BlockSource`.

    Raises UserError for files without a partner, of other kinds, or of different numbers of lines.
    """

    def __init__(self, paths: list[str], split: str, languages: tuple[str, str]):
        self._languages = languages
        self._blocks: list[_Block] = []
        self.examples = 0
        for files in _partners(_expanded(paths), languages):
            if files[0].endswith(".sgm"):
                segments = self._segments(files)
                self._blocks.append(_Block(files, 1, (0, 0), (None, None)))
                self.examples += len(segments)
                continue
            counts, starts = zip(*(_line_starts(path) for path in files), strict=True)
            _check_counts(files, counts)
            for k in range(len(starts[0])):
                stops = tuple(s[k + 1] if k + 1 < len(s) else None for s in starts)
                self._blocks.append(_Block(files, 1 + k * _LINES, tuple(s[k] for s in starts), stops))
            self.examples += counts[0]
        self.size = len(self._blocks)
        self._logged: set[tuple[str, ...]] = set()  # files with a pair that was left out

    def read(self, block: int) -> list[block_source.Row]:
        paths, line, starts, stops = self._blocks[block]
        if paths[0].endswith(".sgm"):
            pairs = self._segments(paths)
        else:
            pairs = [*self._lines(paths, line, starts, stops)]
        rows = []
        for number, pair in enumerate(pairs, start=line):
            if pair is not None and all(pair):
                rows.append(dict(zip(self._languages, pair, strict=True)))
            elif paths not in self._logged:
                self._logged.add(paths)
                logging.info("%s:%d: left out, like all pairs of this file that lack a side", paths[0], number)
        return rows

    def _segments(self, paths: Sequence[str]) -> list[tuple[str, ...]]:
        sides = []
        for path in paths:
            matches = [_SEGMENT.match(text) for _, text in readers.lines(path, readers.Skipped(path, "refuse"))]
            sides.append([match[1] for match in matches if match])
        _check_counts(paths, [len(side) for side in sides])
        return list(zip(*sides, strict=True))

    def _lines(
        self, paths: Sequence[str], first: int, starts: Sequence[int], stops: Sequence[int | None]
    ) -> Iterator[tuple[str, ...] | None]:
        skipped = readers.Skipped(paths[0])
        sides = [_lines_between(*place) for place in zip(paths, starts, stops, strict=True)]
        for number, raw in enumerate(zip(*sides, strict=True), start=first):
            texts = None
            with skipped:
                pair = zip(paths, raw, strict=True)
                texts = tuple(readers.decode_line(path, number, text.removesuffix(b"\n")) for path, text in pair)
            if texts is not None and len(paths) == 1:
                texts = self._columns(paths[0], texts[0])
            yield texts

    def _columns(self, path: str, line: str) -> tuple[str, ...] | None:
        columns = [text.strip() for text in line.split("\t")]
        if len(columns) != 2:
            return None
        order = re.search(r"\.([a-z]{2})-([a-z]{2})\.tsv$", path)
        sides = dict(zip(order.groups() if order else self._languages, columns, strict=True))
        if set(sides) != set(self._languages):
            raise UserError(f"{path}: not between {' and '.join(self._languages)}, going by its name")
        return tuple(sides[language] for language in self._languages)


def _expanded(paths: Sequence[str]) -> Iterator[str]:
    """Yield the files, with those of a folder in its place."""
    for path in paths:
        if tf.io.gfile.isdir(path):
            yield from sorted(os.path.join(path, name) for name in tf.io.gfile.listdir(path))
        else:
            yield path


def _partners(paths: Iterator[str], languages: tuple[str, str]) -> Iterator[tuple[str, ...]]:
    """Yield the files with both sides, and pairs of files with one each, in the languages' order."""
    sides: dict[str, dict[str, str]] = {}
    for path in paths:
        stem, _, language = path.removesuffix(".sgm").rpartition(".")
        if path.endswith((".gz", ".tgz", ".tar", ".zip")):
            raise UserError(f"{path}: unpack it, because it is read from any line on")
        if path.endswith(".tsv"):
            yield (path,)
        elif language in languages:
            key = re.sub(r"-(src|ref)$", "", stem) + path.removeprefix(f"{stem}.{language}")
            sides.setdefault(key, {})[language] = path
        else:
            endings = ", ".join(f".{language}[.sgm]" for language in languages)
            raise UserError(f"{path}: files here end in {endings} or .tsv")
    for found in sides.values():
        missing = [language for language in languages if language not in found]
        if missing:
            (path,) = found.values()
            raise UserError(f"{path}: its partner is not there, the same name with .{missing[0]}")
        yield tuple(found[language] for language in languages)


def _check_counts(paths: Sequence[str], counts: Sequence[int]) -> None:
    if len(set(counts)) > 1:
        sizes = ", ".join(f"{path} has {count:,}" for path, count in zip(paths, counts, strict=True))
        raise UserError(f"not parallel: {sizes} sentences; download both again")


def _line_starts(path: str) -> tuple[int, list[int]]:
    """Return the number of lines, and the place in bytes of each line whose turn it is to begin a block."""
    count, offset, starts, last = 0, 0, [0], b"\n"
    with tf.io.gfile.GFile(path, "rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset
            starts.extend((ends[(-count - 1) % _LINES :: _LINES] + 1).tolist())
            count, offset, last = count + len(ends), offset + len(chunk), chunk[-1:]
    count += last != b"\n"  # a last line without an end
    return count, starts[: -(-count // _LINES)]


def _lines_between(path: str, start: int, stop: int | None) -> list[bytes]:
    """Return lines, with `\\r` where they have it, as TFDS keeps it."""
    with tf.io.gfile.GFile(path, "rb") as file:
        file.seek(start)
        content = file.read() if stop is None else file.read(stop - start)
    lines = content.split(b"\n")
    return lines[:-1] if not lines[-1] else lines


# ---------------------------------------------------------------------------------------------------------------- text


def translate(dataset: tf.data.Dataset, source: str, target: str) -> tf.data.Dataset:
    """Make inputs `translate English to German: ...`; the target is the other side."""
    prefix = f"translate {LANGUAGES[source]} to {LANGUAGES[target]}: "

    def to_text(x: preprocessors.Example) -> preprocessors.Example:
        return {"inputs": tf.strings.join([prefix, x[source]]), "targets": x[target]}

    return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE)


# --------------------------------------------------------------------------------------------------------------- tasks


def source(corpus: str, languages: tuple[str, str], splits: Sequence[str]) -> data_sources.CorpusSource:
    """Return the source of a language pair, such as ("de", "en")."""
    pair = "-".join(languages)

    def build(files: Mapping[str, list[str]]) -> seqio.DataSource:
        index = functools.partial(Pairs, languages=languages)
        return block_source.BlockSource(files, index, dict.fromkeys(languages, str))

    return data_sources.CorpusSource(
        folder=f"{corpus}_{pair}",
        files={split: f"{split}*" for split in splits},
        build=build,
        tfds_name=f"{corpus}_translate/{pair}:1.0.0",
        tfds_splits=splits,
    )


_SPLITS = ("train", "validation", "test")
TASKS = {
    "wmt14_ende_v003": ("wmt14", "de", _SPLITS),
    "wmt14_enfr_v003": ("wmt14", "fr", _SPLITS),
    "wmt15_enfr_v003": ("wmt15", "fr", _SPLITS),
    "wmt16_enro_v003": ("wmt16", "ro", _SPLITS),
    "wmt19_ende_v003": ("wmt19", "de", ("train", "validation")),
    "wmt_t2t_ende_v003": ("wmt_t2t", "de", _SPLITS),
}

for _name, (_corpus, _language, _splits) in TASKS.items():
    text_to_text.add(
        _name,
        source(_corpus, (_language, "en"), _splits),
        [functools.partial(translate, source="en", target=_language)],
        [metrics.bleu],
    )
