"""Read rows of Parquet and Arrow files (.parquet, .arrow, .feather), local or gs://, with pyarrow.

Only the needed columns are read, one piece at a time: a Parquet row group or an Arrow record batch. Errors name the
row, counted from 1. Must not import: tasks, templates, SeqIO.
"""

import collections
import io
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet
import tensorflow as tf

from tasks import readers
from tasks.errors import UserError

ENDINGS = (".parquet", ".arrow", ".feather")
_FEATHER_1 = b"FEA1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_ROWS = 1024  # rows that are made into Python values at a time


class _File(io.RawIOBase):
    """A file of TensorFlow's file systems, for pyarrow."""

    def __init__(self, path: str):
        self._file = tf.io.gfile.GFile(path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()


class _Table(NamedTuple):
    """An open file.

    sizes: rows of each piece; None if they are not known before the pieces are read.
    read: (piece number, column names) -> record batches of the piece; without sizes, piece 0 is the whole file.
    bytes: column name -> size in memory, about.
    """

    names: Sequence[str]
    sizes: Sequence[int] | None
    read: Callable[[int, Sequence[str]], Iterable[pa.RecordBatch]]
    bytes: dict[str, float]


def column_names(path: str) -> list[str]:
    """Return the names of a file's columns. Raises BadRow if it cannot be opened."""
    return list(_open(path).names)


def num_rows(path: str) -> int:
    """Return the number of rows. Raises BadRow if the file is damaged."""
    table = _open(path)
    return sum(1 for _ in rows(path, readers.Skipped(path), [])) if table.sizes is None else sum(table.sizes)


def size(path: str, columns: Collection[str] | None = None) -> int:
    """Return about how many bytes the columns have in memory. Raises BadRow if the file cannot be opened."""
    return round(sum(size for name, size in _open(path).bytes.items() if columns is None or name in columns))


def rows(path: str, skipped: readers.Skipped, columns: Collection[str] | None = None) -> Iterator[tuple[int, dict]]:
    """Yield the rows with their numbers.

    Args:
      columns: the columns to read, of those that exist; None: all.
      skipped: raises an error for a damaged row group, or counts it and leaves its rows out.
    """
    with skipped:
        table = _open(path)
        names = [name for name in table.names if columns is None or name in columns]
        number = 0
        for piece in range(1 if table.sizes is None else len(table.sizes)):
            end = None if table.sizes is None else number + table.sizes[piece]
            with skipped:
                batches = iter(table.read(piece, names))
                while (batch := _next(path, number + 1, end, batches)) is not None:
                    for start in range(0, batch.num_rows, _ROWS):
                        part = batch.slice(start, _ROWS)
                        for row in _python_rows(path, number + 1, part) if names else [()] * part.num_rows:
                            number += 1
                            with skipped:
                                if isinstance(row, readers.BadRow):
                                    raise row
                                yield number, dict(zip(names, row, strict=True))
            number = number if end is None else end
    skipped.log()


def _next(path: str, number: int, end: int | None, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    try:
        if (batch := next(batches, None)) is not None:
            batch.validate()
            try:
                batch.validate(full=True)
            except pa.ArrowInvalid as error:
                if "UTF8" not in str(error):  # which is told by row
                    raise
        return batch
    except (pa.ArrowException, OSError) as error:
        rest = f" in the row group that ends with row {end}" if end is not None else ""
        problem = f"damaged data{rest} ({_first_line(error)}): get the file again"
        raise readers.bad_row(path, number, problem) from error


def _python_rows(path: str, first: int, batch: pa.RecordBatch) -> Iterable[tuple | readers.BadRow]:
    """Return the rows of a batch, or a BadRow where one holds text that is not UTF-8."""
    try:
        return list(zip(*map(_values, batch.columns), strict=True))
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [readers.bad_row(path, first, f"not UTF-8 ({error})")]
        rows = ((first + i, batch.slice(i, 1)) for i in range(batch.num_rows))
        return itertools.chain.from_iterable(_python_rows(path, number, row) for number, row in rows)


def _values(column: pa.Array) -> Sequence[Any]:
    """Return the values in Python's types. A float32 has the digits that it has as text: 0.1, not 0.10000000149."""
    if not (pa.types.is_float32(column.type) or pa.types.is_float16(column.type)):
        return column.to_pylist()
    return [None if math.isnan(x) else float(str(x)) for x in column.to_numpy(zero_copy_only=False)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _open(path: str) -> _Table:
    try:
        table = _open_parquet(path) if path.lower().endswith(".parquet") else _open_arrow(path)
    except (pa.ArrowException, OSError) as error:
        kind = "Parquet" if path.lower().endswith(".parquet") else "Arrow"
        raise readers.BadRow(
            f"{path}: not a whole {kind} file ({_first_line(error)}): if it was cut short, get it again"
        ) from error
    if repeated := [name for name, times in collections.Counter(table.names).items() if times > 1]:
        raise UserError(f"{path} has the column {repeated[0]!r} more than once")
    return table


def _open_parquet(path: str) -> _Table:
    file = pyarrow.parquet.ParquetFile(_File(path))
    groups = [file.metadata.row_group(k) for k in range(file.num_row_groups)]
    sizes: dict[str, float] = dict.fromkeys(file.schema_arrow.names, 0)
    for chunk in (group.column(k) for group in groups for k in range(group.num_columns)):
        name = next((name for name in sizes if f"{chunk.path_in_schema}.".startswith(f"{name}.")), None)
        if name is not None:
            sizes[name] += chunk.total_uncompressed_size

    def read(piece: int, names: Sequence[str]) -> Iterable[pa.RecordBatch]:
        return file.iter_batches(_ROWS, row_groups=[piece], columns=list(names))

    return _Table(file.schema_arrow.names, [group.num_rows for group in groups], read, sizes)


def _open_arrow(path: str) -> _Table:
    """Open Arrow's file format, or its stream format, which `datasets` writes."""
    total = tf.io.gfile.stat(path).length
    if _File(path).read(len(_FEATHER_1)) == _FEATHER_1:
        raise pa.ArrowInvalid("Feather of version 1: write it with version=2")
    try:
        schema, is_stream = pa.ipc.open_file(_File(path)).schema, False
    except pa.ArrowInvalid:
        schema, is_stream = pa.ipc.open_stream(_File(path)).schema, True
        file = _File(path)
        file.seek(max(total - len(_END_OF_STREAM), 0))
        if file.read() != _END_OF_STREAM:
            raise pa.ArrowInvalid("the stream has no end") from None

    def read(piece: int, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        options = pa.ipc.IpcReadOptions(included_fields=[schema.names.index(name) for name in names])
        if is_stream:
            yield from pa.ipc.open_stream(_File(path), options=options)
        else:
            file = pa.ipc.open_file(_File(path), options=options)
            yield from (file.get_batch(k) for k in range(file.num_record_batches))

    return _Table(schema.names, None, read, {name: total / len(schema.names) for name in schema.names})
