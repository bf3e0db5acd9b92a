"""Build numpy batches of this host's rows from a SeqIO task or mixture, in an order determined by one seed.

`TrainBatches` is endless, packed and shuffled; it saves and restores its position. `EvalBatches` reads one task's split
in its fixed order and pads the last batch with rows of weight 0.

This module uses SeqIO and TensorFlow, which it keeps off the accelerators. It must not depend on JAX, the model (except
the size of its vocabulary) or gin. SeqIO's order is deterministic [seqio 0.0.20]: one seed goes to the source (order of
files), to `map_seed_manager` (the seeds of random preprocessors), to each task's shuffle buffer and to the sampling of
the mixture, so the order is a function of the seed, the number of hosts and the data. Exceptions are a preprocessor
that draws from `tf.random` without its own seed, and a FunctionDataSource whose function ignores `seed`.
"""

import difflib
import functools
import json
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data import fingerprint, packing
from t5x_lite.data.feature_converters import EncDecFeatureConverter
from t5x_lite.errors import UserError
from t5x_lite.model.feature_converter import FeatureConverter
from tasks import vocabulary as vocabularies
from tasks.blocks import inline_map
from tasks.vocabulary import sentencepieces

logger = logging.getLogger(__name__)

for _kind in ("GPU", "TPU"):  # before TensorFlow's first op, which would take all of the accelerator's memory
    if tf.config.get_visible_devices(_kind):
        tf.config.set_visible_devices([], _kind)


class _WithoutSeqioAdvice(logging.Filter):
    """Drops SeqIO's warnings about intended settings and about errors that this module reports itself."""

    advice = ("has no '%s' split, skipping", "'logger_cls' is empty", "Given sequence lengths ")

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(part in str(record.msg) for part in self.advice)


logging.getLogger("absl").addFilter(_WithoutSeqioAdvice())

Batch = dict[str, np.ndarray]
PACKED, UNPACKED = EncDecFeatureConverter(pack=True), EncDecFeatureConverter(pack=False)
Provider = seqio.Task | seqio.Mixture


# Checks before any data is read.


def find_provider(name: str) -> Provider:
    """Return the registered mixture or task, preferring the mixture. ValueError lists the nearest names."""
    if name in seqio.MixtureRegistry.names():
        return seqio.MixtureRegistry.get(name)
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    names = sorted({*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()})
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
    raise UserError(
        f"MIXTURE_OR_TASK_NAME={name!r} is not a registered task or mixture. Nearest of {len(names)}: "
        f"{', '.join(near)}. To register your own task, set MIXTURE_OR_TASK_MODULE to its module."
    )


def text_vocabulary(name: str) -> seqio.Vocabulary:
    """Return the vocabulary of the targets, or of the inputs if the targets are classes."""
    features = find_provider(name).output_features
    return features["targets" if "targets" in features else "inputs"].vocabulary


def keep_tokenizer(name: str, folder: Path) -> None:
    """Copy the tokenizer of a task or mixture into `folder`, where `t5x_lite.load` looks for it.

    The files are those of Hugging Face: the model, and what it does not say itself in tokenizer_config.json and
    added_tokens.json. Files of another tokenizer are removed.
    """
    vocabulary = vocabularies.resolved(text_vocabulary(name))
    config: dict[str, Any] | None = None
    files: dict[str, bytes | None] = dict.fromkeys(
        ("spiece.model", "tokenizer.model", "vocab.txt", "tokenizer_config.json", "added_tokens.json")
    )
    if isinstance(vocabulary, seqio.ByteVocabulary):
        config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": vocabulary.extra_ids}
        if vocabulary.extra_ids:
            config["extra_ids_descend"] = True  # SeqIO's order, not that of Hugging Face
    elif path := getattr(vocabulary, "sentencepiece_model_file", None):
        is_gemma = isinstance(vocabulary, sentencepieces.GemmaVocabulary)
        files["tokenizer.model" if is_gemma else "spiece.model"] = _content(path)
        described = isinstance(vocabulary, sentencepieces.SentencePieceVocabulary)
        if is_gemma:
            config = {"tokenizer_class": "GemmaTokenizer"}
        elif described or vocabulary.extra_ids != vocabularies.EXTRA_IDS:
            config = {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabulary.extra_ids}
        if described and vocabulary.added:
            files["added_tokens.json"] = json.dumps(vocabulary.added).encode() + b"\n"
    elif path := getattr(vocabulary, "file", None):
        files["vocab.txt"] = _content(path)
        beside = os.path.join(os.path.dirname(path), sentencepieces.CONFIG)  # whether WordPiece lower-cases
        if tf.io.gfile.exists(beside):
            files["tokenizer_config.json"] = _content(beside)
    if config is not None:
        files["tokenizer_config.json"] = json.dumps(config).encode() + b"\n"
    for file_name, content in files.items():  # all of which has been read: it may be the same file
        if content is None:
            (folder / file_name).unlink(missing_ok=True)
        else:
            temporary = folder / f"{file_name}.tmp"
            temporary.write_bytes(content)
            temporary.replace(folder / file_name)


def _content(path: str) -> bytes:
    with tf.io.gfile.GFile(path, "rb") as file:
        return file.read()


def tasks_with_split(name: str, split: str) -> list[str]:
    """Return the tasks of a mixture (or the task itself) that have `split`; the others are logged."""
    tasks = seqio.get_subtasks(find_provider(name))
    without = [t.name for t in tasks if split not in t.splits]
    if without:
        logger.info("Skipping tasks without the split %r: %s.", split, ", ".join(without))
    return [t.name for t in tasks if t.name not in without]


def check_vocabulary(name: str, model_vocab_size: int, features: Mapping[str, Any] | None = None) -> None:
    """Raise UserError if a feature of the task or mixture has ids beyond the model's embedding.

    Args:
      features: None: those of the task or mixture `name`.
    """
    features = find_provider(name).output_features if features is None else features
    for feature, spec in ((k, features[k]) for k in ("inputs", "targets") if k in features):
        size = spec.vocabulary.vocab_size
        padded = -(-size // 128) * 128
        if size > model_vocab_size:
            vocabulary = vocabularies.resolved(spec.vocabulary)
            which = getattr(vocabulary, "sentencepiece_model_file", type(vocabulary).__name__)
            raise UserError(
                f"{name} has ids up to {size - 1} in {feature!r} (vocabulary of {size}: {which}), the model has "
                f"vocab_size={model_vocab_size}. Give the model vocab_size={padded} or the task the "
                "vocabulary that the model was trained with (VOCABULARY)."
            )
        if padded < model_vocab_size:
            logger.warning(
                "%s uses %d ids in %r, the model has vocab_size=%d: check that it is the model's vocabulary.",
                name,
                size,
                feature,
                model_vocab_size,
            )


def check_lengths(name: str, lengths: Mapping[str, int], converter: FeatureConverter = PACKED) -> None:
    """Raise ValueError if TASK_FEATURE_LENGTHS, the features of the task or mixture and the model do not match."""
    features = find_provider(name).output_features
    if missing := [feature for feature in converter.features if feature not in features]:
        raise UserError(
            f"{name} has the features {', '.join(features)}; this model also needs {', '.join(missing)}: see "
            "models/*.gin for the tasks that fit each model."
        )
    converter.check_lengths(lengths)


def check_split(name: str, split: str) -> None:
    """Raise ValueError if no task of `name` has `split`, or all that have it are mixed at rate 0."""
    provider = find_provider(name)
    if split not in provider.splits:
        raise UserError(f"{name} has no split {split!r}, only {sorted(provider.splits)}.")
    if isinstance(provider, seqio.Mixture):
        rates = {t.name: provider.get_rate(t) for t in provider.tasks if split in t.splits}
        if not any(rate > 0 for rate in rates.values()):
            raise UserError(f"The mixture {name} has rate 0 for every task with the split {split!r}: {rates}.")


def _shard_size(batch_size: int, shards: int) -> int:
    if batch_size < 1 or shards < 1 or batch_size % shards:
        raise UserError(
            f"BATCH_SIZE={batch_size} must be a positive multiple of DATA_SHARDS={shards} (by default the number of "
            "hosts that read different rows)."
        )
    return batch_size // shards


# Training.


class TrainBatches:
    """An endless iterator over one host's rows of global batches, as int32 arrays with SeqIO's names.

    These are encoder_input_tokens [B, S], decoder_input_tokens, decoder_target_tokens, decoder_loss_weights [B, T] and,
    if packed, encoder_segment_ids, encoder_positions [B, S], decoder_segment_ids, decoder_positions [B, T]. 0 is
    padding.

    The data is split into `shards`, each of which supplies a fixed part of every batch's rows and has its own position.
    A host reads the shards that its rows come from, so the global batches are the same on any number of hosts.

    Args:
      name: task or mixture.
      lengths: {"inputs": S, "targets": T} in tokens; longer examples are truncated.
      batch_size: rows of the global batch, over all hosts.
      seed: determines the order, for a given number of shards.
      converter: the model's feature converter; one other than T5's makes other arrays.
      group_by_length: rows that are not packed come in batches of similar length (the composition of batches is random
        within a window of some batches), which are cut to one of eight widths.
      use_cached: read SeqIO's offline cache.
      rows: first and last + 1 of this host's rows in the global batch; None means all.
      shards: number of shards; None means one for each host with different rows or, after `restore`, the saved number.
      facts: what the data is made of (`fingerprint.data_facts`); saved with the position, and compared by `restore`.
      other_data: `restore` begins the data anew where these facts or settings differ, instead of raising UserError.
      agreed: returns the largest of all hosts' numbers, for the width of a batch.

    Attributes:
      began_anew: whether `restore` has found no position for this data, so that it begins at the start.
    """

    def __init__(
        self,
        name: str,
        lengths: Mapping[str, int],
        *,
        batch_size: int,
        seed: int,
        converter: FeatureConverter = PACKED,
        split: str = "train",
        shuffle: bool = True,
        use_cached: bool = False,
        rows: tuple[int, int] | None = None,
        shards: int | None = None,
        facts: Mapping[str, Any] | None = None,
        other_data: bool = False,
        group_by_length: bool = False,
        agreed: Callable[[int], int] = int,
    ):
        check_lengths(name, lengths, converter)
        check_split(name, split)
        self._name, self._agreed = name, agreed
        self._other_data, self.began_anew = other_data, False
        # All that the position depends on: it is valid only for the same stream.
        self._stream: dict[str, Any] = {
            "MIXTURE_OR_TASK_NAME": name,
            "tasks": [t.name for t in seqio.get_subtasks(find_provider(name))],
            "TASK_FEATURE_LENGTHS": dict(lengths),
            "BATCH_SIZE": batch_size,
            "seed": seed,
            "split": split,
            "PACK": converter.pack,
            "SHUFFLE_TRAIN_EXAMPLES": shuffle,
            "USE_CACHED_TASKS": use_cached,
            **({"GROUP_BY_LENGTH": True} if group_by_length else {}),
            **(facts or {}),
        }
        self._converter = converter
        self._range = rows or (0, batch_size)
        self._requested_shards = shards
        self._open(shards or max(batch_size // (self._range[1] - self._range[0]), 1))
        spec: Any = self._datasets[0].element_spec
        count = self._range[1] - self._range[0]
        self.shapes = {k: (count, *v.shape[1:]) for k, v in spec.items()}

    def _open(self, shards: int) -> None:
        """Create the datasets of the shards that hold this host's rows, and record each shard's rows in a batch."""
        self.shards = shards
        size = _shard_size(self._stream["BATCH_SIZE"], shards)
        first, last = self._range
        self._shard_rows = {
            i: (i * size, (i + 1) * size) for i in range(shards) if i * size < last and first < (i + 1) * size
        }
        self._datasets = [self._dataset(shard, size) for shard in self._shard_rows]
        self._iterators: list[Any] | None = None  # opened on first use, because that starts prefetching

    def _dataset(self, shard: int, size: int) -> tf.data.Dataset:
        lengths, options = self._stream["TASK_FEATURE_LENGTHS"], tf.data.Options()
        examples = find_provider(self._name).get_dataset(
            sequence_length=lengths,
            split=self._stream["split"],
            use_cached=self._stream["USE_CACHED_TASKS"],
            shuffle=self._stream["SHUFFLE_TRAIN_EXAMPLES"],
            seed=self._stream["seed"],
            shard_info=seqio.ShardInfo(shard, self.shards),
            num_epochs=None,
            try_in_mem_cache=False,  # the cache would be written into every saved position
            trim_output_features=False,  # _rows trims
        )
        options.deterministic = True
        # Keep sequential maps sequential: passing each example to another thread costs more than the map.
        options.experimental_optimization.map_parallelization = False
        dataset = _rows(self._name, examples, lengths, self._converter)
        if "GROUP_BY_LENGTH" in self._stream:
            dataset = _grouped(dataset, size, self._stream["seed"])
        else:
            dataset = dataset.rebatch(size, drop_remainder=True)
        return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)

    def __iter__(self) -> "TrainBatches":
        return self

    def _opened(self) -> list[Any]:
        if self._iterators is None:
            self._iterators = [iter(dataset) for dataset in self._datasets]
            weakref.finalize(self, _end, self._iterators, self._datasets)
        return self._iterators

    def __next__(self) -> Batch:
        parts, (first, last) = [], self._range
        for iterator, (start, end) in zip(self._opened(), self._shard_rows.values(), strict=True):
            batch = next(iterator, None)
            if batch is None:
                raise UserError(
                    f"{self._name} ran out of examples although it repeats: one of its tasks has none in the split "
                    f"{self._stream['split']!r}, or its preprocessors drop all. Look at it with --mode=inspect."
                )
            row_slice = slice(max(first - start, 0), min(last, end) - start)
            parts.append({k: v.numpy()[row_slice] for k, v in batch.items()})
        rows = parts[0] if len(parts) == 1 else {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        return packing.trimmed(rows, self._agreed(packing.level(rows))) if "GROUP_BY_LENGTH" in self._stream else rows

    def save(self, path: str) -> None:
        """Write the position after the last returned batch, with the prefetched batches, into `path`.

        Only the host with a shard's first row writes that shard; the files of all hosts end up in the same folder. If
        the position cannot be saved, because the data comes from Python code, only its description is written.
        """
        if self.position_problem is None:
            for iterator, (shard, (start, _)) in zip(self._opened(), self._shard_rows.items(), strict=True):
                if start >= self._range[0]:
                    tf.train.Checkpoint(iterator=iterator).write(os.path.join(path, f"shard_{shard}"))
        if self._range[0] == 0:
            Path(path, "stream.json").write_text(json.dumps({**self._stream, "DATA_SHARDS": self.shards}))

    @functools.cached_property
    def position_problem(self) -> str | None:
        """Why the position in this data cannot be saved, such as a generator or `tf.py_function`; None if it can."""
        try:
            for dataset in self._datasets:
                variant = tf.data.experimental.to_variant(dataset)
                tf.raw_ops.DatasetToGraphV2(input_dataset=variant, external_state_policy=2)  # 2: it must have none
        except tf.errors.OpError as error:
            stateful = re.search(r"(\w+) is stateful", str(error.message))
            return f"it uses {stateful[1]}, which TensorFlow cannot save" if stateful else str(error.message)
        return None

    def restore(self, path: str) -> None:
        """Restore the position saved in `path`, a folder or gs://..., by any number of hosts.

        If there is none, the data begins anew, which is logged.

        Raises:
          UserError: the position belongs to other data; the differing facts are listed.
        """
        description = os.path.join(path, "stream.json")
        if not tf.io.gfile.exists(description):
            return self._begin_anew(f"{path} holds no position in the data")
        saved = json.loads(tf.io.gfile.GFile(description).read())
        current = self._stream | ({"DATA_SHARDS": self._requested_shards} if self._requested_shards else {})
        if lines := fingerprint.differences(saved, json.loads(json.dumps(current))):
            listed = "\n  ".join(lines)
            if self._other_data:
                return self._begin_anew(f"this run has other data than the checkpoint:\n  {listed}\n")
            raise UserError(
                f"this MODEL_DIR holds a run on other data:\n  {listed}\nRestore these settings and files; or set "
                "RESUME_WITH_OTHER_DATA = True, which keeps parameters and optimizer and begins the data anew; or use "
                "a new MODEL_DIR with this checkpoint as INITIAL_CHECKPOINT_PATH."
            )
        shards = [os.path.join(path, f"shard_{shard}") for shard in range(saved["DATA_SHARDS"])]
        if not all(tf.io.gfile.exists(f"{shard}.index") for shard in shards):
            return self._begin_anew(f"{path} holds no position in the data")
        self._open(saved["DATA_SHARDS"])
        for iterator, shard in zip(self._opened(), self._shard_rows, strict=True):
            tf.train.Checkpoint(iterator=iterator).read(shards[shard]).assert_consumed()

    def _begin_anew(self, reason: str) -> None:
        self.began_anew = True
        logger.warning("The data begins anew, with its first examples: %s.", reason.rstrip())


def _end(iterators: Sequence[Any], datasets: Sequence[tf.data.Dataset]) -> None:
    """End iterators by an operation.

    Where Python drops the last reference, it holds its lock while TensorFlow waits for the functions that are being
    called to read ahead, and these wait for the lock.
    """
    for iterator, dataset in zip(iterators, datasets, strict=True):
        nothing = tf.data.experimental.to_variant(dataset.take(0))
        tf.raw_ops.MakeIterator(dataset=nothing, iterator=iterator._iterator_resource)


def _rows(
    name: str, examples: tf.data.Dataset, lengths: Mapping[str, int], converter: FeatureConverter
) -> tf.data.Dataset:
    """Convert examples to blocks of rows. As many examples are packed together as in SeqIO."""
    spec: Any = examples.element_spec
    try:
        widths = converter.widths(lengths, set(spec))
    except UserError as error:
        raise UserError(f"the examples of {name} {error}") from None
    cut = inline_map(examples, lambda x: {k: tf.cast(x[k][:n], converter.dtype(k)) for k, n in widths.items()})
    blocks = cut.padded_batch(converter.block(widths), converter.padded_to(widths))
    if type(converter).convert is FeatureConverter.convert:
        return blocks  # unchanged, without a Python call for each block
    empty = {k: np.zeros((1, width), converter.dtype(k)) for k, width in widths.items()}
    row = {k: (x.shape[1], x.dtype) for k, x in converter.convert(empty, widths).items()}

    def convert(*arrays: np.ndarray) -> list[np.ndarray]:
        return list(converter.convert(dict(zip(widths, arrays, strict=True)), widths).values())

    def rows(block: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        dtypes = [dtype for _, dtype in row.values()]
        arrays = tf.numpy_function(convert, [block[k] for k in widths], dtypes, stateful=False)
        return {k: tf.ensure_shape(x, [None, length]) for x, (k, (length, _)) in zip(arrays, row.items(), strict=True)}

    return blocks.map(rows, num_parallel_calls=tf.data.AUTOTUNE)


def _grouped(rows: tf.data.Dataset, size: int, seed: int) -> tf.data.Dataset:
    """Return batches of rows of similar length, from windows of rows; the same order for all shards."""
    spec: Any = rows.element_spec
    if "encoder_segment_ids" in spec or "decoder_segment_ids" in spec:
        raise UserError(
            "GROUP_BY_LENGTH is for rows of one example: packed rows are full. Set PACK = False, or leave it"
        )

    def order(index: Any, *arrays: np.ndarray) -> np.ndarray:
        return packing.grouped(dict(zip(spec, arrays, strict=True)), size, [seed, int(index)])

    def batches(index: tf.Tensor, window: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        rows_N = tf.numpy_function(order, [index, *window.values()], tf.int64, stateful=False)
        return {k: tf.reshape(tf.gather(x, rows_N), [packing.WINDOW, size, x.shape[1]]) for k, x in window.items()}

    windows = rows.rebatch(packing.WINDOW * size, drop_remainder=True).enumerate()
    grouped: Any = windows.map(batches, num_parallel_calls=tf.data.AUTOTUNE)
    return grouped.flat_map(tf.data.Dataset.from_tensor_slices)


# Evaluation.


class EvalBatches:
    """One task's split, in order, as batches of one host's rows. It can be iterated repeatedly.

    Every host reads the whole split and takes its rows of each batch, so all hosts have the same number of batches. The
    arrays are those of `TrainBatches`. Rows that pad the last batch are all 0, including their weights.

    Args:
      num_batches: maximum number of batches. If given, they are cached in memory for later evaluations.
      rows: this host's rows, as in `TrainBatches`.
    """

    def __init__(
        self,
        task_name: str,
        lengths: Mapping[str, int],
        *,
        batch_size: int,
        split: str = "validation",
        converter: FeatureConverter = UNPACKED,
        num_batches: int | None = None,
        seed: int = 0,
        use_cached: bool = False,
        rows: tuple[int, int] | None = None,
    ):
        check_lengths(task_name, lengths, converter)
        check_split(task_name, split)
        self._rows = slice(*(rows or (0, batch_size)))
        self._batch_size = batch_size
        self._cached: list[Batch] | None = None
        self._cache = num_batches is not None
        examples = find_provider(task_name).get_dataset(
            sequence_length=lengths, split=split, use_cached=use_cached, shuffle=False, num_epochs=1, seed=seed
        )
        dataset = _rows(task_name, examples, lengths, converter).rebatch(batch_size)
        self._dataset = dataset.take(-1 if num_batches is None else num_batches)

    def __iter__(self) -> Iterator[Batch]:
        if self._cache and self._cached is None:
            self._cached = list(self._read())
        return iter(self._cached) if self._cached is not None else self._read()

    def _read(self) -> Iterator[Batch]:
        batches: Any = self._dataset.prefetch(1).as_numpy_iterator()
        for batch in batches:
            yield {k: v[self._rows] for k, v in fill_up(batch, self._batch_size).items()}


def fill_up(batch: Mapping[str, np.ndarray], rows: int) -> Batch:
    """Pad `batch` with rows of 0 to `rows` rows."""
    return {k: np.pad(v, [(0, rows - len(v))] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}
