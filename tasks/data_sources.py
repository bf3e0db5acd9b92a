"""SeqIO data sources: read a corpus from its official files if present, otherwise from TFDS.

  MemorySource   files parsed once in Python into tensors; each epoch is fully reshuffled (GLUE, SQuAD)
  LinesSource    one example per line, streamed from many files (C4)
  CorpusSource   one of the two for a folder under $T5X_LITE_DATA_DIR, or TFDS; chosen on first use
  CorpusTask     a seqio.Task that may have no splits, so that a mixture works with a partial copy of the data

The position of a dataset can be saved with its tf.data iterator (`tf.train.Checkpoint(iterator)`): shuffling and
reading keep no Python state. Must not import: text formats of tasks, vocabularies, mixtures.
"""

import contextlib
import copy
import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging
from seqio import dataset_providers

from tasks import blocks, cache, readers
from tasks.errors import MissingFileError, UserError

# A column has one value per example: an array, or a ragged tensor for lists; columns are nested like the features.
Columns = dict[str, Any]
_LINES_PER_CALL = 64  # lines per Python call: 3 times as fast as one line per call


class MemorySource(seqio.DataSource):
    """A source whose examples are parsed in Python into columns, once per dataset.

    Args:
      paths: split name -> files; only splits whose files exist.
      read: (files, split) -> columns of equal length. Raises UserError for bad rows.
    """

    def __init__(self, paths: Mapping[str, list[str]], read: Callable[[list[str], str], Columns]):
        super().__init__(splits=paths.keys())
        self._paths = dict(paths)
        self._read = read
        self._sizes: dict[str, int] = {}

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return self._paths[split]

    def num_input_examples(self, split: str) -> int:
        if split not in self._sizes:
            self._columns(split)
        return self._sizes[split]

    def _columns(self, split: str) -> tuple[Columns, int]:
        columns = self._read(self._paths[split], split)
        size = len(next(iter(columns.values())))
        self._sizes[split] = size
        if not size:
            raise UserError(f"no examples in {', '.join(self._paths[split])}")
        return columns, size

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        num_epochs: int | None = 1,
        **unused,
    ) -> tf.data.Dataset:
        columns, size = self._columns(split)
        columns = tf.nest.map_structure(_as_tensor, columns)
        shard = _shard(range(size), shard_info, f"{', '.join(self._paths[split])}: {size} examples")

        def example(i: tf.Tensor) -> dict:
            return tf.nest.map_structure(lambda column: column[i * shard.step + shard.start], columns)

        def indices(key: tf.Tensor) -> tf.data.Dataset:
            return _permutation(len(shard), key) if shuffle else tf.data.Dataset.range(len(shard))

        return _passes(indices, seed, num_epochs).map(example, num_parallel_calls=tf.data.AUTOTUNE)


def _as_tensor(column: np.ndarray | tf.RaggedTensor) -> tf.Tensor | tf.RaggedTensor:
    return column if isinstance(column, tf.RaggedTensor) else tf.constant(column)


def _shard(items: Any, shard_info: seqio.ShardInfo | None, name: str) -> Any:
    """Return this host's shard of a sequence: every n-th item, independent of any seed."""
    shards, index = (shard_info.num_shards, shard_info.index) if shard_info else (1, 0)
    shard = items[index::shards]
    if not shard:
        raise UserError(f"{name} cannot be shared among {shards} hosts")
    return shard


def _passes(
    one_pass: Callable[[tf.Tensor], tf.data.Dataset], seed: int | None, num_epochs: int | None
) -> tf.data.Dataset:
    """Concatenate `one_pass(key)` for each of `num_epochs` epochs (None: infinitely many), with a new key each time.

    The key is a function of the seed and the epoch. A random stream restarted by `repeat` is not used: tf.data drops
    its state once an epoch has been prefetched to its end, and a position saved then is wrong.
    """
    base = tf.constant([0, secrets.randbits(31) if seed is None else seed], tf.int32)

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        return one_pass(tf.random.fold_in(base, tf.cast(number, tf.int32)))  # pyright: ignore[reportArgumentType]

    return tf.data.Dataset.range(2**31 if num_epochs is None else num_epochs).flat_map(epoch)


def _permutation(size: int, key: tf.Tensor) -> tf.data.Dataset:
    """Return a permutation of 0..size-1 by the key, computed index by index.

    `Dataset.shuffle(size)` would save its buffer in each checkpoint: 80 MB and 7 s for MNLI's 400,000 rows.
    """

    def permuted(i: tf.Tensor) -> tf.Tensor:
        shuffle_index = tf.random.experimental.index_shuffle  # pyright: ignore[reportAttributeAccessIssue]
        return shuffle_index(i, seed=tf.bitcast(key, tf.uint32), max_index=size - 1)

    return tf.data.Dataset.range(size).map(permuted)


class _FilesSource(seqio.FileDataSource):
    """A source that interleaves 16 files like SeqIO, with the epochs of `_passes`."""

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        num_epochs: int | None = 1,
        **unused,
    ) -> tf.data.Dataset:
        files = self.list_shards(split)
        shard = _shard(files, shard_info, f"{split} of {self}: {len(files)} files")

        def read(key: tf.Tensor) -> tf.data.Dataset:
            paths = seqio.stateless_shuffle(tf.constant(shard), key) if shuffle else tf.constant(shard)
            paths = tf.data.Dataset.from_tensor_slices(paths)
            return paths.interleave(self._reader, cycle_length=16, block_length=16, num_parallel_calls=tf.data.AUTOTUNE)

        return _passes(read, seed, num_epochs)


class LinesSource(_FilesSource):
    """A source that streams examples from files with one example per line, plain or .gz.

    Args:
      files: split name -> file patterns.
      parse: (path, line number from 1, line) -> one string per name in `features`, or None for a blank line.
      features: names of the strings returned by `parse`.

    If `parse` raises BadRow, a line is not UTF-8 or a .gz is truncated, the iterator raises
    tf.errors.InvalidArgumentError with file and line. With `readers.set_bad_rows("skip")` bad lines are dropped, and
    their number is logged at the end of the file. (tf.data alone does not detect a truncated .gz.)
    """

    def __init__(
        self,
        files: Mapping[str, list[str]],
        parse: Callable[[str, int, str], Sequence[str] | None],
        features: Sequence[str],
    ):
        self._parse = parse
        self._features = tuple(features)
        self._skipped: dict[str, readers.Skipped] = {}  # by file, only for the log
        super().__init__(read_file_fn=self._read_lines, split_to_filepattern=files)

    def _read_lines(self, path: tf.Tensor) -> tf.data.Dataset:
        is_gzip = tf.strings.regex_full_match(path, r".*\.gz")
        batches = tf.data.TextLineDataset(path, compression_type=tf.where(is_gzip, "GZIP", "")).batch(_LINES_PER_CALL)
        end = tf.data.Dataset.from_tensors(tf.zeros([0], tf.string))  # an empty batch marks the end of the file
        batches = batches.concatenate(end).scan(np.zeros(2, np.int64), _count_lines_and_bytes)

        def parse(counts, batch):
            types = [tf.string] * len(self._features)
            values = tf.numpy_function(self._parse_batch, [path, counts, batch], types, stateful=False)
            return {k: tf.ensure_shape(v, [None]) for k, v in zip(self._features, values, strict=True)}

        return batches.map(parse).unbatch()

    def _parse_batch(self, path: bytes, counts: np.ndarray, batch: np.ndarray) -> list[np.ndarray]:
        name, lines_before, bytes_before = path.decode(), int(counts[0]), int(counts[1])
        if not lines_before or name not in self._skipped:
            self._skipped[name] = readers.Skipped(name)
        skipped = self._skipped[name]
        if not len(batch):
            with skipped:
                readers.check_gzip_end(name, bytes_before)
            skipped.log()
        rows = []
        for number, line in enumerate(batch, start=lines_before + 1):
            with skipped:
                row = self._parse(name, number, readers.decode_line(name, number, line))
                if row is None:
                    skipped.blank += 1
                else:
                    rows.append(row)
        return [np.array([row[k].encode() for row in rows], object) for k in range(len(self._features))]


def _count_lines_and_bytes(counts: tf.Tensor, batch: tf.Tensor) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
    """Scan function: pair each batch with the number of lines and bytes before it."""
    size = tf.stack([tf.size(batch, tf.int64), tf.reduce_sum(tf.cast(tf.strings.length(batch) + 1, tf.int64))])
    return counts + size, (counts, batch)


@dataclasses.dataclass(frozen=True)
class _Choice:
    source: seqio.DataSource
    origin: str  # description for the log


class CorpusSource(seqio.DataSource):
    """A corpus read from its official files under $T5X_LITE_DATA_DIR if its folder exists, otherwise from TFDS.

    The choice is made and logged when the source is first used (and again if a variable changes). If the folder exists,
    only splits whose files exist are available; a missing split is not read from TFDS.

    Args:
      folder: folder of the corpus in the data folder, such as "glue/CoLA".
      files: split name -> file pattern in that folder.
      build: split name -> paths to the source that reads them.
      tfds_name: name and version of the corpus in TFDS.
      tfds_splits: splits in TFDS, listed here so that `splits` needs no TFDS data.
    """

    def __init__(
        self,
        folder: str,
        files: Mapping[str, str],
        build: Callable[[dict[str, list[str]]], seqio.DataSource],
        tfds_name: str,
        tfds_splits: Sequence[str],
    ):
        super().__init__(splits=files.keys())
        self._folder = folder
        self._files = dict(files)
        self._build = build
        self._tfds_name = tfds_name
        self._tfds_splits = tuple(tfds_splits)
        self._choices: dict[tuple[str | None, str | None], _Choice] = {}

    def _choice(self) -> _Choice:
        root, tfds_folder = location = readers.data_dir(), os.environ.get("TFDS_DATA_DIR")
        if location not in self._choices:
            folder = root and os.path.join(root, self._folder)
            if folder and tf.io.gfile.isdir(folder):
                files = {split: sorted(tf.io.gfile.glob(os.path.join(folder, f))) for split, f in self._files.items()}
                files = {split: paths for split, paths in files.items() if paths}
                choice = _Choice(self._build(files), f"the files in {folder} ({', '.join(files) or 'no split'})")
            else:
                # TFDS itself reads the variable only when it is imported.
                source = seqio.TfdsDataSource(self._tfds_name, tfds_folder, self._tfds_splits)
                location_name = tfds_folder or "TFDS's default folder"
                choice = _Choice(source, f"TFDS {self._tfds_name} in {location_name}")
            logging.info("%s: reading %s", self._tfds_name.split(":")[0], choice.origin)
            self._choices[location] = choice
        return self._choices[location]

    def describe(self) -> str:
        """Return a description of the source: the folder with its splits, or the TFDS name and folder."""
        return self._choice().origin

    def __str__(self) -> str:
        return f"CorpusSource({self._folder} or TFDS {self._tfds_name})"

    @property
    def splits(self) -> Sequence[str]:
        return tuple(self._choice().source.splits)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return self._choice().source.supports_arbitrary_sharding

    def _source(self, split: str) -> seqio.DataSource:
        choice = self._choice()
        if split not in choice.source.splits:
            hint = f"; its file would be {self._files[split]}" if split in self._files else ""
            raise UserError(f"no split {split!r} in {choice.origin}{hint}")
        return choice.source

    def list_shards(self, split: str) -> Sequence[str]:
        with self._explained():
            return self._source(split).list_shards(split)

    def num_input_examples(self, split: str) -> int | None:
        with self._explained():
            return self._source(split).num_input_examples(split)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        num_epochs: int | None = 1,
        **unused,
    ) -> tf.data.Dataset:
        with self._explained():
            source, settings = self._source(split), {"shuffle": shuffle, "seed": seed, "shard_info": shard_info}
            if isinstance(source, seqio.TfdsDataSource):
                dataset = source.get_dataset(split, **settings)
                return dataset if num_epochs == 1 else dataset.repeat(num_epochs)
            return source.get_dataset(split, **settings, num_epochs=num_epochs)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn TFDS's errors for missing data into a MissingFileError with instructions."""
        try:
            yield
        except Exception as error:
            if not isinstance(self._choice().source, seqio.TfdsDataSource):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise MissingFileError(
                f"TFDS could not read {self._tfds_name}: {reason}. "
                f"Prepare it (tfds build) and set TFDS_DATA_DIR, or put the corpus's official files in "
                f"${readers.DATA_DIR_VARIABLE}/{self._folder}/ ({', '.join(self._files.values())})"
            ) from error


class _Repeated(seqio.DataSource):
    """A source of this module with `num_epochs` epochs; SeqIO's tasks would repeat a single epoch."""

    def __init__(self, source: seqio.DataSource, num_epochs: int | None):
        super().__init__(splits=source.splits, caching_permitted=source.caching_permitted)
        self._source = source
        self.num_epochs = num_epochs

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return self._source.supports_arbitrary_sharding

    def list_shards(self, split: str) -> Sequence[str]:
        return self._source.list_shards(split)

    def num_input_examples(self, split: str) -> int | None:
        return self._source.num_input_examples(split)

    def get_dataset(self, split: str = "train", **settings) -> tf.data.Dataset:
        return self._source.get_dataset(split, **settings, num_epochs=self.num_epochs)


class _CachedSource(_FilesSource, dataset_providers._CachedDataSource):
    """SeqIO's source of an offline cache, with the epochs of `_passes`; token features are parsed in blocks."""

    def __init__(self, folder: str, split: str):
        dataset_providers._CachedDataSource.__init__(self, folder, split)
        with tf.io.gfile.GFile(seqio.get_cached_info_path(folder, split)) as file:
            features = json.load(file)["features"]
        self._tokens = sorted(features)
        self._in_blocks = all(feature == {"shape": [None], "dtype": "int32"} for feature in features.values())
        if self._in_blocks:
            self._reader = tf.data.TFRecordDataset

    def get_dataset(self, split: str = "train", **settings) -> tf.data.Dataset:
        dataset = super().get_dataset(split, **settings)
        if not self._in_blocks:
            return dataset
        description = {name: tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int64) for name in self._tokens}

        def parse(records: tf.Tensor) -> dict[str, Any]:
            return {k: tf.cast(v, tf.int32) for k, v in tf.io.parse_example(records, description).items()}

        return blocks.examples(dataset.batch(blocks.SIZE).map(parse, tf.data.AUTOTUNE))


class CorpusTask(seqio.Task):
    """A task that may have no splits (MNLI matched without dev_matched.tsv), which evaluators then skip.

    Its source or offline cache does the repetition (see `_passes`). Sources in memory bypass SeqIO's memory cache,
    which would fix the order of the first epoch for all others and be saved in each checkpoint.
    """

    @property
    def splits(self) -> Sequence[str]:
        return self.source.splits

    def get_dataset(
        self, sequence_length=None, split: str = "train", use_cached: bool = False, **settings
    ) -> tf.data.Dataset:
        if not use_cached and self.source.supports_arbitrary_sharding:  # true of MemorySource alone
            settings["try_in_mem_cache"] = False
        task = self
        if settings.get("num_epochs", 1) != 1:
            task = copy.copy(self)
            task._source = _Repeated(self.source, settings.pop("num_epochs"))  # pyright: ignore[reportAttributeAccessIssue]
            settings["try_in_mem_cache"] = False
        return super(CorpusTask, task).get_dataset(sequence_length, split, use_cached, **settings)

    def _get_cached_source(self, split: str, file_shuffle_buffer_size: int | None = None) -> seqio.DataSource:
        source = _CachedSource(cache.check(self, split), split)
        return _Repeated(source, self.source.num_epochs) if isinstance(self.source, _Repeated) else source


def describe(task_or_mixture: seqio.Task | seqio.Mixture) -> dict[str, str]:
    """Return task name -> description of its source, for each task with a CorpusSource."""
    members = task_or_mixture.tasks if isinstance(task_or_mixture, seqio.Mixture) else [task_or_mixture]
    return {task.name: task.source.describe() for task in members if isinstance(task.source, CorpusSource)}
