"""JSON lines that grow while they are computed, outlive a kill, and are gone on with; and how far they are.

It must not know what the lines mean, the model or the data.
"""

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

from t5x_lite.errors import UserError
from t5x_lite.metrics import metric_logger

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


def json_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_whole(path: epath.Path, rows: Iterable[Row]) -> None:
    """JSON lines that come with an evaluation's scores: the file is there only when all went well.

    What cannot be written (a full disk) is a warning, for the scores are worth more.
    """
    partial = path.parent / f"{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w") as file:
            for row in rows:
                file.write(json_line(row))
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        logger.warning("The predictions in %s could not be written (%s); the scores are.", path, error)


class ResumableJsonlWriter:
    """JSON lines that grow at `<path>.partial` and take their name when all are there.

    Beside both, `.made_from.json` says what they follow from. A partial that follows from the same is gone on with,
    after its last whole window; a final file that does is complete, and nothing is done. Another final file is replaced
    in the end. A partial that follows from something else is refused: it may be hours of work.

    Only process 0 touches files; all know `count`, the number of lines that are there, and `complete`.

    Raises:
      ValueError: the path is a URL; the partial follows from something else, of which all differences are named.
    """

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, Any], window: int):
        if "://" in str(path):
            raise UserError(
                f"results are appended as they come, which {path} does not allow: "
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
                logger.info("%s is complete already, and follows from the same: remove it to do it again.", self._path)
                return count, True
            logger.warning("%s exists, and will be replaced when all is done.", self._path)
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
                f"{self._partial} was begun by another run ({differences}): go on as it was begun, name another "
                "INFER_OUTPUT, or remove it to begin anew"
            )
        count, size = _whole_windows(self._partial, window)
        os.truncate(self._partial, size)
        logger.info("%s: going on after the %d lines that are there.", self._partial, count)
        return count, False

    def __enter__(self) -> None:
        if self._writes:
            self._file = self._partial.open("a", encoding="utf-8")

    def add(self, rows: Collection[Row]) -> None:
        """Appends them, and returns when they are on the disk."""
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
            _made_from(self._path).unlink(missing_ok=True)  # at no time may it say something wrong
            self._partial.replace(self._path)
            _made_from(self._partial).replace(_made_from(self._path))


def _made_from(path: Path) -> Path:
    return path.with_name(f"{path.name}.made_from.json")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _whole_windows(path: Path, window: int) -> tuple[int, int]:
    """Lines and bytes of the whole windows at the start of the file: what a kill has torn is behind them."""
    count = size = 0
    with path.open("rb") as file:
        while True:
            lines = list(itertools.islice(file, window))
            if len(lines) < window or not lines[-1].endswith(b"\n"):
                return count, size
            count, size = count + window, size + sum(map(len, lines))


class Progress:
    """A bar on the terminal, or where there is none a line in the log now and then."""

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
            of, eta = "", ""
            if self._total is not None:
                of, eta = f" of {self._total}", f", ETA {tqdm.format_interval((self._total - self._done) / rate)}"
            logger.info("%d%s lines, %.1f lines/s%s", self._done, of, rate, eta)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
