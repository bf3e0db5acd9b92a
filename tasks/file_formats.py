"""The formats of a user's files, by extension: one reader for training, evaluation, inference and vocabularies.

  .txt                         a document per line: the column `text`
  .jsonl, .ndjson              an object per line
  .json                        an object per line, or an array of objects
  .csv                         header and standard quoting
  .tsv                         header; a quote is a character like any other
  .parquet, .arrow, .feather   columns

All but the last may also end in .gz or .zst. Must not import: templates, tasks, SeqIO.
"""

from collections.abc import Collection, Iterator

import tensorflow as tf

from tasks import readers, tables

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINES = (".txt", ".jsonl", ".ndjson")
ENDINGS = (*_LINES, ".json", *DELIMITERS, *tables.ENDINGS)
_UNPACKED = 4  # of a compressed text: how many times its size it has in memory, about


def ending(path: str) -> str:
    """Return the extension in lower case, without that of the compression; "" if there is none."""
    name = path.removesuffix(readers.compression(path)).rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[-1].lower() if "." in name else ""


def is_known(path: str) -> bool:
    """Return whether the format of a file can be read."""
    return ending(path) in ENDINGS and not (readers.compression(path) and ending(path) in tables.ENDINGS)


def has_columns(path: str) -> bool:
    """Return whether the format of a file has named columns."""
    return is_known(path) and ending(path) != ".txt"


def column_names(path: str) -> list[str] | None:
    """Return the columns that all rows of a file have; None if its rows say it (of .csv and .tsv the first does)."""
    return tables.column_names(path) if ending(path) in tables.ENDINGS else None


def rows(path: str, skipped: readers.Skipped, columns: Collection[str] | None = None) -> Iterator[tuple[int, dict]]:
    """Yield the rows of a file with their numbers (of the line, or of the row); the file is streamed.

    Args:
      skipped: raises errors for bad rows, or counts them. Blank lines of plain text are counted in `blank`.
      columns: the columns that are needed, where others need not be read; None: all.
    """
    kind = ending(path)
    if kind in tables.ENDINGS:
        yield from tables.rows(path, skipped, columns)
    elif kind == ".json":
        yield from readers.json_rows(path, skipped)
    elif kind in DELIMITERS:
        yield from readers.csv_rows(path, DELIMITERS[kind], skipped, quoting=kind == ".csv")
    else:
        for number, line in readers.lines(path, skipped):
            with skipped:
                if kind != ".txt":
                    yield number, readers.json_object(path, number, line)
                elif line.strip():
                    yield number, {"text": line}
                else:
                    skipped.blank += 1


def num_rows(path: str) -> int:
    """Return the number of rows, bad ones included: quickly for Parquet and lines, else by reading the file."""
    if ending(path) in tables.ENDINGS:
        return tables.num_rows(path)
    if ending(path) in _LINES:
        return sum(1 for _ in readers.raw_lines(path, readers.Skipped(path, "skip", log_rows="none")))
    return sum(1 for _ in rows(path, readers.Skipped(path, "skip", log_rows="none")))


def size(path: str, columns: Collection[str] | None = None) -> int:
    """Return about how many bytes the columns of a file have in memory."""
    if ending(path) in tables.ENDINGS:
        return tables.size(path, columns)
    return tf.io.gfile.stat(path).length * (_UNPACKED if readers.compression(path) else 1)
