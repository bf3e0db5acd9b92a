"""Reads files of text, TSV, CSV, JSON lines and SQuAD's JSON into rows, or says which line of which file is bad.

Local paths and gs:// alike (tf.io.gfile), plain or .gz. Nothing is skipped or repaired in silence: a row that cannot be
read raises `BadRow` with "file:line: what is wrong and what to do", or, after `set_bad_rows("skip")`, is left out,
counted and logged.

Must not know: tasks, vocabularies, SeqIO.
"""

import csv
import io
import json
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import tensorflow as tf
from absl import logging

from tasks.errors import MissingFileError, UserError

DATA_DIR_VARIABLE = "T5X_LITE_DATA_DIR"
MAX_LINE_BYTES = 8 * 2**20  # more is no text to train on but a file whose line ends are lost
EMPTY_LINE = "an empty line: remove it, or have bad rows skipped (BAD_ROWS)"
_CHUNK = 1 << 20


def data_dir() -> str | None:
    """The folder of the corpora's official files, or None; read from the environment at each call.

    Raises FileNotFoundError when the variable names a folder that is not there.
    """
    folder = os.environ.get(DATA_DIR_VARIABLE)
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
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # it may cite what is no text


def bad_row(path: str, line: int, problem: str) -> BadRow:
    """The error for line number `line` (from 1) of `path`."""
    return BadRow(f"{path}:{line}: {problem}")


def set_bad_rows(action: Action) -> None:
    """Says for all files read from now on whether a bad row stops the reading ("refuse", as at first) or not ("skip").

    Skipping is never silent: of each file the first bad row is logged at once, and their number when it is at its end.
    What spoils a file as a whole (SQuAD's JSON cut short, no good row at all) is refused all the same.
    """
    global _action
    if action not in get_args(Action):
        raise UserError(f"bad rows: {action!r} is neither of {', '.join(map(repr, get_args(Action)))}")
    _action = action


class Skipped:
    """The bad rows of one file: `with skipped:` round the reading of a row lets its BadRow pass, or counts it.

    Args:
      path: the file.
      action: what to do; None for what `set_bad_rows` said last.
    """

    def __init__(self, path: str, action: Action | None = None):
        self.count = 0
        self.blank = 0  # lines that hold nothing and need not, as between the paragraphs of a text; never refused
        self._path = path
        self._last: BadRow | None = None
        self._skip = (action or _action) == "skip"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if not (self._skip and isinstance(error, BadRow)):
            return False
        self.add(error)
        return True

    def add(self, error: BadRow) -> None:
        """Counts one, whatever was set."""
        self.count, self._last = self.count + 1, error
        if self.count == 1:
            logging.warning("%s (skipped, as will be all bad rows of this file)", error)

    def log(self) -> None:
        """Says at the end of the file how many there were."""
        if self.count:
            logging.warning("%s: %d bad rows skipped, the last: %s", self._path, self.count, self._last)
        if self.blank:
            logging.info("%s: %d blank lines", self._path, self.blank)


# ---------------------------------------------------------------------------------------------------- bytes and lines


def _unpack(path: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Unpacks a .gz of one or more members; says at which line it is damaged or ends early."""
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
                raise bad_row(path, line, f"damaged gzip data ({error}): fetch the file again") from error
            line += text.count(b"\n")
            yield text
            chunk = member.unused_data
            if member.eof:
                member = None
    if member is not None:
        raise bad_row(path, line, "the gzip data ends early (truncated): fetch the file again")


def check_gzip_end(path: str, size: int) -> None:
    """Refuses a .gz cut short, of which a reader that does not notice got `size` bytes, counting one for each line end.

    A .gz ends with its unpacked size modulo 2^32, so one look settles the common case; where that differs (several
    members, line ends of two bytes) the whole file is unpacked once.
    """
    if not path.endswith(".gz"):
        return
    with tf.io.gfile.GFile(path, "rb") as file:
        file.seek(max(file.size() - 4, 0))
        end = int.from_bytes(file.read(4), "little")
        if end in (size % 2**32, (size - 1) % 2**32):  # with or without a line end after the last line
            return
        file.seek(0)
        for _ in _unpack(path, iter(lambda: file.read(_CHUNK), b"")):
            pass


def _content(path: str, skipped: Skipped) -> bytes:
    """The whole file, unpacked; where a damaged .gz is no reason to stop, the whole lines up to the damage."""
    with tf.io.gfile.GFile(path, "rb") as file:
        data = file.read()
    if not path.endswith(".gz"):
        return data
    parts = []
    with skipped:
        for part in _unpack(path, (data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK))):
            parts.append(part)  # what came before an error is kept
        return b"".join(parts)
    content = b"".join(parts)
    return content[: content.rfind(b"\n") + 1]


def decode(path: str, data: bytes, first_line: int) -> str:
    """`data` as UTF-8, the byte-order mark dropped; `first_line` is the number of its first line, for the error."""
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise bad_row(path, line, f"not UTF-8 ({error.reason}): convert the file to UTF-8") from error


def decode_line(path: str, number: int, data: bytes) -> str:
    """One line as text; refuses one that is not UTF-8 or longer than MAX_LINE_BYTES."""
    if len(data) > MAX_LINE_BYTES:
        raise bad_row(
            path,
            number,
            f"a line of {len(data) / 2**20:.1f} MB, at most {MAX_LINE_BYTES >> 20} MB are read: put each document on a "
            "line of its own",
        )
    return decode(path, data, number)


def lines(path: str, skipped: Skipped | None = None) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) of a text file; the end of the file makes no empty last line. A bad line is refused, or
    where it may be left out, counted in `skipped`. The file may be larger than the memory.
    """
    skipped = skipped or Skipped(path, "refuse")
    for number, line in enumerate(_split(path, skipped), start=1):
        with skipped:
            yield number, decode_line(path, number, line.removesuffix(b"\n").removesuffix(b"\r"))
    skipped.log()


def _split(path: str, skipped: Skipped) -> Iterator[bytes]:
    """Lines with their ends, unpacked; where a damaged .gz is no reason to stop, the whole lines up to the damage."""
    rest = b""
    with tf.io.gfile.GFile(path, "rb") as file, skipped:
        chunks = iter(lambda: file.read(_CHUNK), b"")
        for chunk in _unpack(path, chunks) if path.endswith(".gz") else chunks:
            whole = (rest + chunk).splitlines(keepends=True)
            # A line may go on in the next chunk, and \r be half of a line end.
            rest = whole.pop() if whole and not whole[-1].endswith(b"\n") else b""
            yield from whole
            if len(rest) > 8 * MAX_LINE_BYTES:
                raise BadRow(f"{path}: no line end in {len(rest) / 2**20:.0f} MB; is it text, a document a line?")
        if rest:
            yield rest


# --------------------------------------------------------------------------------------------------------------- rows


def check_columns(path: str, line: int, wanted: Iterable[str], present: Collection[str]) -> None:
    """Refuses a header, or the keys of an object, that lacks a wanted column."""
    missing = [column for column in wanted if column not in present]
    if missing:
        raise bad_row(path, line, f"no column {', '.join(missing)}; it has: {', '.join(present)}")


def tsv_rows(
    path: str, columns: Collection[str] | Mapping[str, int], skipped: Skipped
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a tab-separated file in which quotes mean nothing (as in GLUE's), each with its line number.

    Args:
      path: the file.
      columns: what its first line must name; or for a file without a header, the columns' positions. A row that is too
        short lacks its last columns: which of them matter is the caller's to say.
      skipped: counts bad rows; where they are skipped, the first line that names the columns is the header.
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


def csv_rows(path: str, delimiter: str, skipped: Skipped) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a delimited file with a header and the usual quoting; the number is that of the row's first line."""
    csv.field_size_limit(MAX_LINE_BYTES)
    content = io.BytesIO(_content(path, skipped))
    text = io.TextIOWrapper(content, "utf-8-sig", "surrogateescape")  # what is not UTF-8 is refused row by row
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        with skipped:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                problem = f"{error}, in lines {number} to {reader.line_num}"
                raise bad_row(path, number, f"{problem}: check the quotes and the delimiter {delimiter!r}") from error
            if fields is None:
                break
            if not fields:
                raise bad_row(path, number, EMPTY_LINE)
            decode_line(path, number, " ".join(fields).encode("utf-8", "surrogateescape").replace(b"\n", b" "))
            if header is None:
                header = fields
            elif len(fields) != len(header):
                raise bad_row(path, number, f"{len(fields)} fields, the header has {len(header)} ({', '.join(header)})")
            else:
                yield number, dict(zip(header, fields, strict=True))
    skipped.log()


def json_object(path: str, line: int, text: str) -> dict:
    """One line of JSON that must be an object."""
    if not text.strip():
        raise bad_row(path, line, EMPTY_LINE)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_row(path, line, f"not JSON ({error.msg} at column {error.colno}); is the file cut short?") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets in brackets
        raise bad_row(path, line, f"JSON beyond what Python reads ({error})") from error
    if not isinstance(value, dict):
        raise bad_row(path, line, f"expected a JSON object, got {type(value).__name__}")
    return value


def as_text(where: str, column: str, value: Any) -> str:
    """A text or a number as text. Raises BadRow, which begins with `where`, for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = f"{type(value).__name__} {str(value)[:40]!r}"
        raise BadRow(f"{where}: column {column} holds {kind}; text or a number is needed")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can say it all the same
        raise BadRow(f"{where}: column {column} holds half of a surrogate pair: mend or remove the row") from error
    return text


def squad_rows(path: str, skipped: Skipped) -> Iterator[dict]:
    """Questions of a SQuAD v1.1 file, in the shape of TFDS's `squad/v1.1`: id, title, context, question, answers."""
    text = decode(path, _content(path, Skipped(path, "refuse")), 1)
    try:
        articles = json.loads(text)["data"]
        paragraphs = [(article.get("title", ""), p) for article in articles for p in article["paragraphs"]]
        questions = [(title, p["context"], question) for title, p in paragraphs for question in p["qas"]]
    except json.JSONDecodeError as error:
        raise bad_row(path, error.lineno, f"not JSON ({error.msg}); is the file cut short?") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{path}: JSON beyond what Python reads ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not in SQuAD v1.1's format: {error!r} where an article or paragraph is due"
        ) from error
    for title, context, question in questions:
        with skipped:
            try:
                answers = {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")}
                row = {"id": question["id"], "title": title, "context": context, "question": question["question"]}
            except (KeyError, TypeError) as error:
                raise BadRow(
                    f"{path}: {error!r} where a question of SQuAD v1.1 is due: {str(question)[:80]}"
                ) from error
            where = f"{path}: question {str(row['id'])[:80]}"
            if not answers["text"]:
                raise BadRow(f"{where} has no answer; SQuAD v1.1 answers every question")
            if not all(type(start) is int and 0 <= start < 2**31 for start in answers["answer_start"]):
                raise BadRow(f"{where}: answer_start {str(answers['answer_start'])[:80]}, not places in the context")
            texts = [as_text(where, "answers", text) for text in answers["text"]]
            yield {k: as_text(where, k, x) for k, x in row.items()} | {"answers": answers | {"text": texts}}
    skipped.log()
