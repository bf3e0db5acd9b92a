"""Write JSON lines incrementally and resume after a crash; report progress."""

import contextlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from t5x_lite import storage
from t5x_lite.errors import UserError
from t5x_lite.metrics import metric_logger

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


def json_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_whole(path: epath.Path, rows: Iterable[Row]) -> None:
    """Write the JSON lines of an evaluation; the file appears only when it is complete.

    A write error (such as a full disk) is logged and not raised, so that the scores are not lost.
    """
    partial = path.parent / f"{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json_line(row))
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        logger.warning("The predictions in %s could not be written (%s); the scores are not affected.", path, error)


class ResumableJsonlWriter:
    """Appends JSON lines to `<path>.partial` and renames it to `path` when all are written.

    Next to each of them, `.made_from.json` records the settings that the lines depend on (provenance), `about`. A
    partial file with the same settings is resumed after its last complete window. A final file with the same settings
    is complete, and nothing is done; another final file is replaced at the end. A partial file with other settings
    raises an error, because it may be hours of work.

    Only process 0 accesses files; all processes have `count`, the number of lines written, and `complete`.

    Raises:
      ValueError: the path is a URL, or the partial file has other settings, which are all listed.
    """

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, Any], window: int):
        if storage.is_url(path):
            raise UserError(
                f"results are appended to the output file, which {path} does not allow: "
                "give a local file as INFER_OUTPUT, or mount the bucket (gcsfuse)"
            )
        self._path = Path(path)
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        self._writes = jax.process_index() == 0
        self._file = None
        state = np.zeros(2, np.int32)
        if self._writes:
            state[:] = self._prepare(json.loads(json.dumps(about)), window)
        count, complete = multihost_utils.broadcast_one_to_all(state)
        self.count, self.complete = int(count), bool(complete)

    def _prepare(self, about: dict[str, Any], window: int) -> tuple[int, bool]:
        if self._path.exists():
            if _read_json(_made_from(self._path)) == about:
                with self._path.open("rb") as file:
                    count = sum(1 for _ in file)
                logger.info("%s is complete, with the same settings. Remove it to compute it again.", self._path)
                return count, True
            logger.warning("%s exists, and will be replaced when all lines are written.", self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._partial.exists() or self._partial.stat().st_size == 0:
            temporary = self._partial.with_name(f"{self._partial.name}.tmp")
            temporary.write_text(json.dumps(about, indent=1) + "\n")
            temporary.replace(_made_from(self._partial))
            self._partial.touch()
            return 0, False
        if (before := _read_json(_made_from(self._partial)) or {}) != about:
            differences = "; ".join(
                f"{key} was {json.dumps(before.get(key))}, is {json.dumps(about.get(key))}"
                for key in (about | before)
                if before.get(key) != about.get(key)
            )
            raise UserError(
                f"{self._partial} was started with other settings ({differences}): use the same settings, give another "
                "INFER_OUTPUT, or remove it to start again"
            )
        count, size = _whole_windows(self._partial, window)
        os.truncate(self._partial, size)
        logger.info("%s: resuming after its first %d lines.", self._partial, count)
        return count, False

    def __enter__(self) -> None:
        if self._writes:
            self._file = self._partial.open("a", encoding="utf-8")

    def add(self, rows: Collection[Row]) -> None:
        """Append rows and fsync."""
        self.count += len(rows)
        if self._file is not None:
            self._file.writelines(map(json_line, rows))
            self._file.flush()
            os.fsync(self._file.fileno())

    def __exit__(self, kind: object, *_: object) -> None:
        if self._file is None:
            return
        self._file.close()
        if kind is None:
            _made_from(self._path).unlink(missing_ok=True)  # so that it never describes other lines
            self._partial.replace(self._path)
            _made_from(self._partial).replace(_made_from(self._path))


def _made_from(path: Path) -> Path:
    return path.with_name(f"{path.name}.made_from.json")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _whole_windows(path: Path, window: int) -> tuple[int, int]:
    """Return the lines and bytes of the complete windows at the start of the file, without what a crash left behind."""
    count = size = 0
    with path.open("rb") as file:
        while True:
            lines = list(itertools.islice(file, window))
            if len(lines) < window or not lines[-1].endswith(b"\n"):
                return count, size
            count, size = count + window, size + sum(map(len, lines))


class Progress:
    """Shows a progress bar on a terminal, else logs a line from time to time."""

    def __init__(self, done: int, total: int | None):
        self._bar = tqdm(initial=done, total=total, unit=" lines", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self._done, self._first, self._total = done, done, total
        self._started = time.monotonic()
        self._line_due = self._started + metric_logger.SECONDS_BETWEEN_LINES

    def __enter__(self) -> "Progress":
        return self

    def add(self, lines: int) -> None:
        self._done += lines
        self._bar.update(lines)
        now = time.monotonic()
        if self._bar.disable and now >= self._line_due:
            self._line_due = now + metric_logger.SECONDS_BETWEEN_LINES
            rate = (self._done - self._first) / (now - self._started)
            total, eta = "", ""
            if self._total is not None:
                total, eta = f" of {self._total}", f", ETA {tqdm.format_interval((self._total - self._done) / rate)}"
            logger.info("%d%s lines, %.1f lines/s%s", self._done, total, rate, eta)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
