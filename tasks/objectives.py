"""From the tokens of documents to `inputs` and `targets`: T5's pre-training objectives as SeqIO preprocessors.

Each takes a dataset of tokenised `targets` (`tokenize` makes it of text) and is followed by `append_eos_after_trim`, as
in the t5 package (0.9.4), with which it agrees example by example for the same dataset seed:

  span_corruption           spans replaced by sentinels (T5's final objective)
  iid_denoising             single tokens at random, neighbours sharing a sentinel ("replace corrupted spans")
  iid_drop_tokens           the same tokens left out ("drop corrupted tokens")
  bert_style_denoising      90 % one mask token, 10 % a random token; the whole text is the target
  mass_style_denoising      all of them the mask token; the whole text is the target
  deshuffling               all tokens in random order; the text in order is the target
  prefix_lm                 a first part of random length, and the rest
  lm, full_lm               the text alone, each piece ended by EOS, or EOS only where a document ends

Examples are worked on by the hundred: one by one, TensorFlow's cost of a call would be most of the work. Must not know:
files, TFDS, task names.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tasks import noise
from tasks import vocabulary as vocabularies
from tasks.errors import UserError

Features = Mapping[str, seqio.utils.Feature]
Lengths = Mapping[str, int]

_BLOCK = 128  # examples worked on at once; also the number of documents that t5 concatenates
_CHUNK = 65536  # tokens of a document that are used at most


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Lengths | None,
    output_features: Features,
    mean_noise_span_length: float = 3.0,
    noise_density: float = 0.15,
) -> tf.data.Dataset:
    """T5's pre-training objective: spans of noise become sentinels in the inputs and are spelt out in the targets.

    Documents are concatenated and cut so that the inputs fill `sequence_length["inputs"]` exactly, EOS included.

    Raises ValueError when the targets would not fit or the vocabulary has too few sentinels.
    """
    lengths = needed_lengths(sequence_length, "inputs", "targets")
    raw_length, targets_length = random_spans_helper(lengths["inputs"], noise_density, mean_noise_span_length)
    if lengths["targets"] < targets_length:
        raise UserError(
            f"span corruption of inputs of {lengths['inputs']} tokens makes targets of {targets_length}, "
            f"longer than the {lengths['targets']} configured: set the targets' length to {targets_length}"
        )
    _, spans = noise.noise_counts(raw_length, noise_density, mean_noise_span_length)
    vocabularies.require_sentinels(output_features["targets"].vocabulary, spans)
    return denoise(
        split_documents(dataset, raw_length),
        output_features,
        noise_density=noise_density,
        noise_mask=functools.partial(noise.random_spans_noise_mask, mean_noise_span_length=mean_noise_span_length),
        inputs=noise.noise_span_to_unique_sentinel,
        targets=noise.nonnoise_span_to_unique_sentinel,
    )


def _objective(
    name: str,
    inputs: Callable,
    targets: Callable | None,
    *,
    noise_mask: Callable = noise.iid_noise_mask,
    noise_density: float = 0.15,
    concatenate: bool = True,
    sentinels: int = 0,
) -> Callable[..., tf.data.Dataset]:
    """Text cut so that inputs without noise would fill their length, and `denoise`. Such inputs may need more sentinels
    than there are; further ones are then the last pieces of the vocabulary, as in t5.
    """
    density = noise_density

    def objective(
        dataset: tf.data.Dataset,
        sequence_length: Lengths | None,
        output_features: Features,
        noise_density: float = density,
    ) -> tf.data.Dataset:
        length = _without_eos(needed_lengths(sequence_length, "inputs"), "inputs", output_features)
        vocabularies.require_sentinels(output_features["targets"].vocabulary, sentinels)
        return denoise(
            split_documents(dataset, length, concatenate=concatenate),
            output_features,
            noise_density=noise_density,
            noise_mask=noise_mask,
            inputs=inputs,
            targets=targets,
        )

    objective.__name__ = objective.__qualname__ = name
    return objective


iid_denoising = _objective(
    "iid_denoising", noise.noise_span_to_unique_sentinel, noise.nonnoise_span_to_unique_sentinel, sentinels=1
)
iid_drop_tokens = _objective("iid_drop_tokens", noise.drop_noise_tokens, noise.drop_nonnoise_tokens)
mass_style_denoising = _objective("mass_style_denoising", noise.noise_token_to_sentinel, None, sentinels=1)
bert_style_denoising = _objective(
    "bert_style_denoising", noise.noise_token_to_random_token_or_sentinel, None, sentinels=1
)
deshuffling = _objective("deshuffling", noise.permute_noise_tokens, None, noise_density=1.0, concatenate=False)
prefix_lm = _objective(
    *("prefix_lm", noise.drop_nonnoise_tokens, noise.drop_noise_tokens),
    noise_mask=noise.random_prefix_noise_mask,
    noise_density=0.5,
    concatenate=False,
)


def lm(dataset: tf.data.Dataset, sequence_length: Lengths | None, output_features: Features) -> tf.data.Dataset:
    """Text to predict from nothing, concatenated and cut so that each piece and its EOS fill the targets."""
    length = _without_eos(needed_lengths(sequence_length, "targets"), "targets", output_features)
    return split_documents(dataset, length)


def full_lm(dataset: tf.data.Dataset, sequence_length: Lengths | None, output_features: Features) -> tf.data.Dataset:
    """Text to predict from nothing: documents, each with its EOS, concatenated and cut to fill the targets.

    Pieces end where they are cut: no `append_eos_after_trim` follows.
    """
    eos = output_features["targets"].vocabulary.eos_id
    return split_documents(dataset, needed_lengths(sequence_length, "targets")["targets"], eos=eos)


def needed_lengths(sequence_length: Lengths | None, *needed: str) -> Lengths:
    """The lengths, or ValueError where one that is needed was not given."""
    missing = [name for name in needed if name not in (sequence_length or {})]
    if sequence_length is None or missing:
        raise UserError(
            f"this objective cuts text to length: TASK_FEATURE_LENGTHS must give {', '.join(missing)}, "
            f"got {sequence_length}"
        )
    return sequence_length


def _without_eos(lengths: Lengths, feature: str, output_features: Features) -> int:
    return lengths[feature] - output_features[feature].add_eos


def random_spans_helper(inputs_length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """How many raw tokens fill inputs of `inputs_length` after span corruption, and how long the targets then are.

    Both lengths count the EOS: (512, 0.15, 3.0) gives (568, 114). Source: t5's `random_spans_helper`.
    """

    def lengths(raw: int) -> tuple[int, int]:
        noise_tokens = round(raw * noise_density)
        spans = round(noise_tokens / mean_noise_span_length)
        return raw - noise_tokens + spans + 1, noise_tokens + spans + 1

    raw = inputs_length - 1
    while lengths(raw + 1)[0] <= inputs_length:
        raw += 1
    inputs, targets = lengths(raw)
    if noise_density == 0.5 and targets > inputs:  # t5 prefers equal lengths here
        return raw - 1, targets - 1
    return raw, targets


# ------------------------------------------------------------------------------------------------------ steps in blocks


def text_as_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The string feature `text` as `targets`, and nothing else.

    A step of its own, as in t5: SeqIO's seeds for the steps behind the cache depend on the number of those before it.
    """
    return dataset.map(lambda x: {"targets": x["text"]})


def tokenize(dataset: tf.data.Dataset, output_features: Features) -> tf.data.Dataset:
    """The strings `targets` as tokens, where there are any.

    tf-text is used, not the sentencepiece package, whose releases from 0.2.2 on are quicker and break ties between
    equally good pieces differently: "???!" would be other tokens than T5 was trained with.
    """
    vocabulary = vocabularies.resolved(output_features["targets"].vocabulary)
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):  # others take one text at a time
        tokens = dataset.map(lambda x: {"targets": vocabulary.encode_tf(x["targets"])}, tf.data.AUTOTUNE)
        return tokens.filter(lambda x: tf.size(x["targets"]) > 0)

    def encode(block: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        tokens = vocabulary.encode_tf(block["targets"])
        return {"targets": tf.ragged.boolean_mask(tokens, tokens.row_lengths() > 0)}

    return _each(dataset.batch(_BLOCK).map(encode, tf.data.AUTOTUNE))


def append_eos_after_trim(
    dataset: tf.data.Dataset, sequence_length: Lengths | None, output_features: Features
) -> tf.data.Dataset:
    """seqio.preprocessors.append_eos_after_trim for examples of tokens alone, at a fifth of its cost."""
    ends = {name: feature.vocabulary.eos_id for name, feature in output_features.items() if feature.add_eos}

    def append(name: str, tokens: tf.Tensor) -> tf.Tensor:
        if name not in ends:
            return tokens
        length = (sequence_length or {}).get(name)
        kept = tokens if length is None else tokens[: length - 1]
        return tf.concat([kept, tf.constant([ends[name]])], axis=0)  # pyright: ignore[reportCallIssue, reportArgumentType]

    return dataset.map(lambda x: {name: append(name, tokens) for name, tokens in x.items()})


def split_documents(
    dataset: tf.data.Dataset, length: int, *, concatenate: bool = True, eos: int | None = None
) -> tf.data.Dataset:
    """Cuts the `targets` of documents into pieces of `length` tokens; only the last of a cut text may be shorter.

    Of a document longer than 65,536 tokens one chunk of that length is drawn. With `concatenate`, each 128 documents
    are joined before they are cut, after `eos` was put behind each if given. t5 calls the steps select_random_chunk,
    append_eos, reduce_concat_tokens and split_tokens.
    """

    def cut(documents: np.ndarray, seeds: np.ndarray) -> list[list[np.ndarray]]:
        texts = []
        for document, size, seed in zip(documents, _sizes(documents), seeds, strict=True):
            start = 0
            if size > _CHUNK:
                chunk = noise.integers(noise.split(seed[None], 2)[:, 1], 1, 0, -(-size // _CHUNK))[0, 0]
                start, size = _CHUNK * chunk, min(size, _CHUNK * (chunk + 1))
            texts.append(document[start:size] if eos is None else np.append(document[start:size], np.int32(eos)))
        if concatenate:
            texts = [np.concatenate(texts)]
        return [[text[i : i + length] for text in texts for i in range(0, len(text), length)]]

    pieces = map_blocks(dataset, cut, ["targets"])
    _draw_seeds()  # t5's split_tokens takes one too (its pieces may have random lengths), and later steps count on it
    return pieces


def denoise(
    dataset: tf.data.Dataset,
    output_features: Features,
    *,
    noise_density: float,
    noise_mask: Callable[..., np.ndarray],
    inputs: Callable,
    targets: Callable | None,
) -> tf.data.Dataset:
    """Makes `inputs` and `targets` from tokenised `targets` by a mask and encodings of `tasks.noise`.

    `targets=None` keeps the whole text as target.
    """
    vocabulary = output_features["targets"].vocabulary
    if "inputs" in output_features and output_features["inputs"].vocabulary != vocabulary:
        raise UserError("denoising makes inputs from tokenised targets: the two features need the same vocabulary")

    def corrupt(texts: np.ndarray, seeds: np.ndarray) -> list[list[np.ndarray]]:
        sizes = _sizes(texts)
        made: list[list] = [[None] * len(texts), [None] * len(texts)]
        for size in np.unique(sizes):
            rows = np.flatnonzero(sizes == size)
            tokens, keys = texts[rows, :size], noise.split(seeds[rows], 6)
            mask = noise_mask(int(size), noise_density, keys[:, :2])
            for encode, keys_used, out in ((inputs, keys[:, 2:4], made[0]), (targets, keys[:, 4:6], made[1])):
                values, kept = encode(tokens, mask, vocabulary, keys_used) if encode else (tokens, np.ones_like(mask))
                for row, value, keep in zip(rows, values, kept, strict=True):
                    out[row] = value[keep]
        return made

    return map_blocks(dataset, corrupt, ["inputs", "targets"])


def map_blocks(
    dataset: tf.data.Dataset,
    fn: Callable[..., list[list[np.ndarray]]],
    outputs: Sequence[str],
    features: Sequence[str] = ("targets",),
) -> tf.data.Dataset:
    """Calls `fn` on the `features` of each 128 examples in turn: (int32 [n, longest], ..., seeds int64 [n, 2]).

    It gives for each of `outputs` a list of token arrays, all lists equally long; these become the examples.
    """

    def flat(*block: np.ndarray) -> list[np.ndarray]:
        arrays = []
        for column in fn(*block[:-1], block[-1][: len(block[0])]):
            arrays.append(np.concatenate([*column, np.zeros(0, np.int32)], dtype=np.int32))
            arrays.append(np.array([len(x) for x in column], np.int64))
        return arrays

    def examples(block: dict[str, tf.Tensor], seeds: tf.Tensor) -> dict[str, tf.RaggedTensor]:
        given = [tf.cast(block[name], tf.int32) for name in features] + [seeds]
        arrays = tf.numpy_function(flat, given, [tf.int32, tf.int64] * len(outputs), stateful=False)
        return dict(zip(outputs, _ragged(arrays), strict=True))

    spec: Any = dataset.element_spec
    if set(spec) != set(features):
        dataset = dataset.map(lambda x: {name: x[name] for name in features})
    blocks = tf.data.Dataset.zip((dataset.padded_batch(_BLOCK), _draw_seeds()))
    return _each(blocks.map(examples, num_parallel_calls=tf.data.AUTOTUNE))


def _ragged(arrays: list[tf.Tensor]) -> list[tf.RaggedTensor]:
    """Values and row lengths in turn."""
    arrays = [tf.ensure_shape(x, [None]) for x in arrays]
    make = functools.partial(tf.RaggedTensor.from_row_lengths, validate=False)  # pyright: ignore
    return [make(values, sizes) for values, sizes in zip(arrays[::2], arrays[1::2], strict=True)]


def _each(blocks: tf.data.Dataset) -> tf.data.Dataset:
    """The examples of blocks one by one, as plain tensors."""
    rows = blocks.flat_map(tf.data.Dataset.from_tensor_slices)
    return rows.map(lambda x: {name: tf.ensure_shape(tokens, [None]) for name, tokens in x.items()})


def _draw_seeds() -> tf.data.Dataset:
    """Blocks of the seeds, int64 [128, 2], that seqio.map_over_dataset(num_seeds=1) would give its examples.

    Taking them moves SeqIO on to its next, which it counts in a private variable.
    """
    first = seqio.utils._NEXT_MAP_SEED
    if first is not None:
        seqio.utils._NEXT_MAP_SEED += 2
    halves = [tf.data.Dataset.random(seed=None if first is None else first + i) for i in range(2)]
    pairs = tf.data.Dataset.zip(tuple(half.batch(_BLOCK) for half in halves))
    return pairs.map(lambda a, b: tf.stack([a, b], axis=1))


def _sizes(tokens: np.ndarray) -> np.ndarray:
    """The lengths of padded rows: padding is 0 and comes last."""
    return (tokens != 0).sum(axis=1)
