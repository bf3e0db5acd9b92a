"""Saving checkpoints: the training state and the data position, written as one, restored onto any mesh.

A run's checkpoints lie in ``MODEL_DIR/checkpoints/<step>/``, each with four parts: ``params`` (the parameter tree;
where a run trains a part of one that it began with, that part, and ``info`` says where the rest is), ``optimizer``
(step and optimizer state), ``data`` (the position in the data) and ``info`` (JSON: step, model config and what else
explains a mismatch), and ``checksums.json`` over all of them. Orbax writes them in the background and renames the
whole folder into place at the end, so a checkpoint is there with all its parts or not at all. What a save replaces is
deleted only after that.

Orbax's v0 API is used, in this package and in convert/tensors.py. Orbax 1.0 will put its v1 API in its place, which
requirements.txt therefore excludes. v1 reads these checkpoints. What will change here: `training.Checkpointer` for
`CheckpointManager` and `save_checkpointables` for `args.Composite`; a `CheckpointableHandler` for the handler in
data_state.py; `load` with an abstract tree, and its partial form, for `PyTreeRestore`. It has no `barrier_sync_fn` (as
of 0.12.8), which commit_barrier.py needs so that a host whose save failed does not hold up the others.

This module knows Orbax and trees of arrays. It must not know the model, the optimizer, SeqIO or TensorFlow: a state is
anything with ``step``, ``params``, ``opt_state`` and ``replace``; a data iterator anything with ``save(folder)`` and
``restore(folder)``.
"""

import contextlib
import dataclasses
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

from t5x_lite import checkpoint
from t5x_lite.checkpoint import checksums
from t5x_lite.checkpoint.commit_barrier import Agreement, on_all_hosts
from t5x_lite.checkpoint.data_state import DataIterator, DataPositionRestore, DataPositionSave
from t5x_lite.checkpoint.retention import KeepLastAndBest
from t5x_lite.errors import MissingFileError, UserError, UserFileError

log = logging.getLogger(__name__)

FAILED_SAVES = 3  # in a row, that end a run
_PATIENCE_SECONDS = 10  # for all writers of a failed save: what one of them leaves later, the next save removes
EVALUATED = "evaluated"  # false in the `info` of a checkpoint that was saved before its scores were known
DAMAGED = "damaged"  # in MODEL_DIR: where damaged checkpoints are put out of the way of new ones


class _WithoutOrbaxChatter(logging.Filter):
    """Drops what Orbax says below WARNING, some forty lines a save through absl's one logger, and its tracebacks of a
    failed save, of which `Checkpointer` says in one line; asyncio adds one for each array that it left alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        raised = traceback.walk_tb(record.exc_info[2]) if record.exc_info else ()
        files = [record.pathname, *(frame.f_code.co_filename for frame, _ in raised)]
        ours = not any(f"{os.sep}orbax{os.sep}" in file for file in files)
        return ours or (record.levelno >= logging.WARNING and record.exc_info is None)


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_WithoutOrbaxChatter())


# A training state (step.TrainState), a dataclass: step is an int32 scalar, params a nested dict, opt_state any tree.
State = Any


class Checkpointer:
    """Saves and restores the checkpoints of one run. Every process of the run makes one and calls it alike.

    Args:
      directory: MODEL_DIR, or its ``checkpoints`` folder; created where missing. What a killed save left is removed.
      damaged: steps whose checkpoints go to MODEL_DIR/damaged, so that they can be saved anew.
      keep_last: how many of the newest checkpoints to keep; None keeps all.
      keep_best_metric: "task/metric", a key of the metrics given to `save`, or several; None: no checkpoint is kept for
        its score.
      keep_best: how many of the best by each to keep beside the newest.
      best_mode: whether "max" or "min" is best.
      info: facts for the `info` part, such as {"model": {...}}; what JSON can hold. {"base": checkpoint.base_of(...)}:
        where the parameters are that are not saved.
      trained: names of the parameters that are saved, where the others are in a base; None: all.
      before_commit: called in the background, by the first process, when a checkpoint is about to count. Where it
        raises, the save has failed.
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
        kept_by = (keep_best_metric,) if isinstance(keep_best_metric, str) else tuple(keep_best_metric or ())
        self._policy = KeepLastAndBest(keep_last, kept_by, keep_best, best_mode)
        self._info, self._trained, self._before = dict(info or {}), trained, before_commit
        self._agreement = Agreement() if jax.process_count() > 1 else None
        self._saving: int | None = None  # the step being saved
        self._failure: OSError | None = None  # of the last save
        self._failures = 0  # in a row
        self._left_behind = False  # by a failed save
        self._put_aside(damaged)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                # Without it Orbax stores no metrics; what it says, the policy above does not ask.
                best_fn=(lambda scores: self._policy.value(scores, kept_by[0])) if kept_by else None,
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._before_commit, barrier_sync_fn=self._agreement
                ),
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes. Where something else has been raised already, a failed save is only logged."""
        try:
            self.close()
        except OSError:
            if kind is None:
                raise

    def latest_step(self) -> int | None:
        """The newest step saved or being saved."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """The steps kept, in rising order, with the one being saved."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: State,
        iterator: DataIterator | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Copies state and data position now and writes them in the background.

        Waits first for a save still under way. The state may be donated as soon as this returns. A save that fails is
        logged, and leaves nothing but the checkpoints there were.

        Args:
          metrics: scores of this step by "task/metric"; those of the best checkpoint decide what keep-best keeps. None:
            not known yet, which `info` notes.

        Returns:
          False where this step is already saved, or could not be.

        Raises:
          ValueError: metrics are given and one to keep the best by is not among them.
          OSError: this is the `FAILED_SAVES`-th save in a row that failed.
        """
        for metric in self._policy.metrics:
            if metrics is not None and metric not in metrics:
                known = ", ".join(sorted(metrics))
                raise UserError(f"KEEP_BEST_METRIC={metric!r} is not among the metrics of step {step}: {known}.")
        self._settle()
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
            if iterator is not None:
                parts["data"] = on_all_hosts(lambda: DataPositionSave.of(iterator))
            if self._agreement is not None:
                self._agreement.begin()
            with jax.transfer_guard("allow"):
                return self._manager.save(step, args=ocp.args.Composite(**parts), metrics=scores, force=True)
        except Exception as error:  # of the disk, of Orbax or of TensorStore, which has classes of its own
            self._failed(error)
            return False

    def restore(self, step: int, abstract_state: State, iterator: DataIterator | None = None) -> State:
        """The state of `step`, bit for bit, and the iterator put where it was.

        Args:
          abstract_state: the state's structure with jax.ShapeDtypeStruct leaves that carry their sharding; the mesh
            may differ from the one it was saved on.

        Raises:
          FileNotFoundError: no such step, or an iterator is given and no data position was saved.
          ValueError: parameters or optimizer state differ (all differences are listed; no array is read then).
        """
        self.wait()
        folder = self.directory / str(step)
        if step not in self._manager.all_steps():
            raise MissingFileError(f"No checkpoint of step {step} in {self.directory}: it has {self.all_steps()}.")
        if iterator is not None and not (folder / "data").exists():
            raise MissingFileError(
                f"{folder} holds no data position, so the run cannot go on where its data stopped. Begin a new "
                "MODEL_DIR with this checkpoint as INITIAL_CHECKPOINT_PATH."
            )
        wanted = {
            "params": checkpoint.flat(abstract_state.params),
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
        if iterator is not None:
            parts["data"] = DataPositionRestore(iterator)
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
        """Returns when no save is under way. Raises OSError: the last one failed."""
        self._settle()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Waits, then ends the background threads. Raises OSError: the last save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _settle(self) -> None:
        """Waits for the save under way, and counts it if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            _wait_for_writers()
            self._failed(error)
        else:
            if self._saving is not None:
                self._failure, self._failures = None, 0
        self._saving = None
        if self._left_behind:
            self._left_behind = self._remove_left_behind()

    def _failed(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        self._manager.reload()  # it has already forgotten what this save would have replaced
        why = f"{type(error).__name__}: {str(error).strip()}"
        if step in self._manager.all_steps():
            self._failure, self._failures = None, 0
            log.warning("Step %s is saved, but something remains that should have been deleted (%s).", step, why)
            return
        self._failures, self._left_behind = self._failures + 1, True
        self._failure = UserFileError(
            f"Step {step} could not be saved ({why}). The newest checkpoint in {self.directory} is of step "
            f"{self.latest_step()}: once it can be written to, start the same command again, and it goes on from there."
        )
        if self._failures >= FAILED_SAVES:
            raise UserFileError(f"{self._failures} saves in a row have failed. {self._failure}") from error
        log.warning("Step %s could not be saved, and training goes on (%s).", step, why)

    def _remove_left_behind(self) -> bool:
        """Makes room, for half a checkpoint helps nobody. True: to be done again, for TensorStore or another host may
        have gone on writing."""
        if jax.process_index() != 0:
            return False
        with contextlib.suppress(OSError):
            left = list(ocp.path.step.all_temporary_paths(self.directory))
            for path in left:
                path.get().rmtree()
            return bool(left)
        return True

    def _before_commit(self) -> None:
        """Called in the background by the first process, when all parts have been written by all."""
        self._before()
        for path in ocp.path.step.all_temporary_paths(self.directory):
            if path.get_final().name == str(self._saving):
                checksums.write(path.get())

    def _put_aside(self, damaged: Collection[int]) -> None:
        if jax.process_index() == 0:
            for step in damaged:
                folder = self.directory.parent / DAMAGED
                folder.mkdir(parents=True, exist_ok=True)
                taken = sum(path.name.split("-")[0] == str(step) for path in folder.iterdir())
                aside = folder / (f"{step}-{taken + 1}" if taken else str(step))
                (self.directory / str(step)).rename(aside)
                log.warning("The damaged checkpoint of step %d is in %s now.", step, aside)
        if damaged and jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints put aside")


def _wait_for_writers() -> None:
    """Orbax says that a save has failed when the first of its parts has, while it still writes the others."""
    until = time.monotonic() + _PATIENCE_SECONDS
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, max(until - time.monotonic(), 0))  # its own raises what was raised in it


# Parameters alone.


def save_params(path: str | os.PathLike[str], params: Any, *, info: Mapping[str, Any] | None = None) -> None:
    """Writes parameters alone, with `info`, as a checkpoint that runs can start from but not resume.

    Raises ValueError: the folder exists.
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
