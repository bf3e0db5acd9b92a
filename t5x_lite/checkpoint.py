"""Checkpoints: the training state and the data position, written as one, restored onto any mesh.

A run's checkpoints lie in ``MODEL_DIR/checkpoints/<step>/``, each with four parts: ``params`` (the parameter tree),
``optimizer`` (step and optimizer state), ``data`` (the position in the data) and ``info``
(JSON: step, model config and what else explains a mismatch). Orbax writes them in the background and renames the whole
folder into place at the end, so a checkpoint is there with all its parts or not at all.

This module knows Orbax and trees of arrays. It must not know the model, the optimizer, SeqIO or TensorFlow: a state is
anything with ``step``, ``params``, ``opt_state`` and ``replace``; a data iterator anything with ``save(folder)`` and
``restore(folder)``.
"""

import dataclasses
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from orbax.checkpoint import future

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
_LISTED = 12  # lines of each kind that a mismatch prints


class _WithoutOrbaxChatter(logging.Filter):
    """Drops what Orbax says below WARNING: some forty lines a save, through absl's one logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


logging.getLogger("absl").addFilter(_WithoutOrbaxChatter())


@runtime_checkable
class DataIterator(Protocol):
    """What can be saved beside the state: writes its position as files into an empty local folder, reads it back.

    Each process writes what is its own, under names that no other process uses; when it is read, all is in one folder,
    local or not.
    """

    def save(self, path: str) -> None: ...

    def restore(self, path: str) -> None: ...


# A training state (step.TrainState), a dataclass: step is an int32 scalar, params a nested dict, opt_state any tree.
State = Any


# The data position as a part of an Orbax checkpoint.


class DataPositionHandler(ocp.handlers.AsyncCheckpointHandler):
    """Writes ``data/``, to which every process adds its files.

    The position is taken while `save` still holds up the caller, for it must belong to the same moment as the arrays;
    the files then go out in the background together with them.
    """

    async def async_save(self, directory: epath.Path, args: "DataPositionSave") -> list[future.Future]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with tempfile.TemporaryDirectory() as folder:
            args.iterator.save(folder)
            files = {p.name: p.read_bytes() for p in Path(folder).iterdir()}

        async def write() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (directory / name).write_bytes(content)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="data_position_save")]

    def save(self, directory: epath.Path, args: "DataPositionSave") -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError("The data position is only written through Orbax's asynchronous checkpointer.")

    def restore(self, directory: epath.Path, args: "DataPositionRestore") -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        args.iterator.restore(str(directory))


@ocp.args.register_with_handler(DataPositionHandler, for_save=True)
@dataclasses.dataclass
class DataPositionSave(ocp.args.CheckpointArgs):
    iterator: DataIterator


@ocp.args.register_with_handler(DataPositionHandler, for_restore=True)
@dataclasses.dataclass
class DataPositionRestore(ocp.args.CheckpointArgs):
    iterator: DataIterator


# Which checkpoints stay.


@dataclasses.dataclass(frozen=True)
class KeepLastAndBest:
    """Orbax preservation policy: the last `last` checkpoints and, beside them, the `best` by one metric.

    A checkpoint saved without the metric, or with a NaN, is never among the best. Of equals the earlier one stays.
    """

    last: int | None
    metric: str | None
    best: int
    mode: Literal["max", "min"]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        newest = len(checkpoints) - self.last if self.last is not None else 0
        keep = set(range(max(newest, 0), len(checkpoints)))
        if self.metric is not None:
            values = [(self.value(c.metrics), i) for i, c in enumerate(checkpoints)]
            ranked = sorted((v, i) for v, i in values if not math.isnan(v))
            keep.update(i for _, i in ranked[: self.best])
        return [i in keep for i in range(len(checkpoints))]

    def value(self, metrics: Mapping[str, float] | None) -> float:
        """The metric with its sign turned so that lower is better; NaN where there is none."""
        value = float((metrics or {}).get(self.metric or "", math.nan))
        return -value if self.mode == "max" else value


class Checkpointer:
    """Saves and restores the checkpoints of one run. Every process of the run makes one and calls it alike.

    Args:
      directory: MODEL_DIR, or its ``checkpoints`` folder; created where missing. What a killed save left is removed.
      keep_last: how many of the newest checkpoints to keep; None keeps all.
      keep_best_metric: "task/metric", a key of the metrics given to `save`; None: no checkpoint is kept for its score.
      keep_best: how many of the best to keep beside the newest.
      best_mode: whether "max" or "min" is best.
      info: facts for the `info` part, such as {"model": {...}}; what JSON can hold.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int | None = 1,
        keep_best_metric: str | None = None,
        keep_best: int = 1,
        best_mode: Literal["max", "min"] = "max",
        info: Mapping[str, Any] | None = None,
    ):
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"KEEP_LAST={keep_last} must be at least 1, or None to keep every checkpoint.")
        if keep_best < 1 or best_mode not in ("max", "min"):
            raise ValueError(f'keep_best={keep_best} must be at least 1 and best_mode={best_mode!r} "max" or "min".')
        self.directory = _checkpoints_folder(_absolute(directory))
        self._policy = KeepLastAndBest(keep_last, keep_best_metric, keep_best, best_mode)
        self._info = dict(info or {})
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=self._policy.value if keep_best_metric else None,  # without it Orbax stores no metrics
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
            ),
        )

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

        Waits first for a save still under way, and raises what that one raised. The state may be donated as soon as
        this returns.

        Args:
          metrics: scores of this step by "task/metric"; those of the best checkpoint decide what keep-best keeps.

        Returns:
          False where this step is already saved.

        Raises:
          ValueError: metrics are given and the one to keep the best by is not among them.
        """
        if step in self._manager.all_steps():
            return False
        metric = self._policy.metric
        if metrics is not None and metric is not None and metric not in metrics:
            raise ValueError(
                f"KEEP_BEST_METRIC={metric!r} is not among the metrics of step {step}: {', '.join(sorted(metrics))}."
            )
        parts: dict[str, Any] = {
            "params": ocp.args.StandardSave(_nested(_flat(state.params))),
            "optimizer": ocp.args.StandardSave(_nested(_flat(_optimizer_part(state)))),
            "info": ocp.args.JsonSave({**self._info, "step": step, "processes": jax.process_count()}),
        }
        if iterator is not None:
            parts["data"] = DataPositionSave(iterator)
        scores = {k: float(v) for k, v in (metrics or {}).items()}
        with jax.transfer_guard("allow"):
            return self._manager.save(step, args=ocp.args.Composite(**parts), metrics=scores, force=True)

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
            raise FileNotFoundError(f"No checkpoint of step {step} in {self.directory}: it has {self.all_steps()}.")
        if iterator is not None and not (folder / "data").exists():
            raise FileNotFoundError(
                f"{folder} holds no data position, so the run cannot go on where its data stopped. Begin a new "
                "MODEL_DIR with this checkpoint as INITIAL_CHECKPOINT_PATH."
            )
        wanted = {"params": _flat(abstract_state.params), "optimizer": _flat(_optimizer_part(abstract_state))}
        for part, leaves in wanted.items():
            _check(folder, part, leaves, self._info, same_dtype=True)
        parts: dict[str, Any] = {k: ocp.args.StandardRestore(_nested(_placed(v))) for k, v in wanted.items()}
        if iterator is not None:
            parts["data"] = DataPositionRestore(iterator)
        restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
        params = _like(abstract_state.params, restored["params"])
        optimizer = _like(_optimizer_part(abstract_state), restored["optimizer"])
        return dataclasses.replace(
            abstract_state, step=optimizer["step"], params=params, opt_state=optimizer["opt_state"]
        )

    def wait(self) -> None:
        """Returns when no save is under way; raises what the last one raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads."""
        self._manager.close()


# Parameters alone, of anybody's checkpoint, without an optimizer.


def find_checkpoint(path: str | os.PathLike[str]) -> epath.Path | None:
    """The step folder meant by `path`: itself, or the newest finished one of a MODEL_DIR or its ``checkpoints``."""
    folder = _absolute(path)
    if (folder / "params").exists():
        return folder
    for parent in (folder / FOLDER, folder):
        if parent.exists():
            steps = list(ocp.path.step.standard_name_format().find_all(parent))
            if steps:
                return parent / str(max(s.step for s in steps))
    return None


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `info` part of a checkpoint (see `Checkpointer`); {} where it has none. Raises FileNotFoundError."""
    file = _found(path) / "info" / "metadata"
    return json.loads(file.read_text()) if file.exists() else {}


def restore_params(path: str | os.PathLike[str], abstract_params: Any = None, *, info: Mapping[str, Any] | None = None):
    """The parameters of a checkpoint, without its optimizer state.

    Args:
      path: a MODEL_DIR, its ``checkpoints`` folder or one ``<step>`` folder.
      abstract_params: tree of jax.ShapeDtypeStruct with shardings to restore onto, cast to its dtypes; None gives a
        nested dict of numpy arrays as they were saved.
      info: this run's facts as given to `Checkpointer`, to explain a mismatch.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: the parameters are not those of abstract_params; all differences are listed, no array is read.
    """
    folder = _found(path)
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    if abstract_params is None:
        saved = traverse_util.unflatten_dict(_saved(folder, "params"), sep="/")
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return reader.restore(folder / "params", args=ocp.args.PyTreeRestore(restore_args=how))
    leaves = _flat(abstract_params)
    _check(folder, "params", leaves, info or {}, same_dtype=False)
    target = _nested(_placed(leaves))
    how = ocp.checkpoint_utils.construct_restore_args(target)
    restored = reader.restore(folder / "params", args=ocp.args.PyTreeRestore(item=target, restore_args=how))
    return _like(abstract_params, restored)


def save_params(path: str | os.PathLike[str], params: Any, *, info: Mapping[str, Any] | None = None) -> None:
    """Writes parameters alone, with `info`, as a checkpoint that runs can start from but not resume.

    Raises ValueError: the folder exists.
    """
    parts = {"params": ocp.args.StandardSave(_nested(_flat(params))), "info": ocp.args.JsonSave(dict(info or {}))}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(_absolute(path), args=ocp.args.Composite(**parts))


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins. `reason` is the line for the log."""

    kind: Literal["resume", "initial", "fresh"]
    path: str | None
    reason: str

    @property
    def step(self) -> int | None:
        """The step to resume at; None where the run begins at 0."""
        return int(epath.Path(self.path).name) if self.kind == "resume" and self.path else None


def choose_start(
    model_dir: str | os.PathLike[str], initial_checkpoint_path: str | os.PathLike[str] | None = None
) -> Start:
    """Which checkpoint a run starts from: the newest in `model_dir`, else `initial_checkpoint_path`, else none.

    Raises:
      FileNotFoundError: `initial_checkpoint_path` is needed and holds no checkpoint.
    """
    own = find_checkpoint(_checkpoints_folder(_absolute(model_dir)))
    if own is not None:
        reason = f"Resuming at step {own.name} from {own}: MODEL_DIR already holds this run"
        if initial_checkpoint_path:
            reason += f", so INITIAL_CHECKPOINT_PATH={str(initial_checkpoint_path)!r} is not read (it would be in a new"
            reason += " MODEL_DIR)"
        return Start("resume", str(own), reason + ".")
    nothing = f"MODEL_DIR={str(model_dir)!r} holds no finished checkpoint"
    if initial_checkpoint_path:
        found = _found(initial_checkpoint_path, "INITIAL_CHECKPOINT_PATH")
        reason = f"Starting at step 0 with the parameters of {found} and a fresh optimizer: {nothing} and"
        return Start("initial", str(found), f"{reason} INITIAL_CHECKPOINT_PATH names this one.")
    return Start("fresh", None, f"Starting at step 0 from random parameters: {nothing} and no INITIAL_CHECKPOINT_PATH.")


def _found(path: str | os.PathLike[str], name: str = "The path") -> epath.Path:
    found = find_checkpoint(path)
    if found is not None:
        return found
    folder = _absolute(path)
    if folder.exists():
        content = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ["a file"]
        there = f"It holds: {', '.join(content[:_LISTED]) or 'nothing'}" + (" ..." if len(content) > _LISTED else "")
    else:
        there = "It does not exist"
    raise FileNotFoundError(
        f"{name} {str(path)!r} ({folder}) holds no finished checkpoint. {there}. "
        f"Give a MODEL_DIR, its '{FOLDER}' folder, or one '{FOLDER}/<step>' folder with a 'params' folder in it."
    )


# Trees as flat dicts of "a/b/c", so that neither a leaf's name nor a file depends on a Python class.


def _optimizer_part(state: State) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}


def _flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Without leaves of size 0, which Orbax does not write: they hold nothing, and `_like` makes them anew."""
    return traverse_util.unflatten_dict({k: v for k, v in leaves.items() if math.prod(v.shape)}, sep="/")


def _placed(leaves: Mapping[str, Any]) -> dict[str, Any]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=getattr(v, "sharding", None) or here)
        for k, v in leaves.items()
    }


def _like(tree: Any, nested: Mapping[str, Any]) -> Any:
    """The leaves of `nested` in the structure of `tree`."""
    values = traverse_util.flatten_dict(nested, sep="/")
    leaves = [
        values[k] if k in values else jnp.zeros(v.shape, v.dtype, device=v.sharding)
        for k, v in _placed(_flat(tree)).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


# Comparing a checkpoint with what is wanted of it.


def _saved(folder: epath.Path, part: str) -> dict[str, Any]:
    if not (folder / part).exists():
        content = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise FileNotFoundError(f"{folder} has no '{part}' folder, only: {content}. It is no whole checkpoint.")
    metadata = ocp.PyTreeCheckpointHandler().metadata(folder / part)
    return traverse_util.flatten_dict(metadata.tree, sep="/")


def _check(folder: epath.Path, part: str, wanted: Mapping[str, Any], info: Mapping[str, Any], same_dtype: bool) -> None:
    """Raises ValueError with all differences between the `part` saved in `folder` and the leaves wanted."""

    def described(leaf: Any) -> str:
        return f"{list(leaf.shape)}" + (f" {np.dtype(leaf.dtype)}" if same_dtype else "")

    wanted = {k: v for k, v in wanted.items() if math.prod(v.shape)}
    saved = _saved(folder, part)
    both = wanted.keys() & saved.keys()
    groups = {
        "missing (in this run, not in the checkpoint)": [
            f"{k} {described(wanted[k])}" for k in sorted(wanted.keys() - saved.keys())
        ],
        "extra (in the checkpoint, not in this run)": [
            f"{k} {described(saved[k])}" for k in sorted(saved.keys() - wanted.keys())
        ],
        "different": [
            f"{k}: checkpoint {described(saved[k])}, this run {described(wanted[k])}"
            for k in sorted(both)
            if described(saved[k]) != described(wanted[k])
        ],
    }
    if not any(groups.values()):
        return
    what = {"params": "parameters", "optimizer": "optimizer state"}[part]
    lines = [f"The {what} in {folder} do not fit this run."]
    for title, entries in groups.items():
        if entries:
            lines += [f"  {title}: {len(entries)}"] + [f"    {e}" for e in entries[:_LISTED]]
            lines += [f"    ... and {len(entries) - _LISTED} more"] if len(entries) > _LISTED else []
    lines += _explained(folder, info)
    if part == "params":
        lines.append("Use the model config that the checkpoint was trained with, or another checkpoint.")
    else:
        lines.append(
            "Use the optimizer that the checkpoint was trained with, or begin a new MODEL_DIR with this checkpoint as "
            "INITIAL_CHECKPOINT_PATH, which starts a fresh optimizer."
        )
    raise ValueError("\n".join(lines))


def _explained(folder: epath.Path, info: Mapping[str, Any]) -> list[str]:
    """One line for every fact of the `info` part in which checkpoint and run differ."""
    flat_saved = traverse_util.flatten_dict(read_info(folder), sep=".")
    flat_here = traverse_util.flatten_dict(json.loads(json.dumps(dict(info))), sep=".")
    return [
        f"  {k}: checkpoint {flat_saved[k]!r}, this run {flat_here[k]!r}"
        for k in sorted(flat_saved.keys() & flat_here.keys())
        if flat_saved[k] != flat_here[k]
    ]


def _absolute(path: str | os.PathLike[str]) -> epath.Path:
    """Orbax wants absolute paths; gs:// and the like are left alone."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def _checkpoints_folder(path: epath.Path) -> epath.Path:
    return path if path.name == FOLDER else path / FOLDER
