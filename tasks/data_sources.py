"""SeqIO data sources: read a corpus from its official files if present, otherwise from TFDS.

  MemorySource   files parsed once in Python into tensors; each epoch is fully reshuffled (GLUE, SQuAD)
  RowsSource     rows of files of any format, streamed from many files (C4, a user's large files)
  CorpusSource   one of the two for a folder under $T5X_LITE_DATA_DIR, or TFDS; chosen on first use
  CorpusTask     a seqio.Task that may have no splits, so that a mixture works with a partial copy of the data

The position of a dataset can be saved with its tf.data iterator (`tf.train.Checkpoint(iterator)`): shuffling and
reading keep no Python state. Must not import: text formats of tasks, vocabularies, mixtures.
"""

import contextlib
import copy
import dataclasses
import itertools
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


def texts_column(texts: Sequence[str]) -> np.ndarray:
    """Return a column of texts."""
    return np.array([text.encode() for text in texts], object)


def lists_column(lists: Sequence[Sequence[str]]) -> tf.RaggedTensor:
    """Return a column of lists of texts."""
    values = texts_column([text for texts in lists for text in texts])
    splits = np.cumsum([0] + [len(texts) for texts in lists])
    return tf.RaggedTensor.from_row_splits(tf.constant(values, tf.string), splits)  # pyright: ignore[reportAttributeAccessIssue]


_ROWS_PER_CALL = 64  # of Python: 3 times as fast as one row per call
_ROWS_PER_TURN = 16  # of a file, when several are interleaved
_OPEN_READERS = 64


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

    _per_turn = _ROWS_PER_TURN

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
            return paths.interleave(
                self._reader,
                cycle_length=16,
                block_length=self._per_turn,
                num_parallel_calls=tf.data.AUTOTUNE,
            )

        return _passes(read, seed, num_epochs)


class RowsSource(_FilesSource):
    """A source that streams texts from files that Python reads. Its dataset remembers the blocks of `tasks.blocks`.

    Args:
      files: split name -> paths.
      read: (path, position) -> an iterator over the file's rows after that position, 0 being its beginning; each row
        comes with the position after it, and is one string per name in `features`. A function of the file alone. Errors
        reach the reader of the dataset as tf.errors.InvalidArgumentError.
      features: names of the strings.
    """

    _per_turn = 2  # of turns, see `_read_turns`

    def __init__(
        self,
        files: Mapping[str, list[str]],
        read: Callable[[str, int], Iterator[tuple[int, Sequence[str]]]],
        features: Sequence[str],
    ):
        self._read_file = read
        self._features = tuple(features)
        self._open: dict[tuple[str, int], Iterator[tuple[int, Sequence[str]]]] = {}  # by path and position
        super().__init__(read_file_fn=self._read_rows, split_to_filepattern=files)

    def list_shards(self, split: str) -> Sequence[str]:
        return list(self._split_to_filepattern[split])  # paths, not patterns

    def get_dataset(self, split: str = "train", **settings) -> tf.data.Dataset:
        def joined(turns: dict[str, tf.Tensor], sizes: tf.Tensor) -> dict[str, tf.Tensor]:
            is_row = tf.sequence_mask(sizes, _ROWS_PER_TURN)
            return {name: tf.boolean_mask(values, is_row) for name, values in turns.items()}

        turns = super().get_dataset(split, **settings)
        return blocks.examples(turns.batch(self._per_turn * blocks.SIZE // _ROWS_PER_TURN).map(joined))

    def _read_rows(self, path: tf.Tensor) -> tf.data.Dataset:
        """Return turns: 16 strings of each feature, and how many of them are rows."""

        def read(position: Any, _: tf.Tensor) -> tuple[Any, Any]:
            types = [tf.int64, tf.int64, *[tf.string] * len(self._features)]
            position, sizes, *columns = tf.numpy_function(self._read_turns, [path, position], types, stateful=False)
            columns = [tf.ensure_shape(column, [None, _ROWS_PER_TURN]) for column in columns]
            return tf.ensure_shape(position, []), (
                dict(zip(self._features, columns, strict=True)),
                tf.ensure_shape(sizes, [None]),
            )

        turns = tf.data.Dataset.range(2**62).scan(np.int64(0), read)
        return turns.take_while(lambda _, sizes: tf.size(sizes) > 0).unbatch()  # pyright: ignore[reportArgumentType]

    def _read_turns(self, path: bytes, position: np.int64) -> list[Any]:
        """Return the position after some turns, their sizes, and their columns [n, 16]; n is 0 at the end of the file.

        An empty turn follows each whole one, and the files take two at a time: so the end of a file comes in the turn
        of its last rows, as when single rows are interleaved.
        """
        name, start = path.decode(), int(position)
        rows = self._open.pop((name, start), None) or self._read_file(name, start)
        block = list(itertools.islice(rows, _ROWS_PER_CALL))
        if block:
            position = np.int64(block[-1][0])
            self._open[name, int(position)] = rows
            while len(self._open) > _OPEN_READERS:  # left behind by datasets that ended early
                self._open.pop(next(iter(self._open)), None)
        whole, rest = divmod(len(block), _ROWS_PER_TURN)
        sizes = np.array([_ROWS_PER_TURN, 0] * whole + [rest] * (rest > 0), np.int64)
        columns = np.full((len(self._features), len(sizes), _ROWS_PER_TURN), b"", object)
        for i, (_, row) in enumerate(block):
            columns[:, 2 * (i // _ROWS_PER_TURN), i % _ROWS_PER_TURN] = [text.encode() for text in row]
        return [position, sizes, *columns]


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
      tfds_splits: splits in TFDS, listed here so that `splits` needs no TFDS data; or a mapping from the splits to
        TFDS's, such as {"validation": "train[90%:]"}.
    """

    def __init__(
        self,
        folder: str,
        files: Mapping[str, str],
        build: Callable[[dict[str, list[str]]], seqio.DataSource],
        tfds_name: str,
        tfds_splits: Sequence[str] | Mapping[str, str],
    ):
        super().__init__(splits=files.keys())
        self._folder = folder
        self._files = dict(files)
        self._build = build
        self._tfds_name = tfds_name
        self._tfds_splits = dict(tfds_splits) if isinstance(tfds_splits, Mapping) else tuple(tfds_splits)
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
