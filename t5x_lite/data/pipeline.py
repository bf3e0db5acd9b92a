"""From a SeqIO task or mixture to numpy batches of this host's share, in an order that one seed fixes.

`TrainBatches` is endless, packed and shuffled, and can save its position and go on from it. `EvalBatches` is one task's
split in its fixed order, its last batch filled up with rows of weight 0.

This module knows SeqIO and TensorFlow, which it keeps off the accelerators. It must not know JAX, the model (beyond the
size of its vocabulary) or gin. SeqIO is pinned down as follows [seqio 0.0.20]: one seed goes to the source (order of
files), to `map_seed_manager` (the seeds of random preprocessors), to each task's shuffle buffer and to the sampling of
the mixture, so the order is a function of the seed, the number of hosts and the data. A preprocessor that draws from
`tf.random` without a seed of its own, and a FunctionDataSource whose function ignores `seed`, stand outside of that.
"""

import difflib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data.feature_converters import EncDecFeatureConverter
from t5x_lite.errors import UserError
from t5x_lite.model.feature_converter import FeatureConverter
from tasks import vocabulary as vocabularies

logger = logging.getLogger(__name__)

for _kind in ("GPU", "TPU"):  # before TensorFlow's first op: it would take the whole accelerator's memory
    if tf.config.get_visible_devices(_kind):
        tf.config.set_visible_devices([], _kind)


class _WithoutSeqioAdvice(logging.Filter):
    """Drops warnings of SeqIO, made at every start, about what is meant here or said better here."""

    advice = ("has no '%s' split, skipping", "'logger_cls' is empty", "Given sequence lengths ")

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(part in str(record.msg) for part in self.advice)


logging.getLogger("absl").addFilter(_WithoutSeqioAdvice())

Batch = dict[str, np.ndarray]
PACKED, UNPACKED = EncDecFeatureConverter(pack=True), EncDecFeatureConverter(pack=False)
Provider = seqio.Task | seqio.Mixture


# What can be wrong with the data, said before any of it is read.


def find_provider(name: str) -> Provider:
    """The registered task or mixture (the mixture where both bear the name). ValueError names the nearest ones."""
    if name in seqio.MixtureRegistry.names():
        return seqio.MixtureRegistry.get(name)
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    known = sorted({*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()})
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
    raise UserError(
        f"MIXTURE_OR_TASK_NAME={name!r} is no registered task or mixture. Nearest of {len(known)}: {', '.join(near)}. "
        "A task of your own is registered by a module that MIXTURE_OR_TASK_MODULE names."
    )


def text_vocabulary(name: str) -> seqio.Vocabulary:
    """That of the targets, or of the inputs where the targets are classes."""
    features = find_provider(name).output_features
    return features["targets" if "targets" in features else "inputs"].vocabulary


def keep_tokenizer(name: str, folder: Path) -> None:
    """Puts the tokenizer's files of a task or mixture into `folder`, where `t5x_lite.load` looks for them."""
    vocabulary = vocabularies.resolved(text_vocabulary(name))
    kept = {"sentencepiece_model_file": "spiece.model", "file": "vocab.txt"}  # of SentencePiece; of WordPiece
    for attribute, as_name in kept.items():
        if path := getattr(vocabulary, attribute, None):
            tf.io.gfile.copy(path, str(folder / as_name), overwrite=True)
            beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")  # says a WordPiece tokenizer's case
            if attribute == "file" and tf.io.gfile.exists(beside):
                tf.io.gfile.copy(beside, str(folder / "tokenizer_config.json"), overwrite=True)


def tasks_with_split(name: str, split: str) -> list[str]:
    """The tasks of a mixture (or the task itself) that have `split`; the log says which are left out."""
    tasks = seqio.get_subtasks(find_provider(name))
    without = [t.name for t in tasks if split not in t.splits]
    if without:
        logger.info("Left out, for they have no split %r: %s.", split, ", ".join(without))
    return [t.name for t in tasks if t.name not in without]


def check_vocabulary(name: str, model_vocab_size: int) -> None:
    """Raises ValueError where a feature of the task or mixture has ids that the model's embedding has not."""
    features = find_provider(name).output_features
    for feature, spec in ((k, features[k]) for k in ("inputs", "targets") if k in features):
        size = spec.vocabulary.vocab_size
        padded = -(-size // 128) * 128
        if size > model_vocab_size:
            which = getattr(spec.vocabulary, "sentencepiece_model_file", type(spec.vocabulary).__name__)
            raise UserError(
                f"{name} writes ids up to {size - 1} in {feature!r} (vocabulary of {size}: {which}), the model has "
                f"vocab_size={model_vocab_size}. Give the model vocab_size={padded} or the task the "
                "vocabulary that the model was trained with (VOCABULARY)."
            )
        if padded < model_vocab_size:
            logger.warning(
                "%s uses %d ids in %r, the model has vocab_size=%d: is it the vocabulary that the model was made for?",
                *(name, size, feature, model_vocab_size),
            )


def check_lengths(name: str, lengths: Mapping[str, int], converter: FeatureConverter = PACKED) -> None:
    """Raises ValueError where TASK_FEATURE_LENGTHS, the features of the task or mixture and the model do not match."""
    features = find_provider(name).output_features
    if missing := [feature for feature in converter.features if feature not in features]:
        raise UserError(
            f"{name} has the features {', '.join(features)}; this model also needs {', '.join(missing)}: see "
            "models/*.gin for which tasks go with which model."
        )
    converter.check_lengths(lengths)


def check_split(name: str, split: str) -> None:
    """Raises ValueError where no task of `name` has `split`, or those that do are all mixed at rate 0."""
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
    """Endless iterator of one host's rows of global batches, int32 arrays named as by seqio.EncDecFeatureConverter.

    encoder_input_tokens [B, S], decoder_input_tokens, decoder_target_tokens, decoder_loss_weights [B, T] and, if
    packed, encoder_segment_ids, encoder_positions [B, S], decoder_segment_ids, decoder_positions [B, T]. 0 is padding.

    The data is cut into `shards`, each of which gives its share of every batch's rows and has a position of its own. A
    host reads the shards that its rows come from, so the same global batches come on any number of hosts.

    Args:
      name: task or mixture.
      lengths: {"inputs": S, "targets": T} in tokens; longer examples are cut.
      batch_size: of all hosts together.
      seed: fixes the order, for the same number of shards.
      converter: the model's; another than T5's makes other arrays.
      use_cached: read SeqIO's offline cache.
      rows: first and last + 1 of this host's rows in the global batch; None: all.
      shards: None: as many as there are hosts with other rows; after `restore`, as many as there were.
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
    ):
        check_lengths(name, lengths, converter)
        check_split(name, split)
        self._name = name
        # All that the position depends on: a position is only worth something to the same stream.
        self._stream = {
            "MIXTURE_OR_TASK_NAME": name,
            "tasks": [t.name for t in seqio.get_subtasks(find_provider(name))],
            "TASK_FEATURE_LENGTHS": dict(lengths),
            "BATCH_SIZE": batch_size,
            "seed": seed,
            "split": split,
            "PACK": converter.pack,
            "SHUFFLE_TRAIN_EXAMPLES": shuffle,
            "USE_CACHED_TASKS": use_cached,
        }
        self._converter = converter
        self._range = rows or (0, batch_size)
        self._asked = shards
        self._open(shards or max(batch_size // (self._range[1] - self._range[0]), 1))
        spec: Any = self._datasets[0].element_spec
        count = self._range[1] - self._range[0]
        self.shapes = {k: (count, *v.shape[1:]) for k, v in spec.items()}

    def _open(self, shards: int) -> None:
        """The datasets of the shards that this host's rows come from; of each, where its rows are in a batch."""
        self.shards = shards
        size = _shard_size(self._stream["BATCH_SIZE"], shards)
        first, last = self._range
        self._mine = {
            i: (i * size, (i + 1) * size) for i in range(shards) if i * size < last and first < (i + 1) * size
        }
        self._datasets = [self._dataset(shard, size) for shard in self._mine]
        self._iterators: list[Any] | None = None  # opened when first asked: opening starts to read ahead

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
            try_in_mem_cache=False,  # the cache would be written into every position saved
            trim_output_features=False,  # done below
        )
        options.deterministic = True
        # Maps that are meant to be sequential stay so: handing each example to another thread costs more than they do.
        options.experimental_optimization.map_parallelization = False
        dataset = _rows(self._name, examples, lengths, self._converter)
        return dataset.rebatch(size, drop_remainder=True).prefetch(tf.data.AUTOTUNE).with_options(options)

    def __iter__(self) -> "TrainBatches":
        return self

    def _opened(self) -> list[Any]:
        if self._iterators is None:
            self._iterators = [iter(dataset) for dataset in self._datasets]
        return self._iterators

    def __next__(self) -> Batch:
        parts, (first, last) = [], self._range
        for iterator, (start, end) in zip(self._opened(), self._mine.values(), strict=True):
            batch = next(iterator, None)
            if batch is None:
                raise UserError(
                    f"{self._name} ran out of examples although it repeats: a task of it has none in the split "
                    f"{self._stream['split']!r}, or its preprocessors leave none. Look at it with --mode=inspect."
                )
            wanted = slice(max(first - start, 0), min(last, end) - start)
            parts.append({k: v.numpy()[wanted] for k, v in batch.items()})
        return parts[0] if len(parts) == 1 else {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    def save(self, path: str) -> None:
        """Writes the position after the last batch handed out (what is prefetched is written with it) into `path`.

        Of each shard only the host with its first row writes; all of them write into the same folder in the end.
        """
        for iterator, (shard, (start, _)) in zip(self._opened(), self._mine.items(), strict=True):
            if start >= self._range[0]:
                tf.train.Checkpoint(iterator=iterator).write(os.path.join(path, f"shard_{shard}"))
        if self._range[0] == 0:
            Path(path, "stream.json").write_text(json.dumps({**self._stream, "DATA_SHARDS": self.shards}))

    def restore(self, path: str) -> None:
        """Goes to the position saved in `path`, a folder or gs://..., by as many hosts or any other number of them.

        Raises:
          ValueError: it is the position in another stream; the differing settings are listed.
        """
        saved = json.loads(tf.io.gfile.GFile(os.path.join(path, "stream.json")).read())
        asked = self._stream | ({"DATA_SHARDS": self._asked} if self._asked else {})
        differing = [f"{k}: was {saved.get(k)!r}, is {v!r}" for k, v in asked.items() if saved.get(k) != v]
        if differing:
            raise UserError(
                "The saved data position belongs to other data:\n  "
                + "\n  ".join(differing)
                + "\nSet these back, or begin a new MODEL_DIR with this checkpoint as INITIAL_CHECKPOINT_PATH."
            )
        self._open(saved["DATA_SHARDS"])
        for iterator, shard in zip(self._opened(), self._mine, strict=True):
            tf.train.Checkpoint(iterator=iterator).read(os.path.join(path, f"shard_{shard}")).assert_consumed()


def _rows(
    name: str, examples: tf.data.Dataset, lengths: Mapping[str, int], converter: FeatureConverter
) -> tf.data.Dataset:
    """Blocks of rows as the converter makes them. The number of examples packed together is SeqIO's."""
    spec: Any = examples.element_spec
    try:
        widths = converter.widths(lengths, set(spec))
    except UserError as error:
        raise UserError(f"the examples of {name} {error}") from None
    cut = examples.map(lambda x: {k: tf.cast(x[k][:width], converter.dtype(k)) for k, width in widths.items()})
    blocks = cut.padded_batch(converter.block(widths), converter.padded_to(widths))
    if type(converter).convert is FeatureConverter.convert:
        return blocks  # as they are, without a call of Python for each
    nothing = {k: np.zeros((1, width), converter.dtype(k)) for k, width in widths.items()}
    row = {k: (x.shape[1], x.dtype) for k, x in converter.convert(nothing, widths).items()}

    def convert(*arrays: np.ndarray) -> list[np.ndarray]:
        return list(converter.convert(dict(zip(widths, arrays, strict=True)), widths).values())

    def rows(block: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        dtypes = [dtype for _, dtype in row.values()]
        arrays = tf.numpy_function(convert, [block[k] for k in widths], dtypes, stateful=False)
        return {k: tf.ensure_shape(x, [None, length]) for x, (k, (length, _)) in zip(arrays, row.items(), strict=True)}

    return blocks.map(rows, num_parallel_calls=tf.data.AUTOTUNE)


# Evaluation.


class EvalBatches:
    """One task's split, in its order, as batches of one host; can be gone through again and again.

    Every host reads the whole split and takes its rows of each batch, so all hosts have the same number of batches.
    Arrays as in `TrainBatches`. Rows that only fill up the last batch are all 0, weights too.

    Args:
      num_batches: stop after so many; they are then kept in memory, for evaluation comes back to them.
      rows: of this host, as in `TrainBatches`.
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
        self._kept: list[Batch] | None = None
        self._keep = num_batches is not None
        examples = find_provider(task_name).get_dataset(
            sequence_length=lengths, split=split, use_cached=use_cached, shuffle=False, num_epochs=1, seed=seed
        )
        dataset = _rows(task_name, examples, lengths, converter).rebatch(batch_size)
        self._dataset = dataset.take(-1 if num_batches is None else num_batches)

    def __iter__(self) -> Iterator[Batch]:
        if self._keep and self._kept is None:
            self._kept = list(self._read())
        return iter(self._kept) if self._kept is not None else self._read()

    def _read(self) -> Iterator[Batch]:
        batches: Any = self._dataset.prefetch(1).as_numpy_iterator()
        for batch in batches:
            yield {k: v[self._rows] for k, v in fill_up(batch, self._batch_size).items()}


def fill_up(batch: Mapping[str, np.ndarray], rows: int) -> Batch:
    """`batch` with rows of 0 added to make `rows`."""
    return {k: np.pad(v, [(0, rows - len(v))] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}
