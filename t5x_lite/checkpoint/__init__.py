"""Checkpoints: which one to read, whether it is sound, whether it fits, and its parameters alone.

`saving.py` says what they are made of. This module knows Orbax and trees of arrays, and must not know the model, the
optimizer, SeqIO or TensorFlow.
"""

import dataclasses
import importlib
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from t5x_lite.checkpoint import checksums
from t5x_lite.errors import MissingFileError, UserError

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
CHECKSUMS = "checksums"  # true in the `info` part of a checkpoint that was written with them
_LISTED = 12  # lines of each kind that a mismatch prints

# Parameters alone, of anybody's checkpoint, without an optimizer.


def find_checkpoint(path: str | os.PathLike[str]) -> epath.Path | None:
    """The step folder meant by `path`: itself, or the newest finished one of a MODEL_DIR or its ``checkpoints``."""
    folder = absolute(path)
    if (folder / "params").exists():
        return folder
    for parent in (folder / FOLDER, folder):
        if steps := _steps(parent):
            return parent / str(steps[-1])
    return None


def _steps(folder: epath.Path) -> list[int]:
    """The finished checkpoints in `folder`, in rising order."""
    if str(folder).startswith("gs://"):
        try:
            importlib.import_module("google.cloud.storage")
        except ImportError:
            cure = "Orbax lists buckets by a package that is not installed: pip install google-cloud-storage"
            raise UserError(f"{folder}: {cure}") from None
    return sorted(s.step for s in ocp.path.step.standard_name_format().find_all(folder)) if folder.exists() else []


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `info` part of a checkpoint (see `saving.Checkpointer`); {} where it has none.

    Raises FileNotFoundError: no checkpoint there. ValueError: the part is damaged.
    """
    file = _found(path) / "info" / "metadata"
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}. Give an earlier checkpoint.") from None


def restore_params(
    path: str | os.PathLike[str],
    abstract_params: Any = None,
    *,
    info: Mapping[str, Any] | None = None,
    fresh: Mapping[str, Any] | None = None,
    left_out: str | None = None,
    verified: bool = False,
):
    """The parameters of a checkpoint, without its optimizer state. What it leaves to its base comes from there.

    Args:
      path: a MODEL_DIR, its ``checkpoints`` folder or one ``<step>`` folder.
      abstract_params: tree of jax.ShapeDtypeStruct with shardings to restore onto, cast to its dtypes; None gives a
        nested dict of numpy arrays as they were saved.
      info: this run's facts as given to `Checkpointer`, to explain a mismatch.
      fresh: "a/b/c" -> value of parameters that the checkpoint may be without, or, where `left_out` is found in their
        name, have in another shape.
      left_out: a regular expression; parameters in whose name it is found are not asked for: the checkpoint may have
        them beyond those of abstract_params.
      verified: its files have been compared with their checksums already, as `choose_start` does in a MODEL_DIR.

    Raises:
      FileNotFoundError: no checkpoint there, or not its base.
      ValueError: the files are damaged, the base is another than it was, or the parameters are not those of
        abstract_params; all differences are listed, no array is read.
    """
    folder = _found(path)
    if not verified:
        _refuse_damaged(folder)
    saved = _saved(folder, "params")
    if left_out is not None and abstract_params is not None:
        wanted = {name: leaf.shape for name, leaf in flat(abstract_params).items()}
        spare = [k for k, (_, leaf) in saved.items() if re.search(left_out, k) and wanted.get(k) != tuple(leaf.shape)]
        saved = {name: of for name, of in saved.items() if name not in spare}
        if spare:
            log.info("%d parameters of %s are left out: %s", len(spare), folder, ", ".join(sorted(spare)))
    origins = {name: origin for name, (origin, _) in saved.items()}
    for origin in dict.fromkeys(o for o in origins.values() if o != folder):
        _refuse_damaged(origin)
    if abstract_params is None:
        leaves = {k: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for k, (_, leaf) in saved.items()}
        return traverse_util.unflatten_dict(_read(leaves, origins, np.ndarray), sep="/")
    leaves = flat(abstract_params)
    new = {k: v for k, v in (fresh or {}).items() if k not in saved}
    here = {k: v for k, v in leaves.items() if k not in new}
    check(folder, "params", here, info or {}, same_dtype=False, saved={k: leaf for k, (_, leaf) in saved.items()})
    if new:
        log.info("%d parameters that %s is without begin as initialised: %s", len(new), folder, ", ".join(sorted(new)))
    return like(abstract_params, traverse_util.unflatten_dict(_read(leaves, origins) | new, sep="/"))


def _refuse_damaged(folder: epath.Path) -> None:
    if wrong := damage(folder, ("params",)):
        raise UserError(f"{_said_damaged(folder, wrong)} Give an earlier checkpoint.")


def _read(leaves: Mapping[str, Any], origins: Mapping[str, epath.Path], kind: type | None = None) -> dict[str, Any]:
    """The arrays of those parameters that a checkpoint has, each as its leaf says, or as a `kind`."""
    reader, arrays = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()), {}
    for origin in dict.fromkeys(origins.values()):
        target = nested(placed({k: v for k, v in leaves.items() if origins.get(k) == origin}))
        how = ocp.checkpoint_utils.construct_restore_args(target)
        if kind is not None:
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=kind), target)
        asked = ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=True)
        arrays |= flat(reader.restore(origin / "params", args=asked))
    return arrays


# Where a run starts.


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins. `reason` is the line for the log, `damaged` the steps passed over on the way."""

    kind: Literal["resume", "initial", "fresh"]
    path: str | None
    reason: str
    damaged: tuple[int, ...] = ()

    @property
    def step(self) -> int | None:
        """The step to resume at; None where the run begins at 0."""
        return int(epath.Path(self.path).name) if self.kind == "resume" and self.path else None


def choose_start(
    model_dir: str | os.PathLike[str],
    initial_checkpoint_path: str | os.PathLike[str] | None = None,
    *,
    parts: Collection[str] | None = None,
    strict: bool = False,
) -> Start:
    """Which checkpoint a run starts from: the newest sound one of `model_dir`, or `initial_checkpoint_path`, or none.

    All files of a checkpoint in `model_dir` are read to see that it is sound. Nothing is written.

    Args:
      parts: which of its parts must be sound, such as "params"; None: all.
      strict: refuse, where the newest is damaged, instead of going back to one before it.

    Raises:
      FileNotFoundError: `initial_checkpoint_path` is needed and holds no checkpoint.
      ValueError: `model_dir` holds damaged checkpoints only, or `strict` and the newest is damaged.
    """
    folder = checkpoints_folder(model_dir)
    steps, damaged = _steps(folder), []
    for step in reversed(steps):
        own = folder / str(step)
        wrong = damage(own, parts)
        if not wrong:
            older = [s for s in steps if s < step and damage(folder / str(s), ("metrics",))]  # these are read, too
            reason = f"Resuming at step {step} from {own}: MODEL_DIR already holds this run"
            if initial_checkpoint_path:
                reason += f", so INITIAL_CHECKPOINT_PATH={str(initial_checkpoint_path)!r} is not read (it would be in a"
                reason += " new MODEL_DIR)"
            return Start("resume", str(own), reason + ".", (*damaged, *older))
        said = _said_damaged(own, wrong)
        if strict:
            raise UserError(f"{said} Without --strict the newest sound one is used instead.")
        log.warning("%s The one before it is looked at.", said)
        damaged.append(step)
    if damaged:
        raise UserError(
            f"All checkpoints in {folder} are damaged: {', '.join(map(str, damaged))}; of the last, {said} "
            "Begin a new MODEL_DIR, or bring back a copy of one."
        )
    nothing = f"MODEL_DIR={str(model_dir)!r} holds no finished checkpoint"
    if initial_checkpoint_path:
        found = _found(initial_checkpoint_path, "INITIAL_CHECKPOINT_PATH")
        reason = f"Starting at step 0 with the parameters of {found} and a fresh optimizer: {nothing} and"
        return Start("initial", str(found), f"{reason} INITIAL_CHECKPOINT_PATH names this one.")
    return Start("fresh", None, f"Starting at step 0 from random parameters: {nothing} and no INITIAL_CHECKPOINT_PATH.")


def damage(folder: epath.Path, parts: Collection[str] | None = None) -> list[str]:
    """What is wrong with the files of a checkpoint, one line for each; several hosts share the reading.

    A checkpoint from before there were checksums, whose `info` does not promise them, is taken as sound.
    """
    here = (jax.process_index(), jax.process_count())
    wrong = checksums.damage(folder, parts, here)
    if wrong is None:
        info = folder / "info" / "metadata"
        if not info.exists():
            foreign = (folder / "params").exists() and not (folder / "optimizer").exists()
            wrong = [] if foreign else ["info/metadata: missing"]
        else:
            promised = f'"{CHECKSUMS}"'.encode() in info.read_bytes()
            wrong = [f"{checksums.FILE}: missing"] if promised else []
    if here[1] == 1:
        return wrong
    text = "\n".join(wrong).encode()[:1024]
    padded = np.frombuffer(text.ljust(1024, b"\0"), np.uint8)
    every = multihost_utils.process_allgather(padded)
    return [line for row in every for line in row.tobytes().rstrip(b"\0").decode(errors="replace").splitlines()]


def _said_damaged(folder: epath.Path, wrong: list[str]) -> str:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"The checkpoint {folder} is damaged: {'; '.join(wrong[:3])}{more}."


def _found(path: str | os.PathLike[str], name: str = "The path") -> epath.Path:
    found = find_checkpoint(path)
    if found is not None:
        return found
    folder = absolute(path)
    if folder.exists():
        content = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ["a file"]
        there = f"It holds: {', '.join(content[:_LISTED]) or 'nothing'}" + (" ..." if len(content) > _LISTED else "")
    else:
        there = "It does not exist"
    raise MissingFileError(
        f"{name} {str(path)!r} ({folder}) holds no finished checkpoint. {there}. "
        f"Give a MODEL_DIR, its '{FOLDER}' folder, or one '{FOLDER}/<step>' folder with a 'params' folder in it."
    )


# Trees as flat dicts of "a/b/c", so that neither a leaf's name nor a file depends on a Python class.


def flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Without leaves of size 0, which Orbax does not write: they hold nothing, and `like` makes them anew."""
    return traverse_util.unflatten_dict({k: v for k, v in leaves.items() if math.prod(v.shape)}, sep="/")


def placed(leaves: Mapping[str, Any]) -> dict[str, Any]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=getattr(v, "sharding", None) or here)
        for k, v in leaves.items()
    }


def like(tree: Any, nested: Mapping[str, Any]) -> Any:
    """The leaves of `nested` in the structure of `tree`."""
    values = traverse_util.flatten_dict(nested, sep="/")
    leaves = [
        values[k] if k in values else jnp.zeros(v.shape, v.dtype, device=v.sharding)
        for k, v in placed(flat(tree)).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


# Comparing a checkpoint with what is wanted of it.


def parameter_names(path: str | os.PathLike[str]) -> set[str]:
    """What a checkpoint and its base hold."""
    return set(_saved(_found(path), "params"))


def base_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the `info` of a checkpoint says of its base: where it is, and a checksum of it."""
    folder = _found(path)
    file = folder / checksums.FILE
    return {"path": str(folder), "checksum": zlib.crc32(file.read_bytes()) if file.exists() else None}


def _saved(folder: epath.Path, part: str) -> dict[str, tuple[epath.Path, Any]]:
    """name -> the checkpoint that holds an array, this one or a base of it, and its shape and dtype."""
    found = {name: (folder, leaf) for name, leaf in _saved_here(folder, part).items()}
    base = read_info(folder).get("base") if part == "params" else None
    if base is None:
        return found
    if find_checkpoint(base["path"]) is None:
        raise MissingFileError(
            f"{folder} holds only what was trained; the other parameters are in {base['path']}, where it began, which "
            "is not there any more: put it back"
        )
    if base_of(base["path"]) != dict(base):
        raise UserError(
            f"{folder} holds only what was trained; the other parameters are in {base['path']}, where it began, but "
            "that is another checkpoint now: put the one back that was there"
        )
    return _saved(_found(base["path"]), part) | found


def _saved_here(folder: epath.Path, part: str) -> dict[str, Any]:
    if not (folder / part).exists():
        content = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise MissingFileError(f"{folder} has no '{part}' folder, only: {content}. It is no whole checkpoint.")
    metadata = ocp.PyTreeCheckpointHandler().metadata(folder / part)
    return traverse_util.flatten_dict(metadata.tree, sep="/")


def check(
    folder: epath.Path,
    part: str,
    wanted: Mapping[str, Any],
    info: Mapping[str, Any],
    same_dtype: bool,
    saved: Mapping[str, Any] | None = None,
) -> None:
    """Raises ValueError with all differences between the `part` saved in `folder` (or `saved` of it) and the wanted."""

    def described(leaf: Any) -> str:
        return f"{list(leaf.shape)}" + (f" {np.dtype(leaf.dtype)}" if same_dtype else "")

    wanted = {k: v for k, v in wanted.items() if math.prod(v.shape)}
    if saved is None:
        saved = {name: leaf for name, (_, leaf) in _saved(folder, part).items()}
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
    raise UserError("\n".join(lines))


def _explained(folder: epath.Path, info: Mapping[str, Any]) -> list[str]:
    """One line for every fact of the `info` part in which checkpoint and run differ."""
    flat_saved = traverse_util.flatten_dict(read_info(folder), sep=".")
    flat_here = traverse_util.flatten_dict(json.loads(json.dumps(dict(info))), sep=".")
    return [
        f"  {k}: checkpoint {flat_saved[k]!r}, this run {flat_here[k]!r}"
        for k in sorted(flat_saved.keys() & flat_here.keys())
        if flat_saved[k] != flat_here[k]
    ]


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """Orbax wants absolute paths; gs:// and the like are left alone."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def checkpoints_folder(path: str | os.PathLike[str]) -> epath.Path:
    """That of a MODEL_DIR, which may itself be meant."""
    folder = absolute(path)
    return folder if folder.name == FOLDER else folder / FOLDER
