"""Reads files of text, TSV, CSV, JSON lines and SQuAD's JSON into rows, or says which line of which file is bad.

Local paths and gs:// alike (tf.io.gfile), plain or .gz. Nothing is skipped or repaired in silence: a row that cannot be
read raises ValueError with "file:line: what is wrong and what to do".

Must not know: tasks, vocabularies, SeqIO.
"""

import csv
import io
import json
import os
import zlib
from collections.abc import Collection, Iterable, Iterator

import tensorflow as tf

DATA_DIR_VARIABLE = "T5X_LITE_DATA_DIR"


def data_dir() -> str | None:
    """The folder of the corpora's official files, or None; read from the environment at each call.

    Raises FileNotFoundError when the variable names a folder that is not there.
    """
    folder = os.environ.get(DATA_DIR_VARIABLE)
    if not folder:
        return None
    if not tf.io.gfile.isdir(folder):
        raise FileNotFoundError(f"{DATA_DIR_VARIABLE}={folder} is not a folder: correct it, or unset it to read TFDS")
    return folder


def bad_row(path: str, line: int, problem: str) -> ValueError:
    """The error for line number `line` (from 1) of `path`."""
    return ValueError(f"{path}:{line}: {problem}")


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
        for _ in _unpack(path, iter(lambda: file.read(1 << 20), b"")):
            pass


def read_text(path: str) -> str:
    """The whole file as text with line ends as "\\n", without a byte-order mark; .gz is unpacked."""
    with tf.io.gfile.GFile(path, "rb") as file:
        data = file.read()
    if path.endswith(".gz"):
        data = b"".join(_unpack(path, [data]))
    return decode(path, data, 1).replace("\r\n", "\n").replace("\r", "\n")


def decode(path: str, data: bytes, first_line: int) -> str:
    """`data` as UTF-8, the byte-order mark dropped; `first_line` is the number of its first line, for the error."""
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise bad_row(path, line, f"not UTF-8 ({error.reason}): convert the file to UTF-8") from error


def lines(path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) of a text file; the end of the file makes no empty last line."""
    text = read_text(path)
    yield from enumerate(text.removesuffix("\n").split("\n") if text else (), start=1)


def check_columns(path: str, line: int, wanted: Iterable[str], present: Collection[str]) -> None:
    """Refuses a header, or the keys of an object, that lacks a wanted column."""
    missing = [column for column in wanted if column not in present]
    if missing:
        raise bad_row(path, line, f"no column {', '.join(missing)}; it has: {', '.join(present)}")


def tsv_rows(path: str, columns: list[str] | None) -> Iterator[tuple[int, dict[str, str] | list[str]]]:
    """Rows of a tab-separated file in which quotes mean nothing (as in GLUE's), each with its line number.

    Args:
      path: the file.
      columns: what its first line must name, giving dicts; or None for a file without a header, giving lists. A row
        that is too short lacks its last columns: which of them matter is the caller's to say.
    """
    header: list[str] | None = None
    for number, line in lines(path):
        fields = line.split("\t")
        if columns is None:
            yield number, fields
        elif header is None:
            header = fields
            check_columns(path, number, columns, header)
        else:
            yield number, dict(zip(header, fields, strict=False))


def csv_rows(path: str, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a delimited file with a header and the usual quoting; the number is that of the row's last line."""
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(read_text(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            if not fields:
                continue  # a blank line holds no row
            if header is None:
                header = fields
            elif len(fields) != len(header):
                raise bad_row(
                    path, reader.line_num, f"{len(fields)} fields, the header has {len(header)} ({', '.join(header)})"
                )
            else:
                yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise bad_row(path, reader.line_num, f"{error}: check the quotes and the delimiter {delimiter!r}") from error


def json_object(path: str, line: int, text: str) -> dict:
    """One line of JSON that must be an object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_row(path, line, f"not JSON ({error.msg} at column {error.colno}); is the file cut short?") from error
    if not isinstance(value, dict):
        raise bad_row(path, line, f"expected a JSON object, got {type(value).__name__}")
    return value


def squad_rows(path: str) -> Iterator[dict]:
    """Questions of a SQuAD v1.1 file, in the shape of TFDS's `squad/v1.1`: id, title, context, question, answers."""
    try:
        articles = json.loads(read_text(path))["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {
                        "id": question["id"],
                        "title": article.get("title", ""),
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": {
                            "text": [answer["text"] for answer in question["answers"]],
                            "answer_start": [answer["answer_start"] for answer in question["answers"]],
                        },
                    }
    except json.JSONDecodeError as error:
        raise bad_row(path, error.lineno, f"not JSON ({error.msg}); is the file cut short?") from error
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not in SQuAD v1.1's format: {error!r} where an article, paragraph or question is due"
        ) from error
