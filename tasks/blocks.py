"""Datasets of examples that are made in blocks, because a TensorFlow call per example would dominate the time.

A preprocessor that works on blocks returns `examples(blocks)`, a dataset of single examples that remembers its blocks.
The next such preprocessor continues with these blocks (`in_blocks`), so nothing is unbatched and batched between them:
tf.data runs only what is read. Any other dataset is batched first.

A block is a dictionary from feature to int32 RaggedTensor [n, (length)], or of texts to string [n]. Must not import:
SeqIO, tasks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.data.ops import map_op  # pyright: ignore[reportMissingImports]

SIZE = 128  # examples processed at once; also the number of documents that t5 concatenates


def inline_map(dataset: tf.data.Dataset, fn: Callable) -> Any:
    """Map a small function in the thread that asks for the example, at a seventh of the time of `Dataset.map`.

    The public method passes each example to a pool of threads. It has no argument for this.
    """
    return map_op._MapDataset(dataset, fn, use_inter_op_parallelism=False)  # pyright: ignore[reportReturnType]


def examples(blocks: tf.data.Dataset) -> tf.data.Dataset:
    """Return the examples of blocks, as plain tensors; `in_blocks` of it gives the blocks."""
    rows: Any = blocks.flat_map(tf.data.Dataset.from_tensor_slices)
    if any(isinstance(spec, tf.RaggedTensorSpec) for spec in rows.element_spec.values()):
        rows = inline_map(rows, lambda x: {name: tf.ensure_shape(tokens, [None]) for name, tokens in x.items()})
    rows.blocks = blocks  # pyright: ignore[reportAttributeAccessIssue]
    return rows


def remembered(dataset: tf.data.Dataset) -> tf.data.Dataset | None:
    """Return the blocks of any size that a dataset's examples were made from, or None."""
    return getattr(dataset, "blocks", None)


def map_alike(dataset: tf.data.Dataset, fn: Callable) -> tf.data.Dataset:
    """Map a function that takes an example and a block of them alike."""
    blocks = remembered(dataset)
    return inline_map(dataset, fn) if blocks is None else examples(blocks.map(fn))


def in_blocks(dataset: tf.data.Dataset, features: Sequence[str]) -> tf.data.Dataset:
    """Return the `features` of all examples in blocks of `SIZE`; only the last block may be smaller."""
    blocks = remembered(dataset)
    if blocks is None:
        rows = dataset.map(lambda x: {name: tf.cast(x[name], tf.int32) for name in features})
        ragged = tf.RaggedTensor.from_tensor  # pyright: ignore[reportAttributeAccessIssue]
        return rows.padded_batch(SIZE).map(lambda x: {name: ragged(x[name], padding=0) for name in features})
    return _regroup(blocks.map(lambda x: {name: x[name] for name in features}))


def _regroup(blocks: tf.data.Dataset) -> tf.data.Dataset:
    """Regroup blocks of any size into blocks of `SIZE`. The incomplete block is part of the saved position."""
    spec: Any = blocks.element_spec
    names, make = list(spec), tf.RaggedTensor.from_row_lengths  # pyright: ignore[reportAttributeAccessIssue]

    def flat(block: dict[str, tf.RaggedTensor], is_end: bool) -> tuple[Any, bool]:
        return {name: (block[name].values, block[name].row_lengths()) for name in names}, is_end

    nothing = {name: (tf.zeros([0], tf.int32), tf.zeros([0], tf.int64)) for name in names}
    parts = blocks.map(lambda x: flat(x, False)).concatenate(tf.data.Dataset.from_tensors((nothing, True)))

    def step(rest: Any, part: Any) -> Any:
        block, is_end = part
        block = {k: [tf.concat(pair, 0) for pair in zip(rest[k], block[k], strict=True)] for k in names}
        count = tf.size(block[names[0]][1])
        whole = tf.where(is_end, count, count - count % SIZE)
        ends = {k: tf.reduce_sum(sizes[:whole]) for k, (_, sizes) in block.items()}
        kept = {k: (values[ends[k] :], sizes[whole:]) for k, (values, sizes) in block.items()}
        return kept, {k: make(values[: ends[k]], sizes[:whole], validate=False) for k, (values, sizes) in block.items()}  # pyright: ignore

    def cut(block: dict[str, tf.RaggedTensor]) -> tf.data.Dataset:
        starts = tf.data.Dataset.range(0, block[names[0]].nrows(), SIZE)
        return starts.map(lambda i: {k: rows[i : i + SIZE] for k, rows in block.items()})

    return parts.scan(nothing, step).flat_map(cut)  # pyright: ignore[reportArgumentType]


def numpy_map(
    blocks: tf.data.Dataset, fn: Callable[..., list[list[np.ndarray]]], outputs: Sequence[str]
) -> tf.data.Dataset:
    """Call `fn` on (block, further tensors): with a list of int32 arrays for each feature, and the further arrays.

    `fn` returns, for each name in `outputs`, a list of int32 arrays; all lists have the same length. These become the
    new blocks.
    """
    spec: Any = blocks.element_spec
    names = list(spec[0])

    def flat(*arrays: np.ndarray) -> list[np.ndarray]:
        columns = [rows(*arrays[2 * i : 2 * i + 2]) for i in range(len(names))]
        results = []
        for column in fn(*columns, *arrays[2 * len(names) :]):
            results.append(np.concatenate([*column, np.zeros(0, np.int32)], dtype=np.int32))
            results.append(np.array([len(x) for x in column], np.int64))
        return results

    def call(block: dict[str, tf.RaggedTensor], *further: tf.Tensor) -> dict[str, tf.RaggedTensor]:
        arguments = [part for name in names for part in (block[name].values, block[name].row_lengths())]
        arrays = tf.numpy_function(flat, [*arguments, *further], [tf.int32, tf.int64] * len(outputs), stateful=False)
        return {name: ragged(*arrays[2 * i : 2 * i + 2]) for i, name in enumerate(outputs)}

    return blocks.map(call, num_parallel_calls=tf.data.AUTOTUNE)


def rows(values: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Cut concatenated rows apart."""
    ends = np.cumsum(sizes).tolist()
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def ragged(values: tf.Tensor, sizes: tf.Tensor) -> tf.RaggedTensor:
    """Make a ragged tensor of the values and row lengths that a numpy function returns."""
    values, sizes = tf.ensure_shape(values, [None]), tf.ensure_shape(sizes, [None])
    return tf.RaggedTensor.from_row_lengths(values, sizes, validate=False)  # pyright: ignore
