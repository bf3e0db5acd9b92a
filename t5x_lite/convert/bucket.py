"""Read T5X checkpoints where they are, in a bucket: places with the methods of pathlib.Path that this takes.

TensorStore reads them; TENSORSTORE_GCS_HTTP_URL names another server than Google's. Must not depend on formats.
"""

from pathlib import Path
from typing import Any

import tensorstore

from t5x_lite.errors import MissingFileError, UserError


class BucketPath:
    """A place in a bucket, such as gs://BUCKET/FOLDER/NAME."""

    def __init__(self, url: str):
        self._url = url.rstrip("/")

    def __str__(self) -> str:
        return self._url

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath(f"{self._url}/{name}")

    @property
    def parents(self) -> list["BucketPath"]:
        parts = self._url.split("/")
        return [BucketPath("/".join(parts[:end])) for end in range(len(parts) - 1, 3, -1)]

    def absolute(self) -> "BucketPath":
        return self

    def is_file(self) -> bool:
        keys = tensorstore.KvStore.KeyRange(self._key, f"{self._key}\0")
        return bool(self._store.list(keys).result())

    def is_dir(self) -> bool:
        return False

    exists = is_file

    def read_bytes(self) -> bytes:
        result = self._store.read(self._key).result()
        if result.state != "value":
            raise MissingFileError(f"{self} does not exist")
        return result.value

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    @property
    def _store(self) -> Any:
        try:
            return tensorstore.KvStore.open(f"{self._url.rpartition('/')[0]}/").result()
        except ValueError as error:
            raise UserError(f"{self} cannot be read: {str(error).splitlines()[0]}") from error

    @property
    def _key(self) -> str:
        return self._url.rpartition("/")[2]


AnyPath = Path | BucketPath


def place_of(path: str | Path | BucketPath) -> AnyPath:
    """Return a local path, or a place in a bucket."""
    if isinstance(path, BucketPath) or "://" not in str(path):
        return path if isinstance(path, BucketPath) else Path(path).expanduser()
    return BucketPath(str(path))
