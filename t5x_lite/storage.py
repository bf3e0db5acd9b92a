"""MODEL_DIR as a local folder, for files that grow line by line or are drawn by libraries that know no buckets.

Checkpoints are not among them: Orbax writes to gs:// itself. Knows files; must not know what is in them.
"""

import logging
import os
import tempfile
import threading
import time
from pathlib import Path

from etils import epath

from t5x_lite.errors import UserFileError

log = logging.getLogger(__name__)


class MirroredDirectory:
    """`path` is MODEL_DIR itself; of a bucket, a local folder whose changed files `publish` copies there.

    Args:
      model_dir: a path, or a URL such as gs://bucket/run.
      bring: files to begin with, where the bucket has them.
    """

    def __init__(self, model_dir: str | os.PathLike[str], bring: tuple[str, ...] = ()):
        self._remote = epath.Path(model_dir) if "://" in str(model_dir) else None
        self._published: dict[Path, tuple[int, int]] = {}
        self._last = time.monotonic()
        self._lock = threading.Lock()  # a checkpoint's commit publishes, too, and in the background
        if self._remote is None:
            self.path = Path(model_dir)
            return
        self.path = Path(tempfile.mkdtemp(prefix="t5x_lite-"))
        for name in bring:
            if (self._remote / name).exists():
                (self.path / name).write_bytes((self._remote / name).read_bytes())
                self._published[self.path / name] = _state(self.path / name)  # hosts that add nothing leave it alone

    def __str__(self) -> str:
        return str(self._remote or self.path)

    def publish(self, every: float = 0.0) -> None:
        """Copies what has changed since the last time; whole files, for objects in a bucket cannot be added to.

        Args:
          every: seconds that must have passed since that time.
        """
        if self._remote is None or time.monotonic() - self._last < every:
            return
        with self._lock:
            self._last = time.monotonic()
            for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
                state = _state(file)
                if self._published.get(file) != state:
                    target = self._remote / file.relative_to(self.path).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
                    self._published[file] = state


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size


class AppendOnlyFile:
    """A file that is only added to. What the disk refuses waits in memory, and is tried again with the next addition.

    Nothing is lost or torn where a disk is full for a while. For several threads.

    Raises OSError: the file cannot be opened.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._lock = threading.Lock()

    def write(self, content: bytes) -> None:
        """Adds `content`, at once where that can be done."""
        with self._lock:
            waited = bool(self._waiting)
            self._waiting += content
            try:
                self._write()
            except OSError as error:
                if not waited:
                    log.warning("%s cannot be written (%s). What it lacks is kept, and tried again.", self._path, error)

    def flush(self) -> None:
        """Returns when all that was added is on the disk. Raises OSError: some of it cannot be written."""
        with self._lock:
            try:
                self._write()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise UserFileError(
                    f"{self._path} cannot be written ({error}): make room, or give access to it"
                ) from None

    def close(self) -> None:
        """Closes; what still cannot be written is lost, which the log says."""
        with self._lock, self._file:
            try:
                self._write()
            except OSError as error:
                log.warning("The last %d bytes of %s are lost (%s).", len(self._waiting), self._path, error)

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]
