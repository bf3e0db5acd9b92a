"""Offline caches of tokenised tasks: checked before they are read. `python -m tasks.cache` makes them.

SeqIO finds a task's cache and reads it; it does not ask which vocabulary it was made with. COMPLETED, the file that
SeqIO takes for the sign of a whole cache, says that here. Must not know: Beam, what any task reads or makes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf
from absl import logging

from tasks import readers, vocabulary
from tasks.errors import MissingFileError, UserError

COMPLETED = "COMPLETED"


def check(task: seqio.Task, split: str | None = None) -> str:
    """The folder of a task's cache, which is whole, has `split` and was made with the task's vocabulary.

    Raises FileNotFoundError where there is no such cache, ValueError where it has other vocabularies; both say what to
    do. A cache made by another program does not name its vocabulary: a warning says so.
    """
    folder = task.cache_dir
    if not folder:
        name, roots = seqio.get_task_dir_from_name(task.name), seqio.get_global_cache_dirs()
        unfinished = [root for root in roots if tf.io.gfile.isdir(os.path.join(root, name))]
        raise MissingFileError(
            f"{task.name} is not cached: there is no {name}/{COMPLETED} in "
            f"{', '.join(roots) or 'any folder, for none was given (SEQIO_ADDITIONAL_CACHE_DIRS)'}"
            + (f" ({unfinished[0]} has an unfinished one)" if unfinished else "")
            + f". Make it with: make cache TASK={task.name} CACHE_DIR={roots[0] if roots else 'FOLDER'}"
        )
    if split and not tf.io.gfile.exists(seqio.get_cached_info_path(folder, split)):
        raise MissingFileError(
            f"{folder} has no split {split!r} of {task.name}: it was made where that was not. " + _anew(task, folder)
        )
    with tf.io.gfile.GFile(os.path.join(folder, COMPLETED)) as file:
        made = _parse(file.read())
    if made is None:
        logging.warning("%s does not say which vocabulary it was made with: make sure that it is the run's", folder)
        return folder
    for feature, now in _vocabularies(task).items():
        then = made.get(feature, now)
        if {**then, "name": ""} != {**now, "name": ""}:
            raise UserError(
                f"{folder} was made with the vocabulary {_show(then)}, and {task.name} now has {_show(now)} for "
                f"{feature!r}: set VOCABULARY to the former, or use another folder. " + _anew(task, folder)
            )
    return folder


def describe(task_or_mixture: seqio.Task | seqio.Mixture) -> dict[str, str]:
    """Task name to what a run with USE_CACHED_TASKS reads, each cache checked as by `check`."""
    return {
        task.name: f"the cache {check(task)}"
        if task.supports_caching
        else "no cache: it has no CacheDatasetPlaceholder"
        for task in seqio.get_subtasks(task_or_mixture)
    }


def record(task: seqio.Task) -> str:
    """What COMPLETED holds: the vocabulary of each feature, as JSON."""
    return json.dumps({"vocabularies": _vocabularies(task)})


def _parse(text: str) -> Mapping[str, Any] | None:
    try:
        return json.loads(text)["vocabularies"]
    except (ValueError, TypeError, KeyError):  # SeqIO's own script writes a word or nothing
        return None


def _vocabularies(task: seqio.Task) -> dict[str, dict[str, Any]]:
    return {name: _identity(feature.vocabulary) for name, feature in task.output_features.items()}


def _identity(which: seqio.Vocabulary) -> dict[str, Any]:
    """All that tells vocabularies apart; `name` is for people, for the same file may lie in two places."""
    which = vocabulary.resolved(which)
    kind = type(which).__name__
    file = getattr(which, "sentencepiece_model_file", getattr(which, "file", None))
    digest = None
    if file:
        with tf.io.gfile.GFile(file, "rb") as model:
            digest = hashlib.sha256(model.read()).hexdigest()
    return {
        "name": file or kind,
        "kind": kind,
        "size": which.vocab_size,
        "extra_ids": which.extra_ids,
        "sha256": digest,
    }


def _show(identity: Mapping[str, Any]) -> str:
    digest = f", sha256 {identity['sha256'][:8]}" if identity["sha256"] else ""
    return f"{identity['name']} ({identity['size']} ids{digest})"


def _anew(task: seqio.Task, folder: str) -> str:
    root = folder.removesuffix(seqio.get_task_dir_from_name(task.name)).rstrip("/")
    return f"To make it anew: make cache TASK={task.name} CACHE_DIR={root} CACHE_FLAGS=--overwrite"


def prepare_worker(environment: Mapping[str, str], vocabulary_name: str | None, bad_rows: readers.Action) -> None:
    """Makes a worker's process read the data, with the vocabulary, that the command was given."""
    os.environ.update(environment)
    readers.set_bad_rows(bad_rows)
    if vocabulary_name:
        vocabulary.set_default(vocabulary_name)
