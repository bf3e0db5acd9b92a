"""A JAX profiler trace of some training steps: the option PROFILE_STEPS."""

import logging
import os
from pathlib import Path

import jax
import jax.profiler

log = logging.getLogger(__name__)

FOLDER = "profile"


class StepProfiler:
    """Writes a trace of the steps `first` to `last`, both included, to MODEL_DIR/profile."""

    def __init__(self, first: int, last: int, model_dir: str | os.PathLike) -> None:
        self._first, self._last, self._folder = first, last, Path(model_dir) / FOLDER
        self._running = False

    def due(self, steps_done: int) -> bool:
        """Whether the trace starts or ends after so many steps, so that the caller must wait for the last of them."""
        return steps_done == self._first - 1 or (self._running and steps_done >= self._last)

    def __call__(self, steps_done: int) -> None:
        if self._running:
            self.close()
        else:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._running = True

    def close(self) -> None:
        """Ends a trace that is being written, also if the run ends before `last`."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info(
                "The profiler's trace of steps %d to %d is in %s. To open it: `pip install xprof` and "
                "`xprof --logdir=%s`, or drop its .trace.json.gz on https://ui.perfetto.dev.",
                *(self._first, self._last, self._folder, self._folder),
            )
