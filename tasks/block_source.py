"""A SeqIO source that reads a corpus in Python, block by block, when the block's turn comes.

For corpora that are too large for `data_sources.MemorySource` and whose examples are not single lines: pairs of lines
of two files (WMT), questions with documents in files of their own (TriviaQA). The position of a dataset is that of its
blocks, so it can be saved as with the other sources. Must not import: corpora, mixtures, models.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import seqio
import tensorflow as tf

from tasks import data_sources
from tasks.errors import UserError

Row = Mapping[str, str | Sequence[str]]


class Index(Protocol):
    """The blocks of a split: how many, what is in each, and how many examples all have."""

    size: int
    examples: int

    def read(self, block: int) -> list[Row]: ...


class BlockSource(seqio.DataSource):
    """A source whose blocks are shuffled anew in each epoch, and shared among hosts block by block.

    Args:
      paths: split name -> files; only splits whose files exist.
      index: (files, split) -> their blocks; called once for each split.
      features: name of each feature -> str, or list for a list of texts. "answer/aliases" is `aliases` in `answer`.

    If reading raises BadRow, the iterator raises tf.errors.InvalidArgumentError with its message.
    """

    def __init__(
        self,
        paths: Mapping[str, list[str]],
        index: Callable[[list[str], str], Index],
        features: Mapping[str, type],
    ):
        super().__init__(splits=paths.keys())
        self._paths = dict(paths)
        self._make_index = index
        self._features = dict(features)
        self._indices: dict[str, Index] = {}

    def _index(self, split: str) -> Index:
        if split not in self._indices:
            index = self._make_index(self._paths[split], split)
            if not index.examples:
                raise UserError(f"no examples in {', '.join(self._paths[split])}")
            self._indices[split] = index
        return self._indices[split]

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return self._paths[split]

    def num_input_examples(self, split: str) -> int:
        return self._index(split).examples

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        num_epochs: int | None = 1,
        **unused,
    ) -> tf.data.Dataset:
        index = self._index(split)
        name = f"{', '.join(self._paths[split])}: {index.size} blocks"
        shard = data_sources._shard(range(index.size), shard_info, name)
        types = [
            dtype for kind in self._features.values() for dtype in [tf.string] + [tf.int64] * (kind is list)
        ]  # the values, and for lists their lengths

        def flat(block: np.integer) -> list[np.ndarray]:
            rows = index.read(int(block))
            arrays = []
            for feature, kind in self._features.items():
                values: list[Any] = [row[feature] for row in rows]
                texts = [text for value in values for text in value] if kind is list else values
                arrays.append(data_sources.texts_column(texts))
                if kind is list:
                    arrays.append(np.array([len(value) for value in values], np.int64))
            return arrays

        def read(i: tf.Tensor) -> Any:
            arrays = iter(tf.numpy_function(flat, [i * shard.step + shard.start], types, stateful=False))
            columns = {}
            for feature, kind in self._features.items():
                column = tf.ensure_shape(next(arrays), [None])
                if kind is list:
                    sizes = tf.ensure_shape(next(arrays), [None])
                    column = tf.RaggedTensor.from_row_lengths(column, sizes, validate=False)  # pyright: ignore[reportAttributeAccessIssue]
                columns[feature] = column
            return columns

        def one_pass(key: tf.Tensor) -> tf.data.Dataset:
            size = len(shard)
            blocks = data_sources._permutation(size, key) if shuffle else tf.data.Dataset.range(size)
            return blocks.map(read, num_parallel_calls=tf.data.AUTOTUNE).flat_map(tf.data.Dataset.from_tensor_slices)

        return data_sources._passes(one_pass, seed, num_epochs).map(self._nested)

    def _nested(self, row: Mapping[str, tf.Tensor]) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for feature, kind in self._features.items():
            *outer, name = feature.split("/")
            place = nested
            for part in outer:
                place = place.setdefault(part, {})
            place[name] = tf.ensure_shape(row[feature], [None] if kind is list else [])
        return nested
