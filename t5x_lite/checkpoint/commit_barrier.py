"""Whether all hosts could write their part of a checkpoint: agreed upon before it is committed.

Orbax's writing threads meet twice in a save, when all is written and when it is committed. A host that could not write
never comes, and the others would wait for it for 20 minutes. Here it comes all the same, and says so: all give the save
up. This module knows the key-value store of `hosts` and Orbax's barriers; it must not know what is saved.
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

_MEETINGS = 2  # in a save
_TIMEOUT_MS = 1_200_000  # Orbax's own: for a host that neither comes nor fails


class Agreement:
    """Orbax's `barrier_sync_fn`. Every process makes one, and calls `begin` before each save."""

    def __init__(self) -> None:
        self._meet = ocp.multihost.get_barrier_sync_fn()
        self._save = self._met = 0

    def begin(self) -> None:
        self._save, self._met = self._save + 1, 0

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Called by Orbax. Raises OSError: a process could not write its part; says which."""
        if "set_value" not in key:
            self._come(timeout_ms)
            failed = [said for _, said in distributed.coordination_client().key_value_dir_get(self._name("failed/"))]
            if failed:
                raise UserFileError(f"process {', '.join(failed)} could not write")
        elif threading.current_thread() is not threading.main_thread():  # the save has ended, in whatever way
            self._refuse()

    def _refuse(self) -> None:
        """Where this process has not come to all meetings: it has failed, and the others are waiting."""
        if self._met < _MEETINGS:
            here = str(jax.process_index())
            distributed.coordination_client().key_value_set(self._name(f"failed/{here}"), here, allow_overwrite=True)
        while self._met < _MEETINGS:
            self._come(_TIMEOUT_MS)

    def _come(self, timeout_ms: int) -> None:
        self._met += 1
        self._meet(key=self._name(f"meeting {self._met}"), timeout_ms=timeout_ms)

    def _name(self, what: str) -> str:
        return f"t5x_lite/save {self._save}/{what}"


def on_all_hosts(make: Callable[[], Any]) -> Any:
    """What `make` makes; where it fails on one host, it fails on all, for all must begin a save or none."""
    if jax.process_count() == 1:
        return make()
    made = failure = None
    try:
        made = make()
    except Exception as error:
        failure = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(failure is not None)))
    if len(failed):
        raise failure or OSError(f"process {', '.join(map(str, failed))} could not write")
    return made
