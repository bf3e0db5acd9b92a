"""A barrier at which all hosts learn, before a checkpoint is committed, whether every host wrote its part.

Orbax's writing threads synchronise twice in a save: when all is written, and when it is committed. By default a host
whose write failed never reaches the barrier, and the others time out after 20 minutes. Here it reaches the barrier and
reports the failure, and all hosts give up the save.
"""

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from t5x_lite import distributed
from t5x_lite.errors import UserFileError

_BARRIERS = 2  # in each save
_TIMEOUT_MS = 1_200_000  # Orbax's default, for a host that neither arrives nor reports a failure


class CommitBarrier:
    """Orbax's `barrier_sync_fn`. Every process creates one, and calls `begin` before each save."""

    def __init__(self) -> None:
        self._sync = ocp.multihost.get_barrier_sync_fn()
        self._save = self._passed = 0

    def begin(self) -> None:
        self._save, self._passed = self._save + 1, 0

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait for all processes; Orbax calls this. Raises OSError, naming the processes, if any could not write."""
        if "set_value" not in key:
            self._wait(timeout_ms)
            failed = [index for _, index in distributed.coordination_client().key_value_dir_get(self._key("failed/"))]
            if failed:
                raise UserFileError(f"process {', '.join(failed)} could not write")
        elif threading.current_thread() is not threading.main_thread():  # the save has succeeded or failed
            self._report_failure()

    def _report_failure(self) -> None:
        """Report a failed write: if this process has not passed all barriers, the others are waiting for it."""
        if self._passed < _BARRIERS:
            index = str(jax.process_index())
            distributed.coordination_client().key_value_set(self._key(f"failed/{index}"), index, allow_overwrite=True)
        while self._passed < _BARRIERS:
            self._wait(_TIMEOUT_MS)

    def _wait(self, timeout_ms: int) -> None:
        self._passed += 1
        self._sync(key=self._key(f"barrier {self._passed}"), timeout_ms=timeout_ms)

    def _key(self, name: str) -> str:
        return f"t5x_lite/save {self._save}/{name}"


def on_all_hosts(make: Callable[[], Any]) -> Any:
    """Return `make()`. If it fails on one host, raise on all, because a save must start on all hosts or on none."""
    if jax.process_count() == 1:
        return make()
    result = failure = None
    try:
        result = make()
    except Exception as error:
        failure = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(failure is not None)))
    if len(failed):
        raise failure or OSError(f"process {', '.join(map(str, failed))} could not write")
    return result
