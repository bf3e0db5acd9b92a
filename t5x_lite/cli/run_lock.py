"""Lock a MODEL_DIR, so that only one run trains in it at a time.

The lock is an operating system lock (flock) on MODEL_DIR/lock, so it is released however the process ends. The file's
content is only for the error message. Network file systems support the lock (NFS from version 4). Buckets do not: a
MODEL_DIR gs://... is not locked.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from t5x_lite import storage
from t5x_lite.errors import UserError, UserFileError

log = logging.getLogger(__name__)

FILE = "lock"
_UNKNOWN_TO_FILE_SYSTEM = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def exclusive(model_dir: str) -> Iterator[None]:
    """Hold the lock of `model_dir`, which is created if missing.

    Raises:
      ValueError: another run holds the lock; the message names it.
      OSError: the folder cannot be written.
    """
    if storage.is_url(model_dir):
        yield
        return
    path = Path(model_dir, FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        if os.path.exists(model_dir) and not os.path.isdir(model_dir):
            raise UserFileError(f"MODEL_DIR = {model_dir!r} is a file, not a folder: choose another one") from None
        raise UserFileError(f"MODEL_DIR = {model_dir!r} cannot be written: {error}. Choose another folder.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"MODEL_DIR = {model_dir!r} is in use: {_describe_holder(file.read())}. Two runs would overwrite each "
                "other's checkpoints: stop that one, or give this one another MODEL_DIR."
            ) from None
        except OSError as error:
            if error.errno not in _UNKNOWN_TO_FILE_SYSTEM:
                raise
            log.warning("MODEL_DIR = %r is not locked, because its file system has no locks (%s).", model_dir, error)
        else:
            file.truncate(0)
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": now}) + "\n")
            file.flush()
        yield


def _describe_holder(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']} has been training in it since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process is training in it"
