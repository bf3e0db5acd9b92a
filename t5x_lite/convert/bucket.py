"""Read models where they are, in a bucket: places with the methods of pathlib.Path that reading one takes.

TensorStore reads them; TENSORSTORE_GCS_HTTP_URL names another server than Google's. Must not depend on formats.
"""

import dataclasses
from pathlib import Path, PurePosixPath
from typing import Any

import tensorstore

from t5x_lite import storage
from t5x_lite.errors import MissingFileError

# Half a minute, not a quarter of an hour, for a server that does not answer.
_CONTEXT = tensorstore.Context({"gcs_request_retries": {"max_retries": 6, "initial_delay": "1s", "max_delay": "8s"}})


@dataclasses.dataclass(frozen=True)
class BucketPath:
    """A place in a bucket, such as gs://BUCKET/FOLDER/NAME."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "BucketPath":
        return self.parents[0] if self.parents else self

    @property
    def parents(self) -> list["BucketPath"]:
        parts = self.url.split("/")
        return [BucketPath("/".join(parts[:end])) for end in range(len(parts) - 1, 3, -1)]

    def absolute(self) -> "BucketPath":
        return self

    def is_file(self) -> bool:
        keys = tensorstore.KvStore.KeyRange(self.name, f"{self.name}\0")
        with storage.bucket_errors(self):
            return bool(self._store.list(keys).result())

    def is_dir(self) -> bool:
        return False

    exists = is_file

    def read_bytes(self) -> bytes:
        with storage.bucket_errors(self):
            result = self._store.read(self.name).result()
        if result.state != "value":
            raise MissingFileError(f"{self} does not exist")
        return result.value

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    @property
    def _store(self) -> Any:
        return tensorstore.KvStore.open(f"{self.url.rpartition('/')[0]}/", context=_CONTEXT).result()


AnyPath = Path | BucketPath


def place_of(path: str | AnyPath) -> AnyPath:
    """Return a local path, or a place in a bucket."""
    if isinstance(path, BucketPath):
        return path
    return BucketPath(str(path).rstrip("/")) if storage.is_url(path) else Path(path).expanduser()
