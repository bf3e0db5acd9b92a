"""Check offline caches of tokenised tasks before they are read. `python -m tasks.cache` builds them.

SeqIO reads a task's cache without checking its vocabulary. Here the file COMPLETED, which marks a complete cache for
SeqIO, also records the vocabulary. Must not depend on Beam or on particular tasks.
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
    """Return the folder of a task's cache, after checking that it is complete, has `split` and the task's vocabulary.

    Raises MissingFileError if there is no such cache, UserError if its vocabulary differs. For a cache made by another
    program, which does not record its vocabulary, a warning is logged.
    """
    folder = task.cache_dir
    if not folder:
        name, roots = seqio.get_task_dir_from_name(task.name), seqio.get_global_cache_dirs()
        unfinished = [root for root in roots if tf.io.gfile.isdir(os.path.join(root, name))]
        raise MissingFileError(
            f"{task.name} is not cached: there is no {name}/{COMPLETED} in "
            f"{', '.join(roots) or 'any folder, because none was given (SEQIO_ADDITIONAL_CACHE_DIRS)'}"
            + (f" ({unfinished[0]} has an unfinished one)" if unfinished else "")
            + f". Build it with: make cache TASK={task.name} CACHE_DIR={roots[0] if roots else 'FOLDER'}"
        )
    if split and not tf.io.gfile.exists(seqio.get_cached_info_path(folder, split)):
        raise MissingFileError(f"{folder} has no split {split!r} of {task.name}. " + _rebuild_hint(task, folder))
    with tf.io.gfile.GFile(os.path.join(folder, COMPLETED)) as file:
        recorded = _parse(file.read())
    if recorded is None:
        logging.warning("%s does not record its vocabulary: make sure that it is the run's", folder)
        return folder
    for feature, current in _vocabularies(task).items():
        cached = recorded.get(feature, current)
        if {**cached, "name": ""} != {**current, "name": ""}:
            raise UserError(
                f"{folder} was made with the vocabulary {_show(cached)}, but {task.name} now has {_show(current)} for "
                f"{feature!r}: set VOCABULARY to the former, or use another folder. " + _rebuild_hint(task, folder)
            )
    return folder


def describe(task_or_mixture: seqio.Task | seqio.Mixture) -> dict[str, str]:
    """Return task name -> what a run with USE_CACHED_TASKS reads; each cache is checked by `check`."""
    return {
        task.name: f"the cache {check(task)}"
        if task.supports_caching
        else "no cache: it has no CacheDatasetPlaceholder"
        for task in seqio.get_subtasks(task_or_mixture)
    }


def record(task: seqio.Task) -> str:
    """Return the content of COMPLETED: the vocabulary of each feature, as JSON."""
    return json.dumps({"vocabularies": _vocabularies(task)})


def _parse(text: str) -> Mapping[str, Any] | None:
    try:
        return json.loads(text)["vocabularies"]
    except (ValueError, TypeError, KeyError):  # SeqIO's own script writes a word or nothing
        return None


def _vocabularies(task: seqio.Task) -> dict[str, dict[str, Any]]:
    return {name: _identity(feature.vocabulary) for name, feature in task.output_features.items()}


def _identity(which: seqio.Vocabulary) -> dict[str, Any]:
    """Return the properties that identify a vocabulary; `name` is not compared, as files may be copied."""
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


def _rebuild_hint(task: seqio.Task, folder: str) -> str:
    root = folder.removesuffix(seqio.get_task_dir_from_name(task.name)).rstrip("/")
    return f"To rebuild it: make cache TASK={task.name} CACHE_DIR={root} CACHE_FLAGS=--overwrite"


def prepare_worker(environment: Mapping[str, str], vocabulary_name: str | None, bad_rows: readers.Action) -> None:
    """Configure a worker process with the data folders and vocabulary of the command."""
    os.environ.update(environment)
    readers.set_bad_rows(bad_rows)
    if vocabulary_name:
        vocabulary.set_default(vocabulary_name)
