"""What is watched while a run trains: notices to stop, progress, and losses that jump.

Knows signals, threads and numbers. Must not know models, data or checkpoints.
"""

import contextlib
import faulthandler
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

# The exit code of a run that has been asked to stop, has saved, and goes on when it is started again (EX_TEMPFAIL).
PREEMPTED = 75

STALLED_SECONDS = 600


class Preempted(SystemExit):
    """The run has saved and stops, because it was told to."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class PreemptionSignal:
    """Whether SIGTERM (or, on Cloud TPUs, a maintenance notice) has come; all hosts are told at the same step.

    On several hosts JAX's own service hears the signal and agrees on the step. Further signals change nothing.
    """

    def __init__(self) -> None:
        self._came = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["PreemptionSignal"]:
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._hear)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def _hear(self, number: int, frame: Any) -> None:
        self._came = True

    def __call__(self, step: int) -> bool:
        """To be asked at every step, on all hosts."""
        return self._came or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step))


class HangDetector:
    """Warns, with the stack of every thread of this host, when no step has been done for `seconds`, again and again."""

    def __init__(self, seconds: float = STALLED_SECONDS):
        self._seconds = seconds
        self._last = (time.monotonic(), 0)
        self._ended = threading.Event()

    def step(self, number: int) -> None:
        self._last = (time.monotonic(), number)

    @contextlib.contextmanager
    def watched(self) -> Iterator["HangDetector"]:
        self._last = (time.monotonic(), self._last[1])
        threading.Thread(target=self._watch, name="progress", daemon=True).start()
        try:
            yield self
        finally:
            self._ended.set()

    def _watch(self) -> None:
        warned_at = 0.0
        while not self._ended.wait(self._seconds / 10):
            since, number = self._last
            now = time.monotonic()
            if now - max(since, warned_at) > self._seconds:
                warned_at = now
                log.warning(
                    "No progress for %.0f s since step %d: slow data, a long compilation or evaluation, or another "
                    "host that has stopped. This is where process %d is:",
                    *(now - since, number, jax.process_index()),
                )
                faulthandler.dump_traceback(sys.stderr, all_threads=True)


class LossSpikeDetector:
    """Warns of a loss far above what it has been lately: by 6 standard deviations, and a tenth."""

    def __init__(self, window: int = 100):
        self._decay = 1 - 1 / window
        self._window = window
        self._count, self._mean, self._square = 0, 0.0, 0.0

    def __call__(self, step: int, loss: float) -> bool:
        deviation = math.sqrt(max(self._square - self._mean**2, 0.0))
        spike = self._count >= self._window and loss > self._mean + max(6 * deviation, 0.1 * abs(self._mean))
        if spike:
            log.warning("The loss of step %d is %.4g; it was %.4g +- %.2g lately.", step, loss, self._mean, deviation)
        self._count += 1
        decay = min(self._decay, 1 - 1 / self._count)
        self._mean = decay * self._mean + (1 - decay) * loss
        self._square = decay * self._square + (1 - decay) * loss**2
        return spike
