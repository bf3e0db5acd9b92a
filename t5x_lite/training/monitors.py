"""Monitors of a training run: preemption signals, hangs and loss spikes."""

import contextlib
import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

# The exit code of a preempted run that has saved and resumes when it is started again (EX_TEMPFAIL).
PREEMPTED = 75

STALLED_SECONDS = 600


class Preempted(SystemExit):
    """The run was preempted; it has saved and exits."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class PreemptionSignal:
    """Detects SIGTERM, SIGINT (Ctrl-C), SIGHUP (a closed terminal) or, on Cloud TPUs, a maintenance notice, and reports
    it to all hosts at the same step.

    On several hosts JAX's preemption service receives SIGTERM and chooses the step; the other signals are passed to it
    as SIGTERM. A second SIGINT ends the process at once; further signals of the other kinds have no effect. A signal
    that is ignored from the start, as SIGHUP under nohup, stays ignored.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self._received = self._called = False
        self._several = jax.process_count() > 1

    @contextlib.contextmanager
    def listening(self) -> Iterator["PreemptionSignal"]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        signals = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        if self._several:
            signals.remove(signal.SIGTERM)
        previous = {number: signal.signal(number, self._handle) for number in signals}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nInterrupted: the run is saved after this step. Press Ctrl-C again to end at once.\n")
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._received = True

    def __call__(self, step: int) -> bool:
        """Return whether to stop after `step`. Call it at every step, on all hosts."""
        return self._received or (jax.process_count() > 1 and self._all_stop_at(step))

    def _all_stop_at(self, step: int) -> bool:
        """Return whether JAX has chosen this step.

        For a signal before the first call it chooses 1, which a run that resumes has behind it. So the first call asks
        for that too, and all hosts take one answer, because one may hear of the signal later than another.
        """
        if self._called:
            return multihost_utils.reached_preemption_sync_point(step)
        self._called = True
        early = multihost_utils.reached_preemption_sync_point(1)
        stops = multihost_utils.reached_preemption_sync_point(step) or early
        return bool(np.any(multihost_utils.process_allgather(np.array(stops))))


class HangDetector:
    """Logs a warning and the stacks of this host's threads whenever no step has finished for `seconds`."""

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
                    "host that has stopped. Stack traces of process %d:",
                    now - since,
                    number,
                    jax.process_index(),
                )
                faulthandler.dump_traceback(sys.stderr, all_threads=True)


class LossSpikeDetector:
    """Logs a warning if a loss exceeds its recent mean by more than 6 standard deviations and 10%."""

    def __init__(self, window: int = 100):
        self._decay = 1 - 1 / window
        self._window = window
        self._count, self._mean, self._square = 0, 0.0, 0.0

    def __call__(self, step: int, loss: float) -> bool:
        deviation = math.sqrt(max(self._square - self._mean**2, 0.0))
        spike = self._count >= self._window and loss > self._mean + max(6 * deviation, 0.1 * abs(self._mean))
        if spike:
            log.warning(
                "The loss of step %d is %.4g; its recent mean: %.4g +- %.2g.", step, loss, self._mean, deviation
            )
        self._count += 1
        decay = min(self._decay, 1 - 1 / self._count)
        self._mean = decay * self._mean + (1 - decay) * loss
        self._square = decay * self._square + (1 - decay) * loss**2
        return spike
