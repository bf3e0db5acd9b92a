"""T5's pre-training objectives as SeqIO preprocessors: from tokenised documents to `inputs` and `targets`.

Each objective takes a dataset of tokenised `targets` (see `tokenize`) and is followed by `append_eos_after_trim`, as in
the t5 package (0.9.4). Examples are identical to t5's for the same dataset seed:

  span_corruption           spans replaced by sentinels (T5's final objective)
  iid_denoising             random single tokens; adjacent ones share a sentinel ("replace corrupted spans")
  iid_drop_tokens           the same tokens are dropped ("drop corrupted tokens")
  bert_style_denoising      90 % become a mask token, 10 % a random token; the target is the whole text
  mass_style_denoising      all become a mask token; the target is the whole text
  deshuffling               inputs are all tokens in random order; the target is the text in order
  prefix_lm                 inputs are a prefix of random length; the target is the rest
  lm, full_lm               targets only; EOS ends each piece (lm) or each document (full_lm)

Examples are processed in blocks (`tasks.blocks`). Must not import: files, TFDS, task names.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tasks import blocks, noise
from tasks import vocabulary as vocabularies
from tasks.errors import UserError

Features = Mapping[str, seqio.utils.Feature]
Lengths = Mapping[str, int]

_CHUNK = 65536  # maximum number of tokens used of a document


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Lengths | None,
    output_features: Features,
    mean_noise_span_length: float = 3.0,
    noise_density: float = 0.15,
    concatenate: bool = True,
) -> tf.data.Dataset:
    """T5's pre-training objective: noise spans become sentinels in the inputs and are written out in the targets.

    Documents are concatenated and split so that the inputs fill `sequence_length["inputs"]` exactly, EOS included.
    Without `concatenate` each document is split on its own, and its last piece is shorter.

    Raises UserError if the targets do not fit or the vocabulary has too few sentinels.
    """
    lengths = needed_lengths(sequence_length, "inputs", "targets")
    raw_length, targets_length = random_spans_helper(lengths["inputs"], noise_density, mean_noise_span_length)
    if lengths["targets"] < targets_length:
        raise UserError(
            f"span corruption of {lengths['inputs']} input tokens needs {targets_length} target tokens, but "
            f"TASK_FEATURE_LENGTHS has {lengths['targets']}: set the targets' length to {targets_length}"
        )
    _, spans = noise.noise_counts(raw_length, noise_density, mean_noise_span_length)
    vocabularies.require_sentinels(output_features["targets"].vocabulary, spans)
    pieces = split_documents(dataset, raw_length, concatenate=concatenate)
    return denoise(pieces, output_features, **spans_to_sentinels(noise_density, mean_noise_span_length))


def spans_to_sentinels(noise_density: float, mean_noise_span_length: float) -> dict[str, Any]:
    """Return the arguments of `denoise` and `corrupted` for span corruption."""
    return {
        "noise_density": noise_density,
        "noise_mask": functools.partial(noise.random_spans_noise_mask, mean_noise_span_length=mean_noise_span_length),
        "inputs": noise.noise_span_to_unique_sentinel,
        "targets": noise.nonnoise_span_to_unique_sentinel,
    }


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
    """Return an objective: split text to the length of the inputs, then `denoise`.

    If the inputs need more sentinels than there are, the last pieces of the vocabulary are used, as in t5; with a Gemma
    vocabulary its last sentinel is used again.
    """
    density, joined = noise_density, concatenate

    def objective(
        dataset: tf.data.Dataset,
        sequence_length: Lengths | None,
        output_features: Features,
        noise_density: float = density,
        concatenate: bool = joined,
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
    "prefix_lm",
    noise.drop_nonnoise_tokens,
    noise.drop_noise_tokens,
    noise_mask=noise.random_prefix_noise_mask,
    noise_density=0.5,
    concatenate=False,
)


def lm(
    dataset: tf.data.Dataset, sequence_length: Lengths | None, output_features: Features, concatenate: bool = True
) -> tf.data.Dataset:
    """Language modelling: text concatenated and split so that each piece and its EOS fill the targets."""
    length = _without_eos(needed_lengths(sequence_length, "targets"), "targets", output_features)
    return split_documents(dataset, length, concatenate=concatenate)


def full_lm(dataset: tf.data.Dataset, sequence_length: Lengths | None, output_features: Features) -> tf.data.Dataset:
    """Language modelling: documents, each with its EOS, concatenated and split to fill the targets.

    Pieces get no EOS of their own: no `append_eos_after_trim` follows.
    """
    eos = output_features["targets"].vocabulary.eos_id
    return split_documents(dataset, needed_lengths(sequence_length, "targets")["targets"], eos=eos)


def needed_lengths(sequence_length: Lengths | None, *needed: str) -> Lengths:
    """Return the lengths. Raises UserError if a needed one is missing."""
    missing = [name for name in needed if name not in (sequence_length or {})]
    if sequence_length is None or missing:
        raise UserError(
            f"this objective splits text by length: TASK_FEATURE_LENGTHS must give {', '.join(missing)}, "
            f"got {sequence_length}"
        )
    return sequence_length


def _without_eos(lengths: Lengths, feature: str, output_features: Features) -> int:
    return lengths[feature] - output_features[feature].add_eos


def random_spans_helper(inputs_length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """Return the number of raw tokens that fill `inputs_length` after span corruption, and the length of the targets.

    Both lengths include EOS: (512, 0.15, 3.0) gives (568, 114). Source: t5's `random_spans_helper`.
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
    """Rename the string feature `text` to `targets`, and drop all others.

    This is a separate step, as in t5, because SeqIO's seeds for the steps after the cache depend on the number of steps
    before it.
    """
    return blocks.map_alike(dataset, lambda x: {"targets": x["text"]})


def tokenize(dataset: tf.data.Dataset, output_features: Features) -> tf.data.Dataset:
    """Tokenise the strings `targets`, and drop empty ones."""
    vocabulary = vocabularies.resolved(output_features["targets"].vocabulary)
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):  # other vocabularies encode one text at a time
        tokens = dataset.map(lambda x: {"targets": vocabulary.encode_tf(x["targets"])}, tf.data.AUTOTUNE)
        return tokens.filter(lambda x: tf.size(x["targets"]) > 0)

    encode_block = vocabularies.block_encoder(vocabulary)

    def encode(block: dict[str, tf.Tensor]) -> dict[str, tf.RaggedTensor]:
        tokens = encode_block(block["targets"])
        return {"targets": tf.ragged.boolean_mask(tokens, tokens.row_lengths() > 0)}

    texts = blocks.remembered(dataset) or dataset.batch(blocks.SIZE)
    return blocks.examples(texts.map(encode, tf.data.AUTOTUNE))


def append_eos_after_trim(
    dataset: tf.data.Dataset, sequence_length: Lengths | None, output_features: Features
) -> tf.data.Dataset:
    """seqio.preprocessors.append_eos_after_trim for token features only, at a small part of its cost."""
    ends = {name: feature.vocabulary.eos_id for name, feature in output_features.items() if feature.add_eos}

    def append(name: str, tokens: Any) -> Any:
        if name not in ends:
            return tokens
        length = (sequence_length or {}).get(name)
        eos = tf.constant([ends[name]])  # pyright: ignore[reportArgumentType]
        if not isinstance(tokens, tf.RaggedTensor):
            return tf.concat([tokens if length is None else tokens[: length - 1], eos], axis=0)  # pyright: ignore[reportCallIssue, reportArgumentType]
        trimmed = tokens if length is None else tokens[:, : length - 1]
        return tf.concat([trimmed, tf.repeat(eos[None], tokens.nrows(), axis=0)], axis=1)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def of_all(x: dict[str, Any]) -> dict[str, Any]:
        return {name: append(name, tokens) for name, tokens in x.items()}

    return blocks.map_alike(dataset, of_all)


def split_documents(
    dataset: tf.data.Dataset, length: int, *, concatenate: bool = True, eos: int | None = None
) -> tf.data.Dataset:
    """Split the `targets` of documents into pieces of `length` tokens; only the last piece of a text may be shorter.

    From a document longer than 65,536 tokens one random chunk of that length is used. With `concatenate`, blocks of 128
    documents are concatenated before splitting, each followed by `eos` if given. In t5 the steps are called
    select_random_chunk, append_eos, reduce_concat_tokens and split_tokens.
    """

    def cut(documents: list[np.ndarray], seeds: np.ndarray) -> list[list[np.ndarray]]:
        texts = chunks(documents, seeds)
        if eos is not None:
            texts = [np.append(text, np.int32(eos)) for text in texts]
        if concatenate:
            texts = [np.concatenate(texts)]
        return [[text[i : i + length] for text in texts for i in range(0, len(text), length)]]

    pieces = map_blocks(dataset, cut, ["targets"])
    _draw_seeds()  # t5's split_tokens also draws a seed, so the seeds of later steps depend on it
    return pieces


def chunks(documents: Sequence[np.ndarray], seeds: np.ndarray) -> list[np.ndarray]:
    """Return the documents; of those longer than 65,536 tokens a random chunk of that length, drawn by their seeds."""
    texts = list(documents)
    for k, document in enumerate(texts):
        if len(document) > _CHUNK:
            chunk = noise.integers(noise.split(seeds[k][None], 2)[:, 1], 1, 0, -(-len(document) // _CHUNK))[0, 0]
            texts[k] = document[_CHUNK * chunk : _CHUNK * (chunk + 1)]
    return texts


def denoise(
    dataset: tf.data.Dataset,
    output_features: Features,
    *,
    noise_density: float,
    noise_mask: Callable[..., np.ndarray],
    inputs: Callable,
    targets: Callable | None,
) -> tf.data.Dataset:
    """Make `inputs` and `targets` from tokenised `targets`, by a noise mask and encodings of `tasks.noise`.

    With `targets=None` the target is the whole text.
    """
    vocabulary = output_features["targets"].vocabulary
    if "inputs" in output_features and output_features["inputs"].vocabulary != vocabulary:
        raise UserError("denoising makes inputs from tokenised targets: both features need the same vocabulary")

    def corrupt(texts: list[np.ndarray], seeds: np.ndarray) -> list[list[np.ndarray]]:
        return corrupted(
            texts,
            seeds,
            vocabulary,
            noise_density=noise_density,
            noise_mask=noise_mask,
            inputs=inputs,
            targets=targets,
        )

    return map_blocks(dataset, corrupt, ["inputs", "targets"])


def corrupted(
    texts: Sequence[np.ndarray],
    seeds: np.ndarray,
    vocabulary: seqio.Vocabulary,
    *,
    noise_density: float,
    noise_mask: Callable[..., np.ndarray],
    inputs: Callable,
    targets: Callable | None,
) -> list[list[np.ndarray]]:
    """Return the inputs and targets of texts; the seeds are int64 [n, 2], the other arguments those of `denoise`."""
    sizes = np.array([len(text) for text in texts])
    columns: list[list] = [[None] * len(texts), [None] * len(texts)]
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        tokens, keys = np.stack([texts[int(row)] for row in rows]), noise.split(seeds[rows], 6)
        mask = noise_mask(int(size), noise_density, keys[:, :2])
        for encode, keys_used, out in ((inputs, keys[:, 2:4], columns[0]), (targets, keys[:, 4:6], columns[1])):
            values, keeps = encode(tokens, mask, vocabulary, keys_used) if encode else (tokens, np.ones_like(mask))
            for row, value, keep in zip(rows, values, keeps, strict=True):
                out[row] = value[keep]
    return columns


def map_blocks(
    dataset: tf.data.Dataset,
    fn: Callable[..., list[list[np.ndarray]]],
    outputs: Sequence[str],
    features: Sequence[str] = ("targets",),
) -> tf.data.Dataset:
    """Call `fn` on the `features` of each block of 128 examples: (n int32 arrays, ..., seeds int64 [n, 2]).

    `fn` returns, for each name in `outputs`, a list of token arrays; all lists have the same length. These become the
    examples.
    """

    def with_seeds(*block: Any) -> list[list[np.ndarray]]:
        return fn(*block[:-1], block[-1][: len(block[0])])

    pairs = tf.data.Dataset.zip((blocks.in_blocks(dataset, features), _draw_seeds()))
    return blocks.examples(blocks.numpy_map(pairs, with_seeds, outputs))


def _draw_seeds() -> tf.data.Dataset:
    """Return blocks of the seeds, int64 [128, 2], that seqio.map_over_dataset(num_seeds=1) would give its examples.

    This advances SeqIO's private seed counter.
    """
    first = seqio.utils._NEXT_MAP_SEED
    if first is not None:
        seqio.utils._NEXT_MAP_SEED += 2
    halves = [tf.data.Dataset.random(seed=None if first is None else first + i) for i in range(2)]
    pairs = tf.data.Dataset.zip(tuple(half.batch(blocks.SIZE) for half in halves))
    return pairs.map(lambda a, b: tf.stack([a, b], axis=1))
