"""From a SeqIO task or mixture to numpy batches of this host's share, in an order that one seed fixes.

`TrainBatches` is endless, packed and shuffled, and can save its position and go on from it. `EvalBatches` is one task's
split in its fixed order, unpacked, its last batch filled up with rows of weight 0. `describe_batch` turns a batch back
into text.

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite import packing

logger = logging.getLogger(__name__)

# How a model's batch is laid out, and the features that it needs of a task. BERT's are those of tasks/bert.py.
Layout = Literal["encoder_decoder", "decoder", "encoder"]
FEATURES = {
    "encoder_decoder": ("inputs", "targets"),
    "decoder": ("targets",),
    "encoder": ("inputs", "targets", "segments", "random"),
}

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
    raise ValueError(
        f"MIXTURE_OR_TASK_NAME={name!r} is no registered task or mixture. Nearest of {len(known)}: {', '.join(near)}. "
        "A task of your own is registered by a module that MIXTURE_OR_TASK_MODULE names."
    )


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
            raise ValueError(
                f"{name} writes ids up to {size - 1} in {feature!r} (vocabulary of {size}: {which}), the model has "
                f"vocab_size={model_vocab_size}. Give the model vocab_size={padded} or the task the "
                "vocabulary that the model was trained with (VOCABULARY)."
            )
        if padded < model_vocab_size:
            logger.warning(
                "%s uses %d ids in %r, the model has vocab_size=%d: is it the vocabulary that the model was made for?",
                *(name, size, feature, model_vocab_size),
            )


def check_lengths(name: str, lengths: Mapping[str, int], layout: Layout = "encoder_decoder") -> None:
    """Raises ValueError where TASK_FEATURE_LENGTHS, the features of the task or mixture and the model do not match."""
    features = find_provider(name).output_features
    if missing := [feature for feature in FEATURES[layout] if feature not in features]:
        raise ValueError(
            f"{name} has the features {', '.join(features)}; a model of layout {layout!r} also needs "
            f"{', '.join(missing)}: see models/*.gin for which tasks go with which model."
        )
    needed, allowed = {
        "encoder_decoder": ({"inputs", "targets"}, {"inputs", "targets"}),
        "decoder": ({"targets"}, {"inputs", "targets"}),
        "encoder": ({"inputs"}, {"inputs"}),
    }[layout]
    if not needed <= set(lengths) <= allowed:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS={dict(lengths)} must give a length for {' and '.join(sorted(needed))} and nothing "
            f"else{' but inputs' if allowed - needed else ''}, such as "
            f"{ {feature: 512 if feature == 'inputs' else 114 for feature in sorted(needed)} }; {name} has the "
            f"features {', '.join(features)}."
        )
    if not all(isinstance(n, int) and n > 0 for n in lengths.values()):
        raise ValueError(f"TASK_FEATURE_LENGTHS={dict(lengths)}: lengths are whole numbers of tokens above 0.")


def check_split(name: str, split: str) -> None:
    """Raises ValueError where no task of `name` has `split`, or those that do are all mixed at rate 0."""
    provider = find_provider(name)
    if split not in provider.splits:
        raise ValueError(f"{name} has no split {split!r}, only {sorted(provider.splits)}.")
    if isinstance(provider, seqio.Mixture):
        rates = {t.name: provider.get_rate(t) for t in provider.tasks if split in t.splits}
        if not any(rate > 0 for rate in rates.values()):
            raise ValueError(f"The mixture {name} has rate 0 for every task with the split {split!r}: {rates}.")


def _host_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"BATCH_SIZE={batch_size} must be a positive multiple of the {process_count} hosts.")
    return batch_size // process_count


# Training.


class TrainBatches:
    """Endless iterator of one host's batches, int32 arrays named as by seqio.EncDecFeatureConverter.

    encoder_input_tokens [B, S], decoder_input_tokens, decoder_target_tokens, decoder_loss_weights [B, T] and, if
    packed, encoder_segment_ids, encoder_positions [B, S], decoder_segment_ids, decoder_positions [B, T], where B is
    batch_size / process_count. 0 is padding throughout.

    Args:
      name: task or mixture.
      lengths: {"inputs": S, "targets": T} in tokens; longer examples are cut.
      batch_size: of all hosts together.
      seed: fixes the order, on the same number of hosts.
      layout: of the model: "decoder" has inputs and targets in one row of length S + T, and no encoder's arrays but
        decoder_causal_attention; examples without inputs make rows of length T. "encoder" has the features of
        tasks/bert.py as they are, padded, one example a row.
      pack: several examples in one row.
      use_cached: read SeqIO's offline cache.
    """

    def __init__(
        self,
        name: str,
        lengths: Mapping[str, int],
        *,
        batch_size: int,
        seed: int,
        layout: Layout = "encoder_decoder",
        split: str = "train",
        pack: bool = True,
        shuffle: bool = True,
        use_cached: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        check_lengths(name, lengths, layout)
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
            "PACK": pack,
            "SHUFFLE_TRAIN_EXAMPLES": shuffle,
            "USE_CACHED_TASKS": use_cached,
            "process": [process_index, process_count],
        }
        examples = find_provider(name).get_dataset(
            sequence_length=lengths,
            split=split,
            use_cached=use_cached,
            shuffle=shuffle,
            seed=seed,
            shard_info=seqio.ShardInfo(process_index, process_count),
            num_epochs=None,
            try_in_mem_cache=False,  # the cache would be written into every position saved
            trim_output_features=False,  # done below
        )
        dataset = _rows(name, examples, lengths, layout, pack)
        options = tf.data.Options()
        options.deterministic = True
        # Maps that are meant to be sequential stay so: handing each example to another thread costs more than they do.
        options.experimental_optimization.map_parallelization = False
        dataset = dataset.rebatch(_host_batch_size(batch_size, process_count), drop_remainder=True)
        self._iterator = iter(dataset.prefetch(tf.data.AUTOTUNE).with_options(options))
        spec: Any = dataset.element_spec
        self.shapes = {k: tuple(v.shape) for k, v in spec.items()}

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"{self._name} ran out of examples although it repeats: a task of it has none in the split "
                f"{self._stream['split']!r}, or its preprocessors leave none. Look at it with --mode=inspect."
            ) from None
        return {k: v.numpy() for k, v in batch.items()}

    def save(self, path: str) -> None:
        """Writes the position after the last batch handed out (what is prefetched is written with it) into `path`."""
        tf.train.Checkpoint(iterator=self._iterator).write(os.path.join(path, "position"))
        Path(path, "stream.json").write_text(json.dumps(self._stream))

    def restore(self, path: str) -> None:
        """Goes to the position saved in `path`.

        Raises:
          ValueError: it is the position in another stream; the differing settings are listed.
        """
        saved = json.loads(Path(path, "stream.json").read_text())
        differing = [f"{k}: was {saved.get(k)!r}, is {v!r}" for k, v in self._stream.items() if saved.get(k) != v]
        if differing:
            raise ValueError(
                "The saved data position belongs to other data:\n  "
                + "\n  ".join(differing)
                + "\nSet these back, or begin a new MODEL_DIR with this checkpoint as INITIAL_CHECKPOINT_PATH."
            )
        tf.train.Checkpoint(iterator=self._iterator).read(os.path.join(path, "position")).assert_consumed()


def _rows(
    name: str, examples: tf.data.Dataset, lengths: Mapping[str, int], layout: Layout, pack: bool
) -> tf.data.Dataset:
    """Blocks of rows as `packing` makes them. The number of examples packed together is SeqIO's."""
    spec: Any = examples.element_spec
    if layout == "encoder":
        widths = dict.fromkeys(FEATURES["encoder"], lengths["inputs"]) | {"random": 1}
        cut = examples.map(lambda x: {k: tf.cast(x[k][:width], tf.int32) for k, width in widths.items()})
        return cut.padded_batch(lengths["inputs"], widths)
    if "inputs" not in spec and layout != "decoder":
        raise ValueError(
            f"the examples of {name} have no inputs: they are for a decoder alone, such as models/decoder_only.gin"
        )
    features = {k: lengths[k] for k in ("inputs", "targets") if k in spec and k in lengths}
    row_length = sum(features.values())

    def make(targets: np.ndarray, inputs: np.ndarray) -> dict[str, np.ndarray]:
        if layout == "decoder":
            return packing.pack_joined(inputs, targets, row_length) if pack else packing.joined(inputs, targets)
        return packing.pack(inputs, targets, features) if pack else packing.unpacked(inputs, targets)

    nothing = np.zeros((1, 0), np.int32)
    none = {k: np.zeros((1, length), np.int32) for k, length in features.items()}
    wide = {k: x.shape[1] for k, x in make(none["targets"], none.get("inputs", nothing)).items()}

    def rows(block: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        given = [block["targets"], block.get("inputs", tf.zeros([tf.shape(block["targets"])[0], 0], tf.int32))]
        arrays = tf.numpy_function(lambda *x: list(make(*x).values()), given, [tf.int32] * len(wide), stateful=False)
        return {k: tf.ensure_shape(x, [None, length]) for x, (k, length) in zip(arrays, wide.items(), strict=True)}

    cut = examples.map(lambda x: {k: tf.cast(x[k][:length], tf.int32) for k, length in features.items()})
    block = row_length if layout == "decoder" else max(lengths.values())
    return cut.padded_batch(block, None if pack else features).map(rows, num_parallel_calls=tf.data.AUTOTUNE)


# Evaluation.


class EvalBatches:
    """One task's split, in its order, as batches of one host; can be gone through again and again.

    Every host reads the whole split and takes its rows of each batch, so all hosts have the same number of batches.
    Arrays as in `TrainBatches`, unpacked. Rows that only fill up the last batch are all 0, weights too.

    Args:
      num_batches: stop after so many; they are then kept in memory, for evaluation comes back to them.
    """

    def __init__(
        self,
        task_name: str,
        lengths: Mapping[str, int],
        *,
        batch_size: int,
        split: str = "validation",
        layout: Layout = "encoder_decoder",
        num_batches: int | None = None,
        seed: int = 0,
        use_cached: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        check_lengths(task_name, lengths, layout)
        check_split(task_name, split)
        rows = _host_batch_size(batch_size, process_count)
        self._rows = slice(process_index * rows, (process_index + 1) * rows)
        self._batch_size = batch_size
        self._kept: list[Batch] | None = None
        self._keep = num_batches is not None
        examples = find_provider(task_name).get_dataset(
            sequence_length=lengths, split=split, use_cached=use_cached, shuffle=False, num_epochs=1, seed=seed
        )
        dataset = _rows(task_name, examples, lengths, layout, pack=False).rebatch(batch_size)
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


# Back to text.


def describe_batch(batch: Mapping[str, np.ndarray], vocabulary: seqio.Vocabulary) -> str:
    """The batch as text, row by row and segment by segment, with spans and the packing efficiency.

    Args:
      batch: as `TrainBatches` or `EvalBatches` make it.
      vocabulary: of both inputs and targets.
    """
    batch = {k: np.asarray(v) for k, v in batch.items()}
    if "segments" in batch:
        return _describe_pairs(batch, vocabulary)
    if "encoder_input_tokens" not in batch:  # inputs are what a decoder alone reads without loss
        parts = {"encoder": batch["decoder_loss_weights"] == 0, "decoder": batch["decoder_loss_weights"] != 0}
        batch |= {f"{k}_input_tokens": batch["decoder_target_tokens"] * part for k, part in parts.items()}
        batch["decoder_target_tokens"] = batch["decoder_input_tokens"]
        if "decoder_segment_ids" in batch:
            batch |= {f"{k}_segment_ids": batch["decoder_segment_ids"] * part for k, part in parts.items()}
            batch["encoder_positions"] = batch["decoder_positions"]
    inputs_BS, targets_BT = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    packed = "encoder_segment_ids" in batch
    segments_BS = batch["encoder_segment_ids"] if packed else (inputs_BS > 0).astype(int)
    segments_BT = batch["decoder_segment_ids"] if packed else (targets_BT > 0).astype(int)
    lines = []
    for row in range(len(inputs_BS)):
        count = max(segments_BS[row].max(), segments_BT[row].max())
        filled = f"inputs {np.count_nonzero(segments_BS[row])}/{inputs_BS.shape[1]} tokens, "
        filled += f"targets {np.count_nonzero(segments_BT[row])}/{targets_BT.shape[1]}"
        lines.append(f"row {row}: {filled}, {count} segment{'s' if count != 1 else ''}")
        for segment in range(1, count + 1):
            at_S, at_T = np.flatnonzero(segments_BS[row] == segment), np.flatnonzero(segments_BT[row] == segment)
            inputs, targets = inputs_BS[row, at_S].tolist(), targets_BT[row, at_T].tolist()
            where = f"inputs {_extent(at_S)}{_positions(batch, 'encoder', row, at_S)}, "
            where += f"targets {_extent(at_T)}{_positions(batch, 'decoder', row, at_T)}"
            lines += [
                f"  segment {segment}: {where}",
                f"    inputs:  {vocabulary.decode(inputs)}",
                f"    targets: {vocabulary.decode(targets)}",
            ]
            lines += [f"    span {name}: {text!r}" for name, text in _spans(targets, vocabulary)]
    share_S, share_T = np.mean(segments_BS > 0), np.mean(segments_BT > 0)
    weights = float(np.sum(batch["decoder_loss_weights"]))
    lines.append(
        f"packing efficiency: {share_S:.1%} of {segments_BS.size} input and {share_T:.1%} of {segments_BT.size} target "
        f"positions hold tokens; sum of loss weights {weights:g}"
    )
    return "\n".join(lines)


def _describe_pairs(batch: Mapping[str, np.ndarray], vocabulary: seqio.Vocabulary) -> str:
    lines = []
    for row, (inputs, targets, segments, (is_random,)) in enumerate(
        zip(batch["inputs"], batch["targets"], batch["segments"], batch["random"], strict=True)
    ):
        chosen = np.flatnonzero(targets)
        tokens = inputs != 0
        lines += [
            f"row {row}: {np.count_nonzero(tokens)}/{len(inputs)} tokens, {len(chosen)} to be predicted, "
            + ("the second part is of another text" if is_random else "the second part follows the first"),
            f"  first:  {vocabulary.decode(inputs[tokens & (segments == 0)].tolist())}",
            f"  second: {vocabulary.decode(inputs[tokens & (segments == 1)].tolist())}",
            f"  to be predicted: {' | '.join(vocabulary.decode([token]) for token in targets[chosen].tolist())}",
        ]
    return "\n".join(lines)


def _extent(at: np.ndarray) -> str:
    return f"[{at[0]}:{at[-1] + 1}]" if len(at) else "none"


def _positions(batch: Mapping[str, np.ndarray], side: str, row: int, at: np.ndarray) -> str:
    if f"{side}_positions" not in batch or not len(at):
        return ""
    positions = batch[f"{side}_positions"][row, at]
    return f" (positions {positions[0]}..{positions[-1]})"


def _spans(targets: Sequence[int], vocabulary: seqio.Vocabulary) -> list[tuple[str, Any]]:
    """What follows each sentinel in the targets; sentinel 0 is the last id [t5 span corruption]."""
    first = vocabulary.vocab_size - vocabulary.extra_ids
    starts = [i for i, token in enumerate(targets) if token >= first]
    ends = [*starts, len(targets)][1:]
    return [
        (f"<extra_id_{vocabulary.vocab_size - 1 - targets[i]}>", vocabulary.decode(targets[i + 1 : end]))
        for i, end in zip(starts, ends, strict=True)
    ]
