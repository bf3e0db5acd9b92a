"""One training run in a MODEL_DIR at a time.

The lock is the operating system's (flock) on MODEL_DIR/lock, so that it ends with the process that holds it, however
it ends; what the file says is only for the message. Network file systems pass it on (NFS from version 4 on). A bucket
has no such thing: a MODEL_DIR gs://... is not locked.
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

from t5x_lite.errors import UserError, UserFileError

log = logging.getLogger(__name__)

FILE = "lock"
_UNKNOWN_TO_FILE_SYSTEM = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def held(model_dir: str) -> Iterator[None]:
    """Holds the lock of `model_dir`, which is made where missing.

    Raises:
      ValueError: another run holds it; says which.
      OSError: the folder cannot be written.
    """
    if "://" in model_dir:
        yield
        return
    path = Path(model_dir, FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserFileError(f"MODEL_DIR = {model_dir!r} cannot be written: {error}. Name another folder.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"MODEL_DIR = {model_dir!r} is in use: {_described(file.read())}. Two runs would spoil each other's "
                "checkpoints: end that one, or give this one another MODEL_DIR."
            ) from None
        except OSError as error:
            if error.errno not in _UNKNOWN_TO_FILE_SYSTEM:
                raise
            log.warning("MODEL_DIR = %r is not locked, for its file system has no locks (%s).", model_dir, error)
        else:
            file.truncate(0)
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": now}) + "\n")
            file.flush()
        yield


def _described(content: str) -> str:
    try:
        said = json.loads(content)
        return f"process {said['pid']} on {said['host']} trains in it since {said['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process trains in it"
