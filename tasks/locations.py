"""Find a user's files: paths and patterns, local, gs:// or on the Hugging Face hub, and folders saved by `datasets`.

Must not import: tasks, vocabularies, SeqIO.
"""

import collections
import contextlib
import difflib
import json
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow as tf
from absl import logging

from tasks import file_formats, readers
from tasks.errors import MissingFileError, UserError, UserFileError

HUB = "hf://"
_HUB_PATH = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?/(.+)")


def find(patterns: str | Sequence[str], prefix: str = "") -> list[str]:
    """Return the files, sorted; those on the hub are downloaded to its cache first.

    Args:
      patterns: paths, patterns, hf://datasets/OWNER/NAME[@REVISION]/PATTERN, or folders made by `save_to_disk`.
      prefix: begins the errors.

    Raises:
      MissingFileError: none match.
      UserFileError: the hub cannot be reached.
      UserError: an unknown extension.
    """
    paths = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        with readable(pattern, prefix):
            on_hub = pattern.startswith(HUB)
            paths += _on_hub(pattern, prefix) if on_hub else _matches(os.path.expanduser(pattern), prefix)
    for path in paths:
        if not file_formats.is_known(path):
            raise UserError(
                f"{prefix}{path}: unknown format; known extensions: {', '.join(file_formats.ENDINGS)}; text also with "
                f"{' or '.join(readers.COMPRESSIONS)}"
            )
    for path, times in collections.Counter(paths).items():
        if times > 1:
            logging.warning("%s%s is named %d times, and read once.", prefix, path, times)
    return sorted(set(paths))


@contextlib.contextmanager
def readable(path: str, prefix: str = "") -> Iterator[None]:
    """Turn TensorFlow's error of a place that cannot be reached, such as a bucket, into a UserFileError of one line."""
    try:
        yield
    except tf.errors.OpError as error:
        reason = " ".join(str(error.message).split())[:200] or type(error).__name__
        raise UserFileError(
            f"{prefix}{path} cannot be reached ({reason}): check the name of the bucket, the network, and the login and"
            " its rights (gcloud auth application-default login)"
        ) from error


def _matches(pattern: str, prefix: str) -> list[str]:
    # A name with brackets or a backslash may be that of a file.
    candidates = [pattern] if tf.io.gfile.exists(pattern) else tf.io.gfile.glob(pattern)
    matches = [path for path in candidates if not tf.io.gfile.isdir(path)]
    for folder in (path for path in candidates if tf.io.gfile.isdir(path)):
        matches += _saved(folder, prefix)
    if not matches:
        folder, name = os.path.split(pattern)
        others = tf.io.gfile.listdir(folder or ".") if tf.io.gfile.isdir(folder or ".") else []
        near = difflib.get_close_matches(name, others, n=1)
        hint = f" Did you mean {os.path.join(folder, near[0])}?" if near else ""
        if tf.io.gfile.isdir(pattern):
            hint = f" It is a folder: name its files, such as {os.path.join(pattern, '*.jsonl')!r}."
        raise MissingFileError(
            f"{prefix}no file matches {pattern!r} (relative paths start at the current folder).{hint}"
        )
    return matches


def _saved(folder: str, prefix: str) -> list[str]:
    """Return the Arrow files of a folder made by `datasets.Dataset.save_to_disk`; [] for another folder."""
    splits = os.path.join(folder, "dataset_dict.json")
    if tf.io.gfile.exists(splits):
        names = _json(splits).get("splits") or []
        raise UserError(
            f"{prefix}{folder} has several splits: name one of them, such as "
            f"{os.path.join(folder, str(names[0]) if names else 'train')!r}"
        )
    state = os.path.join(folder, "state.json")
    if not tf.io.gfile.exists(state):
        return []
    files = [os.path.join(folder, str(file.get("filename"))) for file in _json(state).get("_data_files") or []]
    for file in files:
        if not tf.io.gfile.exists(file):
            raise MissingFileError(f"{prefix}{state} names {file}, which does not exist: copy the whole folder")
    return files


def _json(path: str) -> dict:
    with tf.io.gfile.GFile(path) as file:
        try:
            value = json.loads(file.read())
        except ValueError as error:
            raise UserFileError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserFileError(f"{path} is not a JSON object")
    return value


def _on_hub(pattern: str, prefix: str) -> list[str]:
    """Download the files of a dataset repository that match, and return their paths in the hub's cache."""
    match = _HUB_PATH.fullmatch(pattern)
    if match is None:
        raise UserError(
            f"{prefix}{pattern!r} is not a place on the hub: write hf://datasets/OWNER/NAME/PATTERN, or "
            "hf://datasets/OWNER/NAME@REVISION/PATTERN"
        )
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise UserError(f"{prefix}{pattern!r} needs another package: pip install 't5x_lite[hub]'") from None
    name, revision, files = match[1], match[2] and urllib.parse.unquote(match[2]), match[3]
    try:
        folder = huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=[files])
    except Exception as error:  # of the hub's client or of its HTTP library
        reason = " ".join((str(error) or repr(error)).split())[:300]
        raise UserFileError(
            f"{prefix}{pattern!r} cannot be read from the hub: {reason} Check the name and the network (HF_ENDPOINT, "
            "HF_TOKEN for private data), or download the files and name them here"
        ) from error
    paths = sorted(str(path) for path in Path(folder).glob(files) if path.is_file())
    if not paths:
        raise MissingFileError(f"{prefix}no file of the dataset {name} on the hub matches {files!r}")
    logging.info("%s%s: %d files in %s", prefix, pattern, len(paths), folder)
    return paths
