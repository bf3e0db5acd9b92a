"""Buckets: tell a URL from a folder, explain errors; and MODEL_DIR as a local folder, for files that are appended to or
written by libraries without bucket support.

Checkpoints do not use that folder: Orbax writes to gs:// itself.
"""

import contextlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from t5x_lite.errors import ExistingFileError, UserError, UserFileError

log = logging.getLogger(__name__)


PATIENCE_SECONDS = 30


def is_url(path: Any) -> bool:
    """Return whether a path is in a bucket, such as gs://bucket/run, and not local."""
    return re.match(r"\w+://", str(path)) is not None


@contextlib.contextmanager
def waiting_for(place: Any) -> Iterator[None]:
    """Log what is waited for if a bucket takes long: its libraries repeat requests for minutes without a word."""
    if not is_url(place):
        yield
        return
    timer = threading.Timer(
        PATIENCE_SECONDS,
        log.warning,
        (
            "Still waiting for %s after %d seconds. If it cannot be reached, that is tried for some minutes.",
            place,
            PATIENCE_SECONDS,
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def bucket_errors(place: Any) -> Iterator[None]:
    """Turn what a bucket's library raises, of which each has errors of its own, into one line. Local places: as it is.

    Raises UserFileError, which names the place, the reason and the cure.
    """
    try:
        with waiting_for(place):
            yield
    except UserError:
        raise
    except Exception as error:
        if not is_url(place):
            raise
        reason = " ".join(str(error).split())[:200].rstrip(". ") or type(error).__name__
        raise UserFileError(
            f"{place} cannot be reached ({reason}): check the name of the bucket, the network, and the login and its "
            "rights (gcloud auth application-default login)"
        ) from error


def require_bucket(place: Any) -> None:
    """Raise UserFileError if the bucket of a gs:// place does not exist; one that may not be looked at passes."""
    bucket = "/".join(str(place).split("/")[:3])
    exists = True
    with contextlib.suppress(Exception):  # rights to a bucket's objects may come without those to its description
        exists = not bucket.startswith("gs://") or epath.Path(bucket).exists()
    if not exists:
        raise UserFileError(f"there is no bucket {bucket}: make it (gcloud storage buckets create {bucket})")


# What a folder is known by as a model: it comes last into an empty folder.
_LAST = ("config.json", "adapter_config.json", "params", "predict.jax_export")


@contextlib.contextmanager
def whole_folder(dest: Path) -> Iterator[Path]:
    """Give a path that does not exist, to write a folder there; at the end it becomes the local folder `dest`.

    A command that is killed leaves only `.<name>.partial`, beside `dest` or in an empty `dest`, which the same command
    removes; one that fails leaves nothing.

    Raises ExistingFileError if `dest` exists and is not empty.
    """
    place = dest.resolve()
    is_there = place.exists()  # perhaps as a mount point, which cannot be renamed, in a folder that cannot be written
    partial = (place if is_there else place.parent) / f".{place.name}.partial"
    if is_there and (not place.is_dir() or any(path != partial for path in place.iterdir())):
        raise ExistingFileError(f"{dest} exists and is not empty: name a new folder")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if not is_there:
            partial.rename(place)
            return
        for path in sorted(partial.iterdir(), key=lambda path: path.name in _LAST):
            path.rename(place / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class MirroredDirectory:
    """A local folder, `path`: MODEL_DIR itself or, if that is a bucket, a copy that `publish` uploads.

    Args:
      model_dir: a path, or a URL such as gs://bucket/run.
      bring: files to download first, if the bucket has them.

    Raises UserFileError if the bucket cannot be reached, as `publish` does.
    """

    def __init__(self, model_dir: str | os.PathLike[str], bring: tuple[str, ...] = ()):
        self._remote = epath.Path(model_dir) if is_url(model_dir) else None
        self._published: dict[Path, tuple[int, int]] = {}
        self._last = time.monotonic()
        self._lock = threading.Lock()  # a checkpoint's commit also publishes, in a background thread
        if self._remote is None:
            self.path = Path(model_dir)
            return
        self.path = Path(tempfile.mkdtemp(prefix="t5x_lite-"))
        for name in bring:
            with bucket_errors(self._remote / name):
                if not (self._remote / name).exists():
                    continue
                (self.path / name).write_bytes((self._remote / name).read_bytes())
                self._published[self.path / name] = _state(self.path / name)  # an unchanged file is not uploaded

    def __str__(self) -> str:
        return str(self._remote or self.path)

    def publish(self, every: float = 0.0) -> None:
        """Upload the files that have changed since the last call, whole, because objects cannot be appended to.

        Args:
          every: do nothing if fewer seconds have passed since the last call.
        """
        if self._remote is None or time.monotonic() - self._last < every:
            return
        with self._lock:
            self._last = time.monotonic()
            for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
                state = _state(file)
                if self._published.get(file) != state:
                    target = self._remote / file.relative_to(self.path).as_posix()
                    with bucket_errors(target):
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(file.read_bytes())
                    self._published[file] = state


def _state(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


class AppendOnlyFile:
    """A file that is only appended to. If a write fails, the data stays in memory and the next write retries it.

    A temporarily full disk loses no data and tears no line. Thread-safe.

    Raises OSError if the file cannot be opened.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._lock = threading.Lock()

    def write(self, content: bytes) -> None:
        """Append `content`. A failed write is logged, not raised."""
        with self._lock:
            had_pending = bool(self._pending)
            self._pending += content
            try:
                self._write()
            except OSError as error:
                if not had_pending:
                    log.warning("%s cannot be written (%s). The data is kept, and will be retried.", self._path, error)

    def flush(self) -> None:
        """Write and fsync everything appended so far. Raises OSError if that fails."""
        with self._lock:
            try:
                self._write()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise UserFileError(
                    f"{self._path} cannot be written ({error}): make room, or give access to it"
                ) from None

    def close(self) -> None:
        """Close. Data that still cannot be written is lost, which is logged."""
        with self._lock, self._file:
            try:
                self._write()
            except OSError as error:
                log.warning("The last %d bytes of %s are lost (%s).", len(self._pending), self._path, error)

    def _write(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]
