"""The training loop: step, log, evaluate, save.

It takes a state, a compiled step and an iterator of numpy batches. It does not wait for the device: the metrics of step
n-1 are fetched after step n has been launched.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import NamedSharding

from t5x_lite import sharding
from t5x_lite.errors import NotFiniteError
from t5x_lite.training import monitors
from t5x_lite.training.step import TrainState

log = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]  # task -> metric -> value


def flat(scores: Scores) -> dict[str, float]:
    """Return the scores by "task/metric"."""
    return {f"{task}/{name}": value for task, values in scores.items() for name, value in values.items()}


@runtime_checkable
class Logger(Protocol):
    def train(self, step: int, metrics: Mapping[str, float], seconds: float) -> None: ...

    def evaluation(self, step: int, scores: Scores) -> None: ...


@runtime_checkable
class Saver(Protocol):
    def save(self, step: int, state: Any, iterator: Any, metrics: Any) -> object: ...

    def latest_step(self) -> int | None: ...


@runtime_checkable
class Profiler(Protocol):
    def due(self, steps_done: int) -> bool: ...

    def __call__(self, steps_done: int) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When the loop stops, logs, evaluates and saves, in steps. A period of 0 means only after the last step."""

    last_step: int
    log: int = 1
    evaluate: int = 0
    save: int = 0

    def due(self, period: int, step: int) -> bool:
        return step == self.last_step or (period > 0 and step % period == 0)


def train(
    state: TrainState,
    train_step: Callable,
    batches: Iterator[Mapping[str, np.ndarray]],
    key: jax.Array,
    *,
    rows: NamedSharding,
    schedule: Schedule,
    logger: Logger,
    saver: Saver | None = None,
    evaluate: Callable[[TrainState], Scores] | None = None,
    stop: Callable[[int], bool] = lambda step: False,
    max_skipped_steps: int = 0,
    dump: Callable[[int, Mapping[str, np.ndarray]], str] | None = None,
    profiler: Profiler | None = None,
) -> TrainState:
    """Runs from `state.step` to `schedule.last_step`, or until the data ends.

    Args:
      train_step: from `step.Compiler.train_step`; it donates its state.
      batches: this host's rows. Their position is saved with the state: a batch counts as used once its step is done.
      key: the run's dropout key, on the mesh.
      rows: the sharding of a batch's rows.
      evaluate: returns the scores of a state, which are logged, and passed to the saver as "task/metric".
      stop: called after each step; if it returns True, the loop saves and raises monitors.Preempted. An evaluation that
        is due then is left to the resumed run (the saver gets None for metrics).
      max_skipped_steps: how many steps in a row may be skipped because they were not finite.
      dump: stores the batch of a step; returns a sentence that says where.
      profiler: called after the steps at which it is due, once these are done on the device.

    Raises:
      FloatingPointError: one more step than that was not finite.
      monitors.Preempted: `stop` returned True.
    """
    step = int(state.step)
    launched: tuple[int, Mapping[str, jax.Array], Mapping[str, np.ndarray]] | None = None
    clock: float | None = None  # when the step before the launched one ended; None: the next step is not timed
    times: list[float] = []  # of the steps since the last log record
    skipped = 0  # in a row
    spikes = monitors.LossSpikeDetector()

    def report() -> None:
        """Waits for the launched step, and logs its metrics if they are due."""
        nonlocal launched, clock, skipped
        if launched is None:
            return
        number, metrics = launched[0], {name: float(x) for name, x in jax.device_get(launched[1]).items()}
        batch, launched, done = launched[2], None, time.perf_counter()
        progress.step(number)
        if clock is not None:
            times.append(done - clock)
        clock = done
        if schedule.due(schedule.log, number):
            logger.train(number, metrics, sum(times) / len(times) if times else 0.0)
            times.clear()
        if not metrics.get("skipped"):
            skipped = 0
            spikes(number, metrics["loss"])
            return
        skipped += 1
        values = ", ".join(f"{name} {metrics[name]}" for name in ("loss", "grad_norm", "param_norm"))
        if skipped > max_skipped_steps:
            where = f" {dump(number, batch)}" if dump is not None else ""
            raise NotFiniteError(
                f"step {number} is not finite ({values}), nor were the {max_skipped_steps} steps before it that "
                f"MAX_SKIPPED_STEPS allows; none of them changed the parameters. The newest checkpoint is step "
                f"{saver and saver.latest_step()}.{where}"
            )
        log.warning("Step %d is skipped because it is not finite: %s.", number, values)

    # A trace is also written if the loop ends with an exception.
    tracing = contextlib.nullcontext() if profiler is None else contextlib.closing(profiler)
    with tracing, monitors.HangDetector().watched() as progress:
        while step < schedule.last_step:
            if profiler is not None and profiler.due(step):
                report()
                profiler(step)
            batch = next(batches, None)
            if batch is None:
                log.warning("The data ended after step %d of %d.", step, schedule.last_step)
                schedule = dataclasses.replace(schedule, last_step=step)
            else:
                on_mesh = sharding.shard_batch(batch, rows)
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, on_mesh, key)
                report()
                step += 1
                launched = step, metrics, batch
            scores: Scores = {}
            preempted = stop(step)
            if evaluate is not None and schedule.due(schedule.evaluate, step) and not preempted:
                report()
                try:
                    scores = evaluate(state)
                except Exception:  # a task's metric, for example: the state is saved, so that nothing is lost
                    if saver is not None:
                        saver.save(step, state, batches, None)
                    raise
                progress.step(step)
                logger.evaluation(step, scores)
            if saver is not None and (preempted or schedule.due(schedule.save, step)):
                report()
                saver.save(step, state, batches, None if preempted else flat(scores))
                progress.step(step)
            if preempted:
                report()
                log.warning("Preempted: step %d is saved. The same command resumes from it.", step)
                raise monitors.Preempted()
            if launched is None:
                clock = time.perf_counter()  # evaluating and saving do not count as time of steps
        report()
    return state
