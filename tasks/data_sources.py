"""Where raw examples come from: a corpus's official files when they are there, otherwise TFDS. Decided at first use.

Three SeqIO data sources and a task class:

  MemorySource   files parsed once in Python into tensors; each pass is a whole, fresh shuffle (GLUE, SQuAD)
  LinesSource    one example a line, streamed from many files (C4)
  CorpusSource   one of the two for a folder under $T5X_LITE_DATA_DIR, or TFDS; looks at neither until it is used
  CorpusTask     a seqio.Task that may lack every split: a mixture passes over what a partial copy lacks

The position in each can be saved with the tf.data iterator (`tf.train.Checkpoint(iterator)`): nothing that draws or
reads keeps Python state. Must not know: text formats of tasks, vocabularies, mixtures.
"""

import contextlib
import copy
import dataclasses
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging
from seqio import dataset_providers

from tasks import cache, readers
from tasks.errors import MissingFileError, UserError

# A column holds one value per example: an array, or a ragged tensor where an example holds a list; nested as the
# features are.
Columns = dict[str, Any]
_LINES_PER_CALL = 64  # lines handed to Python at once: 3 times the speed of one at a time


class MemorySource(seqio.DataSource):
    """Examples parsed in Python into columns, once for each dataset.

    Args:
      paths: split name to the file (or files) that hold it; only splits whose files exist.
      read: gives a split's columns, all of one length, from its files. Bad rows raise ValueError here, at once.
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
        mine = _share(range(size), shard_info, f"{', '.join(self._paths[split])}: {size} examples")

        def example(i: tf.Tensor) -> dict:
            return tf.nest.map_structure(lambda column: column[i * mine.step + mine.start], columns)

        def indices(key: tf.Tensor) -> tf.data.Dataset:
            return _permutation(len(mine), key) if shuffle else tf.data.Dataset.range(len(mine))

        return _passes(indices, seed, num_epochs).map(example, num_parallel_calls=tf.data.AUTOTUNE)


def _as_tensor(column: np.ndarray | tf.RaggedTensor) -> tf.Tensor | tf.RaggedTensor:
    return column if isinstance(column, tf.RaggedTensor) else tf.constant(column)


def _share(items: Any, shard_info: seqio.ShardInfo | None, named: str) -> Any:
    """This host's part of a sequence: every n-th item, whatever the seeds of the other hosts."""
    shards, shard = (shard_info.num_shards, shard_info.index) if shard_info else (1, 0)
    mine = items[shard::shards]
    if not mine:
        raise UserError(f"{named} cannot be shared among {shards} hosts")
    return mine


def _passes(
    one_pass: Callable[[tf.Tensor], tf.data.Dataset], seed: int | None, num_epochs: int | None
) -> tf.data.Dataset:
    """`one_pass(key)` for each of `num_epochs` passes (None: without end), with another key each time.

    The key is a function of the seed and the number of the pass. A random stream that `repeat` starts anew would not
    do: tf.data drops its state as soon as a pass has been read ahead to its end, and a position saved then is wrong.
    """
    base = tf.constant([0, secrets.randbits(31) if seed is None else seed], tf.int32)

    def numbered(number: tf.Tensor) -> tf.data.Dataset:
        return one_pass(tf.random.fold_in(base, tf.cast(number, tf.int32)))  # pyright: ignore[reportArgumentType]

    return tf.data.Dataset.range(2**31 if num_epochs is None else num_epochs).flat_map(numbered)


def _permutation(size: int, key: tf.Tensor) -> tf.data.Dataset:
    """0..size-1 in the order that the key says, computed index by index.

    `Dataset.shuffle(size)` puts its whole buffer in each checkpoint: 80 MB and 7 s to save for MNLI's 400,000 rows.
    """

    def permuted(i: tf.Tensor) -> tf.Tensor:
        shuffle_index = tf.random.experimental.index_shuffle  # pyright: ignore[reportAttributeAccessIssue]
        return shuffle_index(i, seed=tf.bitcast(key, tf.uint32), max_index=size - 1)

    return tf.data.Dataset.range(size).map(permuted)


class _FilesSource(seqio.FileDataSource):
    """SeqIO's way of reading a split's files, sixteen at a time; its passes are ours."""

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
        mine = _share(files, shard_info, f"{split} of {self}: {len(files)} files")

        def read(key: tf.Tensor) -> tf.data.Dataset:
            paths = seqio.stateless_shuffle(tf.constant(mine), key) if shuffle else tf.constant(mine)
            paths = tf.data.Dataset.from_tensor_slices(paths)
            return paths.interleave(self._reader, cycle_length=16, block_length=16, num_parallel_calls=tf.data.AUTOTUNE)

        return _passes(read, seed, num_epochs)


class LinesSource(_FilesSource):
    """Streams examples from files that hold one example a line, plain or .gz, file by file as SeqIO does.

    Args:
      files: split name to file patterns.
      parse: (path, line number from 1, line as text) to one string for each name in `features`, or None for a blank
        line that need not hold an example.
      features: the names of the strings that `parse` gives.

    A line that `parse` refuses, text that is not UTF-8 and a .gz that ends early stop the iterator with
    tf.errors.InvalidArgumentError naming file and line, unless `readers.set_bad_rows` has them skipped; their number is
    logged at the end of the file. (tf.data alone takes a truncated .gz for a short one.)
    """

    def __init__(
        self,
        files: Mapping[str, list[str]],
        parse: Callable[[str, int, str], Sequence[str] | None],
        features: Sequence[str],
    ):
        self._parse = parse
        self._features = tuple(features)
        self._skipped: dict[str, readers.Skipped] = {}  # of the files being read; for the log alone
        super().__init__(read_file_fn=self._read_lines, split_to_filepattern=files)

    def _read_lines(self, path: tf.Tensor) -> tf.data.Dataset:
        packed = tf.strings.regex_full_match(path, r".*\.gz")
        batches = tf.data.TextLineDataset(path, compression_type=tf.where(packed, "GZIP", "")).batch(_LINES_PER_CALL)
        end = tf.data.Dataset.from_tensors(tf.zeros([0], tf.string))  # an empty batch: the file is read to its end
        batches = batches.concatenate(end).scan(np.zeros(2, np.int64), _count_lines_and_bytes)

        def parse(seen, batch):
            types = [tf.string] * len(self._features)
            values = tf.numpy_function(self._parse_batch, [path, seen, batch], types, stateful=False)
            return {k: tf.ensure_shape(v, [None]) for k, v in zip(self._features, values, strict=True)}

        return batches.map(parse).unbatch()

    def _parse_batch(self, path: bytes, seen: np.ndarray, batch: np.ndarray) -> list[np.ndarray]:
        name, lines_before, bytes_before = path.decode(), int(seen[0]), int(seen[1])
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


def _count_lines_and_bytes(seen: tf.Tensor, batch: tf.Tensor) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
    """Lines and bytes of the file up to this batch beside the batch, and up to its end as the next state."""
    size = tf.stack([tf.size(batch, tf.int64), tf.reduce_sum(tf.cast(tf.strings.length(batch) + 1, tf.int64))])
    return seen + size, (seen, batch)


@dataclasses.dataclass(frozen=True)
class _Choice:
    source: seqio.DataSource
    origin: str  # for the log: what is read


class CorpusSource(seqio.DataSource):
    """A corpus's official files under $T5X_LITE_DATA_DIR when its folder is there, otherwise TFDS.

    Which of the two is decided when the source is first used (and again when a variable changes), and logged. With
    the folder there, its splits are those whose files are; a missing split is missing, never taken from TFDS.

    Args:
      folder: the corpus's folder under the data folder, such as "glue/CoLA".
      files: split name to file pattern in that folder.
      build: makes the source that reads the files found, as split name to paths.
      tfds_name: the same corpus in TFDS, with its version.
      tfds_splits: the splits that TFDS has, said here so that asking for them needs no TFDS data.
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
        root, tfds_folder = place = readers.data_dir(), os.environ.get("TFDS_DATA_DIR")
        if place not in self._choices:
            folder = root and os.path.join(root, self._folder)
            if folder and tf.io.gfile.isdir(folder):
                found = {split: sorted(tf.io.gfile.glob(os.path.join(folder, f))) for split, f in self._files.items()}
                found = {split: paths for split, paths in found.items() if paths}
                choice = _Choice(self._build(found), f"the files in {folder} ({', '.join(found) or 'no split'})")
            else:
                # TFDS itself would take the variable's value at the time when it was imported.
                source = seqio.TfdsDataSource(self._tfds_name, tfds_folder, self._tfds_splits)
                where = tfds_folder or "TFDS's own folder"
                choice = _Choice(source, f"TFDS {self._tfds_name} in {where}")
            logging.info("%s: reading %s", self._tfds_name.split(":")[0], choice.origin)
            self._choices[place] = choice
        return self._choices[place]

    def describe(self) -> str:
        """What is read, for a person: the folder with its splits, or the TFDS name and place."""
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
            wanted = f"; it would be {self._files[split]}" if split in self._files else ""
            raise UserError(f"no split {split!r} in {choice.origin}{wanted}")
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
        """Adds what to do to the many ways in which TFDS says that its data is not there."""
        try:
            yield
        except Exception as error:
            if not isinstance(self._choice().source, seqio.TfdsDataSource):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise MissingFileError(
                f"TFDS could not give {self._tfds_name}: {reason}. "
                f"Prepare it (tfds build) and point TFDS_DATA_DIR at it, or put the corpus's official files in "
                f"${readers.DATA_DIR_VARIABLE}/{self._folder}/ ({', '.join(self._files.values())})"
            ) from error


class _Repeated(seqio.DataSource):
    """A source of this module, gone through several times; SeqIO's tasks ask theirs for one pass and repeat it."""

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
    """SeqIO's reader of an offline cache."""

    def __init__(self, folder: str, split: str):
        dataset_providers._CachedDataSource.__init__(self, folder, split)


class CorpusTask(seqio.Task):
    """A task whose files may hold none of its splits (MNLI's without dev_matched.tsv): evaluators then skip it.

    Its source or offline cache repeats itself (see `_passes`). What the source holds in memory does not go through
    SeqIO's memory cache as well: that would freeze the order of the first pass for all others, and be written into each
    saved position.
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
    """Task name to what its source reads, for each task whose source can say."""
    members = task_or_mixture.tasks if isinstance(task_or_mixture, seqio.Mixture) else [task_or_mixture]
    return {task.name: task.source.describe() for task in members if isinstance(task.source, CorpusSource)}
