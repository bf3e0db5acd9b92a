"""Find, verify and read checkpoints.

See `saving.py` for their format. This module uses Orbax and trees of arrays; it must not depend on the model, the
optimizer, SeqIO or TensorFlow.
"""

import contextlib
import contextvars
import dataclasses
import importlib
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from t5x_lite import storage
from t5x_lite.checkpoint import checksums
from t5x_lite.errors import MissingFileError, UserError, UserFileError
from t5x_lite.model import quantization

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
CHECKSUMS = "checksums"  # key in `info`: true if the checkpoint was written with checksums
_LISTED = 12  # maximum lines of each kind that a mismatch prints

# Parameters only, without optimizer state.


def find_checkpoint(path: str | os.PathLike[str]) -> epath.Path | None:
    """Return `path` if it is a step folder, else the newest finished checkpoint in a MODEL_DIR or ``checkpoints``."""
    folder = absolute(path)
    with storage.bucket_errors(folder):
        if (folder / "params").exists():
            return folder
    for parent in (folder / FOLDER, folder):
        if steps := _steps(parent):
            return parent / str(steps[-1])
    return None


def _steps(folder: epath.Path) -> list[int]:
    """Return the steps of the finished checkpoints in `folder`, in ascending order."""
    if str(folder).startswith("gs://"):
        try:
            importlib.import_module("google.cloud.storage")
        except ImportError:
            cure = "Orbax needs a package that is not installed to list buckets: pip install google-cloud-storage"
            raise UserError(f"{folder}: {cure}") from None
    with storage.bucket_errors(folder):
        if folder.exists():
            return sorted(s.step for s in ocp.path.step.standard_name_format().find_all(folder))
        storage.require_bucket(folder)
    return []


# Where the base of a checkpoint that holds only trained parameters may have been moved to.
moved_base: contextvars.ContextVar[str | None] = contextvars.ContextVar("moved_base", default=None)


@contextlib.contextmanager
def base_at(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Look for the base of checkpoints at `path` too; None: only where it was."""
    token = moved_base.set(None if path is None else str(path))
    try:
        yield
    finally:
        moved_base.reset(token)


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the `info` part of a checkpoint (see `saving.Checkpointer`), or {} if it has none.

    Raises FileNotFoundError if `path` holds no checkpoint, ValueError if the part is damaged.
    """
    file = _require_checkpoint(path) / "info" / "metadata"
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
    """Read the parameters of a checkpoint, without optimizer state; parameters it does not hold come from its base.

    Args:
      path: a MODEL_DIR, its ``checkpoints`` folder or one ``<step>`` folder.
      abstract_params: tree of jax.ShapeDtypeStruct with the shardings and dtypes to restore to. If None, a nested dict
        of numpy arrays is returned, with the dtypes as saved.
      info: this run's facts as given to `Checkpointer`, to explain a mismatch.
      fresh: "a/b/c" -> value of each parameter that the checkpoint may lack or, if `left_out` matches its name, may
        hold in another shape.
      left_out: a regular expression, searched in parameter names. The checkpoint may hold matching parameters that
        abstract_params lacks; they are not read.
      verified: the checksums have already been compared, as `choose_start` does in a MODEL_DIR.

    Raises:
      FileNotFoundError: the checkpoint or its base does not exist.
      ValueError: the files are damaged, the base has been replaced, or the parameters do not match abstract_params. All
        differences are listed, and no array is read.
    """
    folder = _require_checkpoint(path)
    if not verified:
        _raise_if_damaged(folder)
    saved = _saved(folder, "params")
    if abstract_params is not None:
        leaves, new = matched(
            folder, {k: leaf for k, (_, leaf) in saved.items()}, abstract_params, fresh, left_out, info or {}
        )
        saved = {name: saved[name] for name in leaves}
    origins = {name: origin for name, (origin, _) in saved.items()}
    for origin in dict.fromkeys(o for o in origins.values() if o != folder):
        _raise_if_damaged(origin)
    if abstract_params is None:
        leaves = {k: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for k, (_, leaf) in saved.items()}
        return traverse_util.unflatten_dict(_read(leaves, origins, np.ndarray), sep="/")
    as_stored = flat(abstract_params)
    in_int8 = [name for name in leaves if name not in as_stored]  # in the same order on all hosts
    others = {name: leaf for name, leaf in leaves.items() if name not in in_int8}
    params = _read(others, {name: origins[name] for name in others}) | new
    for name in in_int8:  # one by one, as each takes four times its memory until it is stored
        params |= quantization.placed(name, _read({name: leaves[name]}, {name: origins[name]})[name], abstract_params)
    return like(abstract_params, traverse_util.unflatten_dict(params, sep="/"))


def matched(
    path: epath.Path,
    saved: Mapping[str, Any],
    abstract_params: Any,
    fresh: Mapping[str, Any] | None,
    left_out: str | None,
    info: Mapping[str, Any],
    saved_info: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the leaves to read, "a/b/c" -> shape and sharding, and the parameters that keep their values in `fresh`.

    The arguments and errors are those of `restore_params`; `saved` has the shapes at `path`, saved_info its facts.
    """
    leaves = quantization.plain(flat(abstract_params))
    if left_out is not None:
        wanted = {name: leaf.shape for name, leaf in leaves.items()}
        spare = [k for k, leaf in saved.items() if re.search(left_out, k) and wanted.get(k) != tuple(leaf.shape)]
        saved = {name: leaf for name, leaf in saved.items() if name not in spare}
        if spare:
            log.info("%d parameters of %s are not read: %s", len(spare), path, ", ".join(sorted(spare)))
    new = {k: v for k, v in (fresh or {}).items() if k not in saved}
    required = {k: v for k, v in leaves.items() if k not in new}
    check(path, "params", required, info, same_dtype=False, saved=saved, saved_info=saved_info)
    if new:
        log.info("%d parameters missing in %s keep their initial values: %s", len(new), path, ", ".join(sorted(new)))
    return required, new


def _raise_if_damaged(folder: epath.Path) -> None:
    if problems := damage(folder, ("params",)):
        raise UserError(f"{_damage_message(folder, problems)} Give an earlier checkpoint.")


def _read(leaves: Mapping[str, Any], origins: Mapping[str, epath.Path], kind: type | None = None) -> dict[str, Any]:
    """Read the arrays in `origins`, with the shape, dtype and sharding of their leaves, or as instances of `kind`."""
    reader, arrays = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()), {}
    for origin in dict.fromkeys(origins.values()):
        target = nested(placed({k: v for k, v in leaves.items() if origins.get(k) == origin}))
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        if kind is not None:
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=kind), target)
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        arrays |= flat(reader.restore(origin / "params", args=args))
    return arrays


# The start of a run.


@dataclasses.dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from, the log line that explains why, and the damaged steps to move away."""

    kind: Literal["resume", "initial", "import", "fresh"]  # import: a model in another format
    path: str | None
    reason: str
    damaged: tuple[int, ...] = ()

    @property
    def step(self) -> int | None:
        """The step to resume at, or None if the run starts at step 0."""
        return int(epath.Path(self.path).name) if self.kind == "resume" and self.path else None


def choose_start(
    model_dir: str | os.PathLike[str],
    initial_checkpoint_path: str | os.PathLike[str] | None = None,
    *,
    parts: Collection[str] | None = None,
    strict: bool = False,
) -> Start:
    """Choose the newest intact checkpoint of `model_dir`, else `initial_checkpoint_path`, else a fresh start.

    All files of a checkpoint in `model_dir` are read to verify their checksums. Nothing is written.

    Args:
      parts: the parts that must be intact, such as "params"; None means all.
      strict: raise an error if the newest checkpoint is damaged, instead of falling back to an earlier one.

    Raises:
      FileNotFoundError: `initial_checkpoint_path` is needed and holds no checkpoint.
      ValueError: all checkpoints in `model_dir` are damaged, or the newest is and `strict` is set.
    """
    folder = checkpoints_folder(model_dir)
    steps, damaged = _steps(folder), []
    for step in reversed(steps):
        step_folder = folder / str(step)
        problems = damage(step_folder, parts)
        if not problems:
            # Orbax reads the metrics of older checkpoints, too.
            older = [s for s in steps if s < step and damage(folder / str(s), ("metrics",))]
            reason = f"Resuming at step {step} from {step_folder}: MODEL_DIR already holds this run"
            if initial_checkpoint_path:
                reason += f", so INITIAL_CHECKPOINT_PATH={str(initial_checkpoint_path)!r} is not read (it would be in a"
                reason += " new MODEL_DIR)"
            return Start("resume", str(step_folder), reason + ".", (*damaged, *older))
        message = _damage_message(step_folder, problems)
        if strict:
            raise UserError(f"{message} Without --strict the newest intact one is used instead.")
        log.warning("%s Trying the one before it.", message)
        damaged.append(step)
    if damaged:
        raise UserError(
            f"All checkpoints in {folder} are damaged: {', '.join(map(str, damaged))}. {message} "
            "Use a new MODEL_DIR, or restore one of them from a copy."
        )
    nothing = f"MODEL_DIR={str(model_dir)!r} holds no finished checkpoint"
    if initial_checkpoint_path:
        try:
            initial = _require_checkpoint(initial_checkpoint_path, "INITIAL_CHECKPOINT_PATH")
        except MissingFileError:
            raise
        except Exception as error:  # each library for buckets has errors of its own
            reason = str(error).strip().splitlines()[0]
            raise UserFileError(
                f"INITIAL_CHECKPOINT_PATH {initial_checkpoint_path!r} cannot be read: {reason}"
            ) from error
        reason = f"Starting at step 0 with the parameters of {initial} and a fresh optimizer: {nothing} and"
        return Start("initial", str(initial), f"{reason} INITIAL_CHECKPOINT_PATH names this one.")
    return Start("fresh", None, f"Starting at step 0 from random parameters: {nothing} and no INITIAL_CHECKPOINT_PATH.")


def damage(folder: epath.Path, parts: Collection[str] | None = None) -> list[str]:
    """Return one line for each damaged file of a checkpoint; several hosts share the reading.

    A checkpoint whose `info` does not announce checksums (it is older than they are) is taken as intact.
    """
    share = (jax.process_index(), jax.process_count())
    problems = checksums.damage(folder, parts, share)
    if problems is None:
        info = folder / "info" / "metadata"
        if not info.exists():
            foreign = (folder / "params").exists() and not (folder / "optimizer").exists()
            problems = [] if foreign else ["info/metadata: missing"]
        else:
            has_checksums = f'"{CHECKSUMS}"'.encode() in info.read_bytes()
            problems = [f"{checksums.FILE}: missing"] if has_checksums else []
    if jax.process_count() == 1:
        return problems
    text = "\n".join(problems).encode()[:1024]
    padded = np.frombuffer(text.ljust(1024, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [line for row in rows for line in row.tobytes().rstrip(b"\0").decode(errors="replace").splitlines()]


def _damage_message(folder: epath.Path, problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"The checkpoint {folder} is damaged: {'; '.join(problems[:3])}{more}."


def _require_checkpoint(path: str | os.PathLike[str], name: str = "The path") -> epath.Path:
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        return checkpoint
    folder = absolute(path)
    if folder.exists():
        content = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ["a file"]
        state = f"It holds: {', '.join(content[:_LISTED]) or 'nothing'}" + (" ..." if len(content) > _LISTED else "")
    else:
        state = "It does not exist"
    raise MissingFileError(
        f"{name} {str(path)!r} ({folder}) holds no finished checkpoint. {state}. "
        f"Give a MODEL_DIR, its '{FOLDER}' folder, or one '{FOLDER}/<step>' folder with a 'params' folder in it."
    )


# Trees as flat dicts with keys "a/b/c", so that names of leaves and files do not depend on Python classes.


def flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nest a flat dict, without leaves of size 0: Orbax does not write them, and `like` recreates them."""
    return traverse_util.unflatten_dict({k: v for k, v in leaves.items() if math.prod(v.shape)}, sep="/")


def placed(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shape, dtype and sharding of each leaf; a leaf without a sharding goes to the first local device."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=getattr(v, "sharding", None) or default)
        for k, v in leaves.items()
    }


def like(tree: Any, nested: Mapping[str, Any]) -> Any:
    """Return the leaves of `nested` in the structure of `tree`."""
    values = traverse_util.flatten_dict(nested, sep="/")
    leaves = [
        values[k] if k in values else jnp.zeros(v.shape, v.dtype, device=v.sharding)
        for k, v in placed(flat(tree)).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


# Compare a checkpoint with the state that a run needs.


def parameter_names(path: str | os.PathLike[str]) -> set[str]:
    """Return the names of all parameters in a checkpoint and its base."""
    return set(_saved(_require_checkpoint(path), "params"))


def own_parameter_names(path: str | os.PathLike[str]) -> set[str]:
    """Return the names of the parameters that a checkpoint itself holds, without those of its base."""
    return set(_saved_here(_require_checkpoint(path), "params"))


def base_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the entry that identifies `path` as a base in another checkpoint's `info`: its path and a checksum."""
    folder = _require_checkpoint(path)
    file = folder / checksums.FILE
    return {"path": str(folder), "checksum": zlib.crc32(file.read_bytes()) if file.exists() else None}


def base_in_use(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the entry of a checkpoint's base in its `info`, with the place where it is now; None if it has no base."""
    folder = _require_checkpoint(path)
    base = read_info(folder).get("base")
    return None if base is None else base | {"path": str(_base(folder, base))}


def _saved(folder: epath.Path, part: str) -> dict[str, tuple[epath.Path, Any]]:
    """Return name -> (the checkpoint that holds the array, this one or its base; a leaf with shape and dtype)."""
    entries = {name: (folder, leaf) for name, leaf in _saved_here(folder, part).items()}
    base = read_info(folder).get("base") if part == "params" else None
    if base is None:
        return entries
    unused = set(base.get("unused", ()))
    return {k: v for k, v in _saved(_base(folder, base), part).items() if k not in unused} | entries


def _base(folder: epath.Path, base: Mapping[str, Any]) -> epath.Path:
    """Return the checkpoint that holds the other parameters of `folder`, where it was or has been moved to."""
    relative = os.path.normpath(os.path.join(folder, base["relative"])) if "relative" in base else None
    places = list(dict.fromkeys(str(absolute(p)) for p in (base["path"], relative, moved_base.get()) if p is not None))
    existing = [place for place in places if find_checkpoint(place) is not None]
    for place in existing:
        if base_of(place)["checksum"] == base["checksum"]:
            return _require_checkpoint(place)
    text = f"{folder} holds only the trained parameters; the others are in {base['path']}"
    cure = (
        "restore that checkpoint, or name the place that it has been moved to: BASE_CHECKPOINT_PATH of run.py, --base "
        "of t5x_lite.convert, load(path, base=...)"
    )
    if existing:
        raise UserError(f"{text}, but {', '.join(existing)} is another checkpoint: {cure}")
    looked = f" (nor {', '.join(places[1:])})" if places[1:] else ""
    raise MissingFileError(f"{text}, which does not exist any more{looked}: {cure}")


def _saved_here(folder: epath.Path, part: str) -> dict[str, Any]:
    if not (folder / part).exists():
        content = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise MissingFileError(f"{folder} has no '{part}' folder, only: {content}. It is not a complete checkpoint.")
    metadata = ocp.PyTreeCheckpointHandler().metadata(folder / part)
    return traverse_util.flatten_dict(metadata.tree, sep="/")


def check(
    folder: epath.Path,
    part: str,
    wanted: Mapping[str, Any],
    info: Mapping[str, Any],
    same_dtype: bool,
    saved: Mapping[str, Any] | None = None,
    saved_info: Mapping[str, Any] | None = None,
) -> None:
    """Raise ValueError with all differences between `wanted` and `saved` (None: the `part` saved in `folder`).

    What lies in the base of `folder` may have another dtype in any case: FROZEN_DTYPE.
    """
    in_base: set[str] = set()

    def describe(name: str, leaf: Any) -> str:
        return f"{list(leaf.shape)}" + (f" {np.dtype(leaf.dtype)}" if same_dtype and name not in in_base else "")

    wanted = {k: v for k, v in wanted.items() if math.prod(v.shape)}
    if saved is None:
        entries = _saved(folder, part)
        saved = {name: leaf for name, (_, leaf) in entries.items()}
        in_base = {name for name, (origin, _) in entries.items() if origin != folder}
    both = wanted.keys() & saved.keys()
    groups = {
        "missing (in this run, not in the checkpoint)": [
            f"{k} {describe(k, wanted[k])}" for k in sorted(wanted.keys() - saved.keys())
        ],
        "extra (in the checkpoint, not in this run)": [
            f"{k} {describe(k, saved[k])}" for k in sorted(saved.keys() - wanted.keys())
        ],
        "different": [
            f"{k}: checkpoint {describe(k, saved[k])}, this run {describe(k, wanted[k])}"
            for k in sorted(both)
            if describe(k, saved[k]) != describe(k, wanted[k])
        ],
    }
    if not any(groups.values()):
        return
    part_name = {"params": "parameters", "optimizer": "optimizer state"}[part]
    lines = [f"The {part_name} in {folder} do not fit this run."]
    for title, entries in groups.items():
        if entries:
            lines += [f"  {title}: {len(entries)}"] + [f"    {e}" for e in entries[:_LISTED]]
            lines += [f"    ... and {len(entries) - _LISTED} more"] if len(entries) > _LISTED else []
    lines += _differing_facts(read_info(folder) if saved_info is None else saved_info, info)
    if part == "params":
        lines.append("Use the model config that the checkpoint was trained with, or another checkpoint.")
    else:
        lines.append(
            "Use the optimizer that the checkpoint was trained with, or start a new MODEL_DIR with this checkpoint as "
            "INITIAL_CHECKPOINT_PATH, which starts a fresh optimizer."
        )
    raise UserError("\n".join(lines))


def _differing_facts(saved: Mapping[str, Any], info: Mapping[str, Any]) -> list[str]:
    """Return one line for each fact of the `info` part in which checkpoint and run differ."""
    flat_saved = traverse_util.flatten_dict(json.loads(json.dumps(dict(saved))), sep=".")
    flat_run = traverse_util.flatten_dict(json.loads(json.dumps(dict(info))), sep=".")
    return [
        f"  {k}: checkpoint {flat_saved[k]!r}, this run {flat_run[k]!r}"
        for k in sorted(flat_saved.keys() & flat_run.keys())
        if flat_saved[k] != flat_run[k]
    ]


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """Return an absolute path, which Orbax requires; URLs such as gs:// are unchanged."""
    text = os.fspath(path)
    return epath.Path(text if storage.is_url(text) else os.path.abspath(os.path.expanduser(text)))


def checkpoints_folder(path: str | os.PathLike[str]) -> epath.Path:
    """Return the ``checkpoints`` folder of a MODEL_DIR; `path` may also be that folder."""
    folder = absolute(path)
    return folder if folder.name == FOLDER else folder / FOLDER
