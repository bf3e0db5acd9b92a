"""Describe what a run's data is made of, so that a resumed run can tell whether it is still the same data.

Files count by path, size and content; vocabularies by class, size and content. This module uses SeqIO and TensorFlow's
file system. It must not depend on the model or on gin.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import seqio
import tensorflow as tf

from tasks import vocabulary as vocabularies

_WHOLE = 16 * 2**20  # bytes up to which a file is hashed from end to end; of a larger one, its two ends
_END = 2**20
_LISTED = 32  # files listed one by one; more are summed up, and only sizes and the first and last content count


def data_facts(provider: seqio.Task | seqio.Mixture, splits: Sequence[str], use_cached: bool = False) -> dict[str, Any]:
    """Return the facts of a task or mixture that decide which examples it gives: files, vocabularies, mixing rates.

    Returns:
      JSON values by a name that a user understands, such as {"files of squad (train)": ["a.json, 12 bytes, md5 ..."]}.
    """
    facts: dict[str, Any] = {}
    tasks = seqio.get_subtasks(provider)
    for split in splits:
        for task in tasks:
            if split in task.splits:
                facts[f"files of {task.name} ({split})"] = _files(task, split, use_cached)
    for feature, spec in provider.output_features.items():
        facts[f"vocabulary of {feature}"] = _vocabulary(spec.vocabulary)
    if isinstance(provider, seqio.Mixture):
        facts["mixing rates"] = {task.name: float(f"{provider.get_rate(task):.9g}") for task in provider.tasks}
    return facts


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return a line for each fact that both have and that differs: its name, what it was and what it is."""
    lines = []
    for name in current.keys() & saved.keys():
        before, now = saved[name], current[name]
        if before == now:
            continue
        if isinstance(before, list) and isinstance(now, list) and sorted(before) != sorted(now):
            before, now = [x for x in before if x not in now], [x for x in now if x not in before]
            lines.append(f"{name}: was {_joined(before)}, is {_joined(now)}")
        else:
            lines.append(f"{name}: was {before!r}, is {now!r}")
    return sorted(lines)


def _joined(items: Sequence[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(map(str, items[:most])) + more if items else "without"


def _files(task: seqio.Task, split: str, use_cached: bool) -> list[str]:
    try:
        source = task._get_cached_source(split) if use_cached else task.source
        paths = [str(path) for path in source.list_shards(split)]
    except Exception:  # reading the data reports it, with advice
        return []
    listed = paths if len(paths) <= _LISTED else [paths[0], paths[-1]]
    with ThreadPoolExecutor(32) as pool:
        sizes = dict(zip(paths, pool.map(_size, paths), strict=True))
        if None in sizes.values():
            return []  # a source without files, such as a function
        contents = list(pool.map(_content, listed))
    lines = [f"{path}, {sizes[path]} bytes, md5 {content}" for path, content in zip(listed, contents, strict=True)]
    if len(paths) > _LISTED:
        digest = hashlib.md5(repr(sorted(sizes.items())).encode()).hexdigest()
        total = sum(size or 0 for size in sizes.values())
        lines.append(f"{len(paths)} files, {total} bytes, md5 of names and sizes {digest}")
    return lines


def _size(path: str) -> int | None:
    try:
        return tf.io.gfile.stat(path).length
    except tf.errors.OpError:
        return None


def _content(path: str) -> str:
    """Return the MD5 of a file, or of the two ends of a large one."""
    size = _size(path)
    if size is None:
        return ""
    with tf.io.gfile.GFile(path, "rb") as file:
        if size <= _WHOLE:
            return hashlib.md5(file.read()).hexdigest()
        head = file.read(_END)
        file.seek(size - _END)
        return hashlib.md5(head + file.read()).hexdigest()


def _vocabulary(which: seqio.Vocabulary) -> str:
    vocabulary = vocabularies.resolved(which)
    name = f"{type(vocabulary).__name__} of {vocabulary.vocab_size} ids, {vocabulary.extra_ids} of them extra"
    content = getattr(vocabulary, "sp_model", None)
    if content is None and isinstance(file := getattr(vocabulary, "file", None), str):
        return f"{name}, md5 {_content(file)}"
    return name if content is None else f"{name}, md5 {hashlib.md5(content).hexdigest()}"
