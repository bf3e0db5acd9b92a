"""Read rows from text, TSV, CSV, JSON Lines and SQuAD files, with errors that name file and line.

Paths are local or gs:// (tf.io.gfile), plain, .gz or .zst. A bad row raises `BadRow` with "file:line: problem and fix"
or, after `set_bad_rows("skip")`, is dropped, counted and logged.

Must not import: tasks, vocabularies, SeqIO.
"""

import collections
import csv
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import pyarrow as pa
import tensorflow as tf
from absl import logging

from tasks.errors import MissingFileError, UserError

DATA_DIR_VARIABLE = "T5X_LITE_DATA_DIR"
MAX_LINE_BYTES = 8 * 2**20  # longer lines are treated as a corrupt file
EMPTY_LINE = "an empty line: remove it, or skip bad rows (BAD_ROWS)"
COMPRESSIONS = (".gz", ".zst")
_CHUNK = 1 << 20


def data_dir() -> str | None:
    """Return the folder of the corpora's official files, or None; the environment is read at each call.

    Raises MissingFileError if the variable does not name a folder.
    """
    folder = os.path.expanduser(os.environ.get(DATA_DIR_VARIABLE, ""))
    if not folder:
        return None
    if not tf.io.gfile.isdir(folder):
        raise MissingFileError(f"{DATA_DIR_VARIABLE}={folder} is not a folder: correct it, or unset it to read TFDS")
    return folder


# ------------------------------------------------------------------------------------------------------------ bad rows

Action = Literal["refuse", "skip"]
_action: Action = "refuse"


class BadRow(UserError):
    """A row, or the rest of a damaged file, that cannot be read."""

    def __init__(self, message: str):
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # it may quote invalid text


def bad_row(path: str, line: int, problem: str) -> BadRow:
    """Return the error for line number `line` (from 1) of `path`."""
    return BadRow(f"{path}:{line}: {problem}")


def set_bad_rows(action: Action) -> None:
    """Set whether a bad row in files read from now on raises an error ("refuse", the default) or is skipped ("skip").

    With "skip", the first bad row of each file is logged immediately, and their number at the end of the file. Errors
    that affect a whole file (truncated SQuAD JSON, no good row) are always raised.
    """
    global _action
    if action not in get_args(Action):
        raise UserError(f"bad rows: {action!r} is not one of {', '.join(map(repr, get_args(Action)))}")
    _action = action


class Skipped:
    """Handles the bad rows of one file: `with skipped:` around the reading of a row raises its BadRow, or counts it.

    Args:
      path: the file.
      action: None uses the action of `set_bad_rows`.
      log_rows: the bad rows that are logged when they are skipped; "none" also leaves out their number at the end.
    """

    def __init__(self, path: str, action: Action | None = None, log_rows: Literal["first", "all", "none"] = "first"):
        self.count = 0
        self.blank = 0  # blank lines that are allowed, as between the paragraphs of a text
        self._path = path
        self.last: BadRow | None = None
        self._skip = (action or _action) == "skip"
        self._log_rows = log_rows

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if not (self._skip and isinstance(error, BadRow)):
            return False
        self.add(error)
        return True

    def add(self, error: BadRow) -> None:
        """Count a bad row, whatever the action."""
        self.count, self.last = self.count + 1, error
        if self._log_rows == "all":
            logging.warning("%s (left out)", error)
        elif self._log_rows == "first" and self.count == 1:
            logging.warning("%s (skipped, like all bad rows of this file)", error)

    def log(self) -> None:
        """Log the number of bad and blank rows at the end of the file."""
        if self._log_rows == "none":
            return
        if self.count > 1:
            logging.warning("%s: %d bad rows skipped, the last: %s", self._path, self.count, self.last)
        if self.blank:
            logging.info("%s: %d blank lines", self._path, self.blank)


# ---------------------------------------------------------------------------------------------------- bytes and lines


def _unpack(path: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompress a .gz of one or more members; errors name the line where it is damaged or truncated."""
    member, line = None, 1
    for chunk in chunks:
        while chunk:
            if member is None:
                chunk = chunk.lstrip(b"\0")  # padding between members
                if not chunk:
                    break
                member = zlib.decompressobj(wbits=31)
            try:
                text = member.decompress(chunk)
            except zlib.error as error:
                raise bad_row(path, line, f"damaged gzip data ({error}): download the file again") from error
            line += text.count(b"\n")
            yield text
            chunk = member.unused_data
            if member.eof:
                member = None
    if member is not None:
        raise bad_row(path, line, "the gzip data ends early (truncated): download the file again")


def compression(path: str) -> str:
    """Return the ending of a compressed file as it is written, or ""."""
    ending = path[path.rfind(".") :] if "." in path else ""
    return ending if ending.lower() in COMPRESSIONS else ""


def chunks(path: str) -> Iterator[bytes]:
    """Yield the decompressed content of a file. Errors name the line where it is damaged or truncated."""
    kind = compression(path).lower()
    with tf.io.gfile.GFile(path, "rb") as file:
        parts = iter(lambda: file.read(_CHUNK), b"")
        yield from {".gz": _unpack, ".zst": _unpack_zstd}[kind](path, parts) if kind else parts


def _unpack_zstd(path: str, parts: Iterable[bytes]) -> Iterator[bytes]:
    line = 1
    try:
        packed = pa.PythonFile(io.BufferedReader(_Stream(parts), _CHUNK), mode="r")
        with pa.CompressedInputStream(packed, "zstd") as file:
            while text := file.read(_CHUNK):
                line += text.count(b"\n")
                yield text
    except OSError as error:
        raise bad_row(path, line, f"damaged or truncated zstd data ({error}): download the file again") from error


class _Stream(io.RawIOBase):
    """Parts of a file's content as a binary stream."""

    def __init__(self, parts: Iterable[bytes]):
        self._parts = iter(parts)
        self._part = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._part:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._part = memoryview(part)
        size = min(len(buffer), len(self._part))
        buffer[:size], self._part = self._part[:size], self._part[size:]
        return size


def _content(path: str, skipped: Skipped) -> bytes:
    """Return the decompressed file; if bad rows are skipped, the complete lines before any damage."""
    parts = []
    with skipped:
        for part in chunks(path):
            parts.append(part)  # keep the data before an error
        return b"".join(parts)
    content = b"".join(parts)
    return content[: content.rfind(b"\n") + 1]


def decode(path: str, data: bytes, first_line: int) -> str:
    """Decode UTF-8 without byte-order mark; `first_line` is the number of the first line, for the error."""
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise bad_row(path, line, f"not UTF-8 ({error.reason}): convert the file to UTF-8") from error


def decode_line(path: str, number: int, data: bytes) -> str:
    """Decode a line. Raises BadRow if it is not UTF-8 or longer than MAX_LINE_BYTES."""
    if len(data) > MAX_LINE_BYTES:
        raise bad_row(
            path,
            number,
            f"a line of {len(data) / 2**20:.1f} MB, the limit is {MAX_LINE_BYTES >> 20} MB: put each document on its "
            "own line",
        )
    return decode(path, data, number)


def lines(path: str, skipped: Skipped | None = None, start: int = 0) -> Iterator[tuple[int, str]]:
    """Yield numbered lines (from 1) of a text file after the first `start`. The file is streamed.

    A bad line raises BadRow, or is counted in `skipped`.
    """
    skipped = skipped or Skipped(path, "refuse")
    raw = itertools.islice(raw_lines(path, skipped), start, None)
    for number, line in enumerate(raw, start=start + 1):
        with skipped:
            yield number, decode_line(path, number, line.removesuffix(b"\n").removesuffix(b"\r"))
    skipped.log()


def raw_lines(path: str, skipped: Skipped) -> Iterator[bytes]:
    """Yield decompressed lines with their ends; if bad rows are skipped, the complete lines before any damage."""
    rest = b""
    with skipped:
        for chunk in chunks(path):
            whole = (rest + chunk).splitlines(keepends=True)
            # A line may continue in the next chunk, and \r may be half of a line end.
            rest = whole.pop() if whole and not whole[-1].endswith(b"\n") else b""
            yield from whole
            if len(rest) > 8 * MAX_LINE_BYTES:
                raise BadRow(f"{path}: no line end in {len(rest) / 2**20:.0f} MB; put one document per line")
        if rest:
            yield rest


# --------------------------------------------------------------------------------------------------------------- rows


def check_columns(path: str, line: int, needed: Iterable[str], present: Collection[str]) -> None:
    """Raise BadRow if a header, or the keys of an object, lack a needed column."""
    missing = [column for column in needed if column not in present]
    if missing:
        raise bad_row(path, line, f"no column {', '.join(missing)}; it has: {', '.join(present) or 'none'}")


def tsv_rows(
    path: str, columns: Collection[str] | Mapping[str, int], skipped: Skipped
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a tab-separated file without quoting (as GLUE's), each with its line number.

    Args:
      path: the file.
      columns: columns that the header must have; for a file without a header, the columns' positions. A short row lacks
        its last columns; the caller checks for those that it needs.
      skipped: counts bad rows; if they are skipped, the first line with the columns is the header.
    """
    positions = columns if isinstance(columns, Mapping) else None
    for number, line in lines(path, skipped):
        with skipped:
            if not line:
                raise bad_row(path, number, EMPTY_LINE)
            fields = line.split("\t")
            if positions is None:
                check_columns(path, number, columns, fields)
                positions = {name: k for k, name in enumerate(fields)}
            else:
                yield number, {name: fields[k] for name, k in positions.items() if k < len(fields)}


def csv_rows(
    path: str, delimiter: str, skipped: Skipped, *, quoting: bool = True
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a delimited file with a header, with the number of their first line.

    Args:
      quoting: whether fields may be in quotes (as in .csv); else a quote is a character like any other (as in .tsv).
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    content = io.BufferedReader(_Stream(chunks(path)), _CHUNK)
    text = io.TextIOWrapper(content, "utf-8-sig", "surrogateescape", newline="")  # invalid UTF-8 is reported per row
    reader = csv.reader(
        text, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
    )
    header: list[str] | None = None
    damaged = False
    while not damaged:
        number = reader.line_num + 1
        with skipped:
            try:
                fields = next(reader, None)
            except BadRow:  # of the compressed data: no row follows
                damaged = True
                raise
            except csv.Error as error:
                problem = f"{error}, in lines {number} to {reader.line_num}"
                raise bad_row(path, number, f"{problem}: check the quotes and the delimiter {delimiter!r}") from error
            if fields is None:
                break
            if not fields:
                raise bad_row(path, number, EMPTY_LINE)
            decode_line(path, number, " ".join(fields).encode("utf-8", "surrogateescape").replace(b"\n", b" "))
            if header is None:
                if repeated := [name for name, times in collections.Counter(fields).items() if times > 1]:
                    raise UserError(f"{path}:{number}: the header has the column {repeated[0]!r} more than once")
                header = fields
                continue
            if len(fields) != len(header):
                raise bad_row(path, number, f"{len(fields)} fields, the header has {len(header)} ({', '.join(header)})")
            else:
                yield number, dict(zip(header, fields, strict=True))
    skipped.log()


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        key, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} is there more than once")
    return row


def _parsed(text: str) -> Any:
    """Parse JSON with numbers as they are written. Raises ValueError for repeated keys, NaN and infinity."""
    return json.loads(
        text, parse_int=str, parse_float=str, parse_constant=_no_number, object_pairs_hook=_without_repeats
    )


def json_object(path: str, line: int, text: str) -> dict:
    """Parse a line as a JSON object. Numbers are kept as they are written, as texts."""
    if not text.strip():
        raise bad_row(path, line, EMPTY_LINE)
    try:
        value = _parsed(text)
    except json.JSONDecodeError as error:
        raise bad_row(path, line, f"not JSON ({error.msg} at column {error.colno}); is the file truncated?") from error
    except (ValueError, RecursionError) as error:  # thousands of digits or nested brackets
        raise bad_row(path, line, f"JSON that Python cannot read ({error})") from error
    return _object(path, line, value)


def _object(path: str, line: int, value: Any) -> dict:
    if not isinstance(value, dict):
        raise bad_row(path, line, f"expected a JSON object, got {type(value).__name__}")
    return value


def json_rows(path: str, skipped: Skipped) -> Iterator[tuple[int, dict]]:
    """Yield the objects of a .json file with their numbers: an array of them, read as a whole, or one on each line."""
    if is_one_value(path):
        text = decode(path, _content(path, skipped), 1)
        try:
            value = _parsed(text)
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith("["):
                line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
                raise bad_row(path, line, f"JSON that cannot be read ({error})") from error
        else:
            for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
                with skipped:
                    yield number, _object(path, number, row)
            skipped.log()
            return
    for number, line in lines(path, skipped):
        with skipped:
            yield number, json_object(path, number, line)


def is_one_value(path: str) -> bool:
    """Return whether a .json file seems to have one value, such as an array, instead of an object on each line."""
    try:
        head = next(chunks(path), b"").removeprefix(b"\xef\xbb\xbf").lstrip()
        return not isinstance(_parsed(head.split(b"\n", 1)[0].decode()), dict)
    except BadRow:
        return False  # the reader reports it
    except (ValueError, RecursionError):
        return True


def as_text(where: str, column: str, value: Any) -> str:
    """Return a string or number as text. Raises BadRow, with the prefix `where`, for other types."""
    if value is None:
        raise BadRow(f"{where}: column {column} has no value (null); text or a number is needed")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        kind = f"{type(value).__name__} {str(value)[:40]!r}"
        raise BadRow(f"{where}: column {column} has {kind}; text or a number is needed")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # valid in JSON
        raise BadRow(f"{where}: column {column} has half of a surrogate pair: correct or remove the row") from error
    return text


def field(where: str, row: Any, name: str, kind: type = str) -> Any:
    """Return a field of a JSON object from this module's readers. Raises BadRow, with the prefix `where`, without it.

    Args:
      kind: str for a text or number, as text; int for a whole number of 32 bits; list, or dict.
    """
    if not isinstance(row, dict) or name not in row:
        has = ", ".join(row) or "nothing" if isinstance(row, dict) else f"{type(row).__name__} {str(row)[:40]!r}"
        raise BadRow(f"{where}: no {name} where it belongs; there is: {has}")
    value = row[name]
    if kind is str:
        return as_text(where, name, value)
    if kind is int:
        try:
            number = int(as_text(where, name, value))
        except ValueError:  # so is BadRow
            number = 2**31
        if not -(2**31) <= number < 2**31:
            raise BadRow(f"{where}: {name} is {str(value)[:40]!r}; a whole number is needed")
        return number
    if not isinstance(value, kind):
        raise BadRow(f"{where}: {name} is {type(value).__name__} {str(value)[:40]!r}; {kind.__name__} is needed")
    return value


def json_file(path: str, keep: Callable[[dict], Any] = dict) -> Any:
    """Return the value of a whole .json file; numbers are numbers.

    Args:
      keep: what of each object to keep, called from the innermost on, so that a large file need not be in memory whole.
    """
    text = decode(path, _content(path, Skipped(path, "refuse")), 1)
    try:
        return json.loads(text, object_hook=keep)
    except json.JSONDecodeError as error:
        raise bad_row(path, error.lineno, f"not JSON ({error.msg}); is the file truncated?") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{path}: JSON that Python cannot read ({error})") from error


def json_lines(path: str, skipped: Skipped) -> Iterator[tuple[str, dict]]:
    """Yield the objects of a file with one on each line, each with "file:line" for messages about it.

    The caller reads an object `with skipped:`.
    """
    for number, line in lines(path, skipped):
        with skipped:
            yield f"{path}:{number}", json_object(path, number, line)


def squad_rows(path: str, skipped: Skipped) -> Iterator[dict]:
    """Yield the questions of a SQuAD v1.1 file with TFDS's features: id, title, context, question, answers."""
    value = json_file(path)
    try:
        articles = value["data"]
        paragraphs = [(article.get("title", ""), p) for article in articles for p in article["paragraphs"]]
        questions = [(title, p["context"], question) for title, p in paragraphs for question in p["qas"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not in SQuAD v1.1's format: {error!r} in an article or paragraph") from error
    for title, context, question in questions:
        with skipped:
            try:
                answers = {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")}
                row = {"id": question["id"], "title": title, "context": context, "question": question["question"]}
            except (KeyError, TypeError) as error:
                raise BadRow(f"{path}: {error!r} in a question of SQuAD v1.1: {str(question)[:80]}") from error
            where = f"{path}: question {str(row['id'])[:80]}"
            if not answers["text"]:
                raise BadRow(f"{where} has no answer; in SQuAD v1.1 every question has one")
            if not all(type(start) is int and 0 <= start < 2**31 for start in answers["answer_start"]):
                raise BadRow(f"{where}: answer_start {str(answers['answer_start'])[:80]}, not positions in the context")
            texts = [as_text(where, "answers", text) for text in answers["text"]]
            yield {k: as_text(where, k, x) for k, x in row.items()} | {"answers": answers | {"text": texts}}
    skipped.log()
