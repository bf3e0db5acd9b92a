"""MODEL_DIR as a local folder, for files that grow line by line or are drawn by libraries that know no buckets.

Checkpoints are not among them: Orbax writes to gs:// itself. Knows files; must not know what is in them.
"""

import os
import tempfile
import time
from pathlib import Path

from etils import epath


class Folder:
    """`path` is MODEL_DIR itself; of a bucket, a local folder whose changed files `publish` copies there.

    Args:
      model_dir: a path, or a URL such as gs://bucket/run.
      bring: files to begin with, where the bucket has them.
    """

    def __init__(self, model_dir: str | os.PathLike[str], bring: tuple[str, ...] = ()):
        self._remote = epath.Path(model_dir) if "://" in str(model_dir) else None
        self._published: dict[Path, tuple[int, int]] = {}
        self._last = time.monotonic()
        if self._remote is None:
            self.path = Path(model_dir)
            return
        self.path = Path(tempfile.mkdtemp(prefix="t5x_lite-"))
        for name in bring:
            if (self._remote / name).exists():
                (self.path / name).write_bytes((self._remote / name).read_bytes())

    def __str__(self) -> str:
        return str(self._remote or self.path)

    def publish(self, every: float = 0.0) -> None:
        """Copies what has changed since the last time; whole files, for objects in a bucket cannot be added to.

        Args:
          every: seconds that must have passed since that time.
        """
        if self._remote is None or time.monotonic() - self._last < every:
            return
        self._last = time.monotonic()
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            found = file.stat()
            state = (found.st_mtime_ns, found.st_size)
            if self._published.get(file) != state:
                target = self._remote / file.relative_to(self.path).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                self._published[file] = state
