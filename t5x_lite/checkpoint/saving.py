"""Save the training state and the data position as one checkpoint; restore them onto any mesh.

A run's checkpoints are in ``MODEL_DIR/checkpoints/<step>/``. Each has four parts: ``params`` (the parameter tree; if
only some parameters train, those alone, and ``info`` names the base checkpoint that holds the others), ``optimizer``
(step and optimizer state), ``data`` (the position in the data) and ``info`` (JSON: step, model config and other facts
that explain a mismatch). ``checksums.json`` covers all parts. Orbax writes them in the background and renames the whole
folder into place at the end, so a checkpoint is complete or absent. The checkpoints it replaces are deleted afterwards.

This package and convert/tensors.py use Orbax's v0 API. Orbax 1.0 will replace it by the v1 API, so requirements.txt
excludes 1.0. v1 reads these checkpoints. A migration replaces `CheckpointManager` by `training.Checkpointer`,
`args.Composite` by `save_checkpointables`, the handler in data_state.py by a `CheckpointableHandler`, and
`PyTreeRestore` by `load` with an abstract tree, whole or partial. v1 has no `barrier_sync_fn` (as of 0.12.8), which
commit_barrier.py needs so that a host whose save failed does not block the others.

This module uses Orbax and trees of arrays. It must not depend on the model, the optimizer, SeqIO or TensorFlow: a state
is any object with ``step``, ``params``, ``opt_state`` and ``replace``; a data iterator is any object with
``save(folder)`` and ``restore(folder)``.
"""

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from t5x_lite import checkpoint, storage
from t5x_lite.checkpoint import checksums
from t5x_lite.checkpoint.commit_barrier import CommitBarrier, on_all_hosts
from t5x_lite.checkpoint.data_state import DataIterator, DataPositionRestore, DataPositionSave
from t5x_lite.checkpoint.retention import KeepLastAndBest
from t5x_lite.errors import MissingFileError, UserError, UserFileError
from t5x_lite.model import quantization

log = logging.getLogger(__name__)

FAILED_SAVES = 3  # number of consecutive failed saves that ends a run
_PATIENCE_SECONDS = 10  # to wait for the writers of a failed save; the next save removes what they write later
EVALUATED = "evaluated"  # key in `info`: false if the checkpoint was saved before its evaluation
SCORES_FILE = "scores.json"  # in a checkpoint that was saved before its evaluation, once it has been evaluated
DAMAGED = "damaged"  # folder in MODEL_DIR that damaged checkpoints are moved to


class _WithoutOrbaxChatter(logging.Filter):
    """Drops Orbax's records below WARNING (about forty lines a save, through absl's one logger) and its tracebacks of a
    failed save, which `Checkpointer` reports in one line; asyncio adds one for each array not awaited."""

    def filter(self, record: logging.LogRecord) -> bool:
        frames = traceback.walk_tb(record.exc_info[2]) if record.exc_info else ()
        files = [record.pathname, *(frame.f_code.co_filename for frame, _ in frames)]
        ours = not any(f"{os.sep}orbax{os.sep}" in file for file in files)
        return ours or (record.levelno >= logging.WARNING and record.exc_info is None)


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_WithoutOrbaxChatter())


# A dataclass such as step.TrainState: step is an int32 scalar, params a nested dict, opt_state any tree.
State = Any


class Checkpointer:
    """Saves and restores the checkpoints of one run. Every process creates one and makes the same calls.

    Args:
      directory: MODEL_DIR, or its ``checkpoints`` folder; created if missing. Remains of a killed save are removed.
      damaged: steps whose checkpoints are moved to MODEL_DIR/damaged, so that the steps can be saved again.
      keep_last: how many of the newest checkpoints to keep; None keeps all.
      keep_best_metric: "task/metric", a key of the metrics given to `save`, or several. None keeps no checkpoint for
        its score.
      keep_best: how many of the best checkpoints by each metric to keep in addition to the newest.
      best_mode: whether "max" or "min" is best.
      info: JSON-serialisable facts for the `info` part, such as {"model": {...}}. {"base": checkpoint.base_of(...)}
        names the checkpoint with the parameters that are not saved.
      trained: names of the parameters to save if the others are in a base; None saves all.
      before_commit: called in the background, by the first process, just before a checkpoint is committed. If it
        raises, the save fails.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int | None = 1,
        keep_best_metric: str | Sequence[str] | None = None,
        keep_best: int = 1,
        best_mode: Literal["max", "min"] = "max",
        info: Mapping[str, Any] | None = None,
        trained: Collection[str] | None = None,
        damaged: Collection[int] = (),
        before_commit: Callable[[], None] = lambda: None,
    ):
        if keep_last is not None and keep_last < 1:
            raise UserError(f"KEEP_LAST={keep_last} must be at least 1, or None to keep every checkpoint.")
        if keep_best < 1 or best_mode not in ("max", "min"):
            raise UserError(f'keep_best={keep_best} must be at least 1 and best_mode={best_mode!r} "max" or "min".')
        self.directory = checkpoint.checkpoints_folder(directory)
        best_metrics = (keep_best_metric,) if isinstance(keep_best_metric, str) else tuple(keep_best_metric or ())
        self._policy = KeepLastAndBest(keep_last, best_metrics, keep_best, best_mode)
        self._info, self._trained, self._before = dict(info or {}), trained, before_commit
        self._commit_barrier = CommitBarrier() if jax.process_count() > 1 else None
        self._saving: int | None = None  # the step being saved
        self._failure: OSError | None = None  # of the last save
        self._failures = 0  # consecutive
        self._has_leftovers = False  # of a failed save
        self._is_stale = False  # whether the manager does not know which steps are saved
        self._move_damaged(damaged)
        for file in self.directory.glob(f"*/{SCORES_FILE}"):
            self._policy.later_scores[int(file.parent.name)] = json.loads(file.read_text())
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                # Without best_fn Orbax stores no metrics; the policy does not use its value.
                best_fn=(lambda scores: self._policy.value(scores, best_metrics[0])) if best_metrics else None,
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._before_commit, barrier_sync_fn=self._commit_barrier
                ),
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close. If another exception is being raised, a failed save is only logged."""
        try:
            self.close()
        except OSError:
            if kind is None:
                raise

    def latest_step(self) -> int | None:
        """Return the newest step that is saved or being saved."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Return the saved steps, including the one being saved, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: State,
        iterator: DataIterator | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Copy state and data position synchronously, and write them in the background.

        Waits first for a save in progress. The state may be donated as soon as this returns. A failed save is logged
        and leaves the earlier checkpoints as they were.

        Args:
          metrics: scores of this step by "task/metric", used by keep-best. None means that the step is not evaluated
            yet, which `info` records.

        Returns:
          False if this step is already saved or the save failed.

        Raises:
          OSError: this is the `FAILED_SAVES`-th consecutive save that failed.
        """
        missing = [metric for metric in self._policy.metrics if metrics is not None and metric not in metrics]
        if missing:  # the state is worth more than its score
            names = ", ".join(sorted(metrics or ())) or "no metrics"
            log.warning("KEEP_BEST_METRIC: step %d has no %s, only %s.", step, ", ".join(missing), names)
        self._wait_for_save()
        if step in self._manager.all_steps():
            return False
        facts = {"step": step, "processes": jax.process_count(), EVALUATED: metrics is not None}
        info = {**self._info, **facts, checkpoint.CHECKSUMS: True}
        params = checkpoint.flat(state.params)
        if self._trained is not None:
            params = {name: leaf for name, leaf in params.items() if name in self._trained}
        parts: dict[str, Any] = {
            "params": ocp.args.StandardSave(checkpoint.nested(params)),
            "optimizer": ocp.args.StandardSave(checkpoint.nested(checkpoint.flat(_optimizer_part(state)))),
            "info": ocp.args.JsonSave(info),
        }
        scores = {k: float(v) for k, v in (metrics or {}).items()}
        self._saving = step
        try:
            if iterator is not None and (position := self._data_position(step, iterator)) is not None:
                parts["data"] = position
            if self._commit_barrier is not None:
                self._commit_barrier.begin()
            with jax.transfer_guard("allow"):
                return self._manager.save(step, args=ocp.args.Composite(**parts), metrics=scores, force=True)
        except Exception as error:  # an I/O error, or one of Orbax's or TensorStore's own classes
            self._record_failure(error)
            return False

    def add_scores(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the scores of a step that was saved before its evaluation, for keep-best."""
        self._policy.later_scores[step] = metrics = {name: float(value) for name, value in metrics.items()}
        if jax.process_index() == 0 and self._policy.metrics:
            with contextlib.suppress(Exception):  # it then never counts as best
                temporary = self.directory / str(step) / f"{SCORES_FILE}.tmp"
                temporary.write_text(json.dumps(metrics))
                temporary.replace(self.directory / str(step) / SCORES_FILE)

    def _data_position(self, step: int, iterator: DataIterator) -> DataPositionSave | None:
        """Return the position in the data. If a host cannot write it, the state is still worth saving, so that is only
        logged."""
        try:
            return on_all_hosts(lambda: DataPositionSave.of(iterator))
        except Exception as error:  # each part of a user's data has errors of its own
            reason = f"{type(error).__name__}: {str(error).strip()}"
            log.warning(
                "Step %d is saved without its position in the data (%s): a run that resumes from it begins the data "
                "anew.",
                step,
                reason,
            )
            return None

    def restore(self, step: int, abstract_state: State, iterator: DataIterator | None = None) -> State:
        """Return the state of `step`, bit for bit, and move the iterator to its saved position.

        Args:
          abstract_state: the state's structure with jax.ShapeDtypeStruct leaves that carry their sharding; the mesh
            may differ from the one it was saved on.

        Raises:
          FileNotFoundError: the step is not saved.
          ValueError: parameters or optimizer state differ. All differences are listed, and no array is read.
        """
        self.wait()
        folder = self.directory / str(step)
        if step not in self._manager.all_steps():
            raise MissingFileError(f"No checkpoint of step {step} in {self.directory}: it has {self.all_steps()}.")
        wanted = {
            "params": quantization.plain(checkpoint.flat(abstract_state.params)),
            "optimizer": checkpoint.flat(_optimizer_part(abstract_state)),
        }
        for part, leaves in wanted.items():
            checkpoint.check(folder, part, leaves, self._info, same_dtype=True)
        has_base = "base" in checkpoint.read_info(folder)
        parts: dict[str, Any] = {
            k: ocp.args.StandardRestore(checkpoint.nested(checkpoint.placed(v)))
            for k, v in wanted.items()
            if k != "params" or not has_base
        }
        if iterator is not None and (folder / "data").exists():
            parts["data"] = DataPositionRestore(iterator)
        elif iterator is not None:
            iterator.restore(str(folder / "data"))  # it decides what to do without a position
        restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
        if has_base:
            params = checkpoint.restore_params(folder, abstract_state.params)
        else:
            params = checkpoint.like(abstract_state.params, restored["params"])
        optimizer = checkpoint.like(_optimizer_part(abstract_state), restored["optimizer"])
        return dataclasses.replace(
            abstract_state, step=optimizer["step"], params=params, opt_state=optimizer["opt_state"]
        )

    def wait(self) -> None:
        """Wait until no save is in progress. Raises OSError if the last save failed."""
        self._wait_for_save()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait, then end the background threads. Raises OSError if the last save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _wait_for_save(self) -> None:
        """Wait for the save in progress, and record its success or failure."""
        try:
            with storage.waiting_for(self.directory):
                self._manager.wait_until_finished()
        except Exception as error:
            _wait_for_writers()
            self._record_failure(error)
        else:
            if self._saving is not None:
                self._failure, self._failures = None, 0
        self._saving = None
        if self._is_stale:
            self._reload()
        if self._has_leftovers:
            self._has_leftovers = self._remove_leftovers()

    def _record_failure(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._is_stale = True
        self._reload()
        if not self._is_stale and step in self._manager.all_steps():
            self._failure, self._failures = None, 0
            log.warning("Step %s is saved, but an old checkpoint could not be deleted (%s).", step, reason)
            return
        self._failures, self._has_leftovers = self._failures + 1, True
        newest = f"is of step {self.latest_step()}" if not self._is_stale else "cannot be looked up either"
        self._failure = UserFileError(
            f"Step {step} could not be saved ({reason}). The newest checkpoint in {self.directory} {newest}: make the "
            "folder writable and start the same command again; it resumes from there."
        )
        if self._failures >= FAILED_SAVES:
            raise UserFileError(f"{self._failures} saves in a row have failed. {self._failure}") from error
        log.warning("Step %s could not be saved; training continues (%s).", step, reason)

    def _reload(self) -> None:
        """Read which steps are saved, if that can be done: the manager counts a failed save, and has already dropped
        the checkpoints that it would have replaced."""
        with contextlib.suppress(Exception), storage.waiting_for(self.directory):  # a bucket that cannot be reached
            self._manager.reload()
            self._is_stale = False

    def _remove_leftovers(self) -> bool:
        """Delete incomplete checkpoints. Returns True if it must run again, because TensorStore or another host may
        still have been writing."""
        if jax.process_index() != 0:
            return False
        with contextlib.suppress(Exception):  # an I/O error, or one of a bucket's library
            leftovers = list(ocp.path.step.all_temporary_paths(self.directory))
            for path in leftovers:
                path.get().rmtree()
            return bool(leftovers)
        return True

    def _before_commit(self) -> None:
        """Write the checksums. The first process calls this in the background, after all processes have written."""
        self._before()
        for path in ocp.path.step.all_temporary_paths(self.directory):
            if path.get_final().name == str(self._saving):
                checksums.write(path.get())

    def _move_damaged(self, damaged: Collection[int]) -> None:
        if jax.process_index() == 0:
            for step in damaged:
                folder = self.directory.parent / DAMAGED
                folder.mkdir(parents=True, exist_ok=True)
                count = sum(path.name.split("-")[0] == str(step) for path in folder.iterdir())
                target = folder / (f"{step}-{count + 1}" if count else str(step))
                (self.directory / str(step)).rename(target)
                log.warning("Moved the damaged checkpoint of step %d to %s.", step, target)
        if damaged and jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints moved")


def _wait_for_writers() -> None:
    """Wait for Orbax's threads, which still write the other parts when the first part has failed."""
    until = time.monotonic() + _PATIENCE_SECONDS
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, max(until - time.monotonic(), 0))  # Orbax's own join re-raises


# Parameters only.


def save_params(path: str | os.PathLike[str], params: Any, *, info: Mapping[str, Any] | None = None) -> None:
    """Write only parameters and `info`, as a checkpoint that runs can start from but not resume.

    Raises ValueError if the folder exists.
    """
    tree = checkpoint.nested(checkpoint.flat(params))
    parts = {"params": ocp.args.StandardSave(tree), "info": ocp.args.JsonSave(dict(info or {}))}
    folder = checkpoint.absolute(path)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(folder, args=ocp.args.Composite(**parts))
    if jax.process_index() == 0:
        checksums.write(folder)


def _optimizer_part(state: State) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}
