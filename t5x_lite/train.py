"""The training loop: step, log, evaluate, save.

It takes a state, a compiled step and an iterator of numpy batches, and does not know where any of them comes from. The
device is not waited for: what step n-1 measured is fetched after step n has been launched.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import NamedSharding

from t5x_lite import sharding
from t5x_lite.step import TrainState

log = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]  # task -> metric -> value


@runtime_checkable
class Logger(Protocol):
    def train(self, step: int, metrics: Mapping[str, float], seconds: float) -> None: ...

    def evaluation(self, step: int, scores: Scores) -> None: ...


@runtime_checkable
class Saver(Protocol):
    def save(self, step: int, state: Any, iterator: Any, metrics: Any) -> object: ...


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
) -> TrainState:
    """Runs from `state.step` to `schedule.last_step`, or until the data ends.

    Args:
      train_step: from `step.Compiler.train_step`; the state given to it is gone afterwards.
      batches: this host's rows. Its position is saved with the state: a batch counts as used once its step is done.
      key: of the run, on the mesh.
      rows: how the rows of a batch lie on the mesh.
      evaluate: scores a state; what it returns goes to the log, and to the saver as "task/metric".

    Raises:
      FloatingPointError: the loss is not finite; says at which step.
    """
    step = int(state.step)
    launched: tuple[int, Mapping[str, jax.Array]] | None = None
    clock: float | None = None  # when the step before the launched one was done; None: the next one is not timed
    times: list[float] = []  # of the steps since the last log record

    def report() -> None:
        """Waits for the launched step, and logs it if it is due."""
        nonlocal launched, clock
        if launched is None:
            return
        number, metrics = launched[0], {name: float(x) for name, x in jax.device_get(launched[1]).items()}
        launched, done = None, time.perf_counter()
        if clock is not None:
            times.append(done - clock)
        clock = done
        if schedule.due(schedule.log, number):
            logger.train(number, metrics, sum(times) / len(times) if times else 0.0)
            times.clear()
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the loss of step {number} is {metrics['loss']}; earlier checkpoints are untouched"
            )

    while step < schedule.last_step:
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
            launched = step, metrics
        scores: Scores = {}
        if evaluate is not None and schedule.due(schedule.evaluate, step):
            report()
            scores = evaluate(state)
            logger.evaluation(step, scores)
        if saver is not None and schedule.due(schedule.save, step):
            report()
            saver.save(
                step, state, batches, {f"{task}/{name}": x for task, of in scores.items() for name, x in of.items()}
            )
        if launched is None:
            clock = time.perf_counter()  # what evaluating and saving took is not the steps'
    report()
    return state
