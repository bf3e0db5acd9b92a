"""From raw examples to `inputs` and `targets`: the text of GLUE and SQuAD, and the denoising objectives.

Text functions map an example of strings to one of strings; objectives work on tokenised `targets`. All agree with the
t5 package (0.9.4), and random ones draw their seeds from SeqIO as it does (`seqio.map_over_dataset(num_seeds=1)`, split
where more are needed), so that a dataset seed gives the same examples. An objective is composed: a noise mask says
which tokens are noise, one function writes the inputs from it and another the targets.

Must not know: files, TFDS, task names.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from tasks import vocabulary as vocabularies

Example = dict[str, Any]  # feature to tensor; `answers` may nest
NoiseMask = Callable[..., tf.Tensor]  # (length, noise_density, seeds) -> bool [length]
NoiseEncoding = Callable[..., tf.Tensor]  # (tokens [N], noise_mask [N], vocabulary, seeds) -> tokens [M]

# ------------------------------------------------------------------------------------------------------- GLUE and SQuAD


def glue(dataset: tf.data.Dataset, prefix: str, text_features: Sequence[str], labels: Sequence[str]) -> tf.data.Dataset:
    """`prefix first: ... second: ...` with the features in order of their names; the target is the label's word.

    A label of -1 (GLUE's test sets) gives the target "<unk>".
    """
    names = sorted(text_features)

    def to_text(x: Example) -> Example:
        pieces = [prefix]
        for name in names:
            pieces += [f"{name}:", x[name]]
        target = tf.where(x["label"] < 0, "<unk>", tf.gather(tf.constant(labels), tf.maximum(x["label"], 0)))
        return {"inputs": tf.strings.join(pieces, " "), "targets": target, "idx": x["idx"]}

    return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE)


def stsb_label(score: tf.Tensor) -> tf.Tensor:
    """A similarity in 0..5 as the nearest fifth, one decimal; rounded in float32, half to even: 2.5 gives "2.4"."""
    return tf.strings.as_string(tf.round(score * 5) / 5, precision=1)


@seqio.map_over_dataset
def stsb(x: Example) -> Example:
    """STS-B: the score is a word to be generated, one of 0.0, 0.2, ... 5.0."""
    inputs = tf.strings.join(["stsb sentence1:", x["sentence1"], "sentence2:", x["sentence2"]], " ")
    return {"inputs": inputs, "targets": stsb_label(x["label"]), "idx": x["idx"]}


def pad_punctuation(text: tf.Tensor) -> tf.Tensor:
    """Spaces round every ASCII punctuation mark, then runs of white space as one space. Other marks are left alone."""
    return _one_space(tf.strings.regex_replace(text, r"([[:punct:]])", r" \1 "))


def _one_space(text: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_replace(text, r"\s+", " ")


def _squad_example(
    x: Example, inputs: tf.Tensor, context: tf.Tensor, question: tf.Tensor, answers: tf.Tensor
) -> Example:
    return {
        "inputs": inputs,
        "targets": answers[0],
        "id": x["id"],
        "context": context,
        "question": question,
        "answers": answers,
    }


@seqio.map_over_dataset
def squad(x: Example) -> Example:
    """t5's SQuAD: `question: ... context: ...` to the first answer, punctuation padded in all; answers are kept."""
    context, question = pad_punctuation(x["context"]), pad_punctuation(x["question"])
    inputs = _one_space(tf.strings.join(["question:", question, "context:", context], " "))
    return _squad_example(x, inputs, context, question, pad_punctuation(x["answers"]["text"]))


@seqio.map_over_dataset
def squad_context_free(x: Example) -> Example:
    """Closed-book SQuAD: `squad trivia question: ...`, to be answered from the parameters alone."""
    context, question = pad_punctuation(x["context"]), pad_punctuation(x["question"])
    inputs = _one_space(tf.strings.join(["squad trivia question:", question], " "))
    return _squad_example(x, inputs, context, question, pad_punctuation(x["answers"]["text"]))


@seqio.map_over_dataset
def squad_unpadded(x: Example) -> Example:
    """SQuAD as the paper prints it: `question: ... context: ...` with the text as the dataset has it."""
    inputs = tf.strings.join(["question:", x["question"], "context:", x["context"]], " ")
    return _squad_example(x, inputs, x["context"], x["question"], x["answers"]["text"])


# ------------------------------------------------------------------------------------------------------ token sequences


def select_random_chunk(dataset: tf.data.Dataset, max_length: int, feature: str = "targets") -> tf.data.Dataset:
    """Keeps one chunk of at most `max_length` tokens of each document, drawn from its chunks of that length."""

    @seqio.map_over_dataset(num_seeds=1)
    def chunk(x: Example, seed: tf.Tensor) -> Example:
        tokens, seeds = x[feature], tf.random.split(seed)
        pieces = _pieces(tf.size(tokens), max_length)
        start = max_length * tf.random.stateless_uniform([], maxval=pieces, dtype=tf.int32, seed=seeds[1])
        return {feature: tokens[start : start + max_length]}

    return chunk(_without_empty(dataset, feature))  # pyright: ignore[reportCallIssue]  SeqIO gives the seed


def reduce_concat_tokens(dataset: tf.data.Dataset, documents: int = 128, feature: str = "targets") -> tf.data.Dataset:
    """Concatenates the tokens of each `documents` documents in turn, with nothing between them."""

    def concatenate(tokens: tf.Tensor) -> Example:
        flat = tf.reshape(tokens, [-1])
        return {feature: tf.boolean_mask(flat, flat != 0)}

    return (
        dataset.map(lambda x: x[feature]).padded_batch(documents).map(concatenate, num_parallel_calls=tf.data.AUTOTUNE)
    )


def split_tokens(dataset: tf.data.Dataset, max_length: int, feature: str = "targets") -> tf.data.Dataset:
    """Cuts each sequence into pieces of `max_length` tokens; only the last may be shorter."""

    # Nothing is drawn, but t5 asks for a seed here (its segments may have random lengths) and later steps count on it.
    @seqio.map_over_dataset(num_seeds=1)
    def split(x: Example, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        del seed
        size = tf.size(x[feature])
        starts = tf.range(_pieces(size, max_length)) * max_length
        padded = tf.pad(x[feature], [[0, tf.size(starts) * max_length - size]])
        return tf.reshape(padded, [-1, max_length]), tf.minimum(size - starts, max_length)

    pieces = split(_without_empty(dataset, feature)).unbatch()  # pyright: ignore[reportCallIssue]
    return pieces.map(lambda tokens, size: {feature: tokens[:size]}, num_parallel_calls=tf.data.AUTOTUNE)


def _pieces(size: tf.Tensor, length: int) -> tf.Tensor:
    return (size + length - 1) // length


def _without_empty(dataset: tf.data.Dataset, feature: str) -> tf.data.Dataset:
    return dataset.filter(lambda x: tf.size(x[feature]) > 0)


# ------------------------------------------------------------------------------------------------------ span corruption


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    output_features: Mapping[str, seqio.utils.Feature],
    mean_noise_span_length: float = 3.0,
    noise_density: float = 0.15,
) -> tf.data.Dataset:
    """T5's pre-training objective: spans of noise become sentinels in the inputs and are spelt out in the targets.

    Documents are concatenated and cut so that the inputs fill `sequence_length["inputs"]` exactly, EOS included.

    Raises ValueError when the targets would not fit or the vocabulary has too few sentinels.
    """
    if not sequence_length or not {"inputs", "targets"} <= sequence_length.keys():
        raise ValueError(
            f"span corruption cuts text to length: give TASK_FEATURE_LENGTHS for both, got {sequence_length}"
        )
    raw_length, targets_length = random_spans_helper(sequence_length["inputs"], noise_density, mean_noise_span_length)
    if sequence_length["targets"] < targets_length:
        raise ValueError(
            f"span corruption of inputs of {sequence_length['inputs']} tokens makes targets of {targets_length}, "
            f"longer than the {sequence_length['targets']} configured: set the targets' length to {targets_length}"
        )
    _, spans = noise_counts(raw_length, noise_density, mean_noise_span_length)
    vocabularies.require_sentinels(output_features["targets"].vocabulary, spans)
    dataset = select_random_chunk(dataset, max_length=65536)
    dataset = reduce_concat_tokens(dataset)
    dataset = split_tokens(dataset, max_length=raw_length)
    return denoise(
        dataset,
        output_features,
        noise_density=noise_density,
        noise_mask=functools.partial(random_spans_noise_mask, mean_noise_span_length=mean_noise_span_length),
        inputs=noise_span_to_unique_sentinel,
        targets=nonnoise_span_to_unique_sentinel,
    )


def noise_counts(length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """How many tokens of `length` (at least 2) are noise and in how many spans; rounds half to even, like the mask."""
    noise = min(max(round(length * noise_density), 1), length - 1)
    return noise, max(round(noise / mean_noise_span_length), 1)


def random_spans_helper(inputs_length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """How many raw tokens fill inputs of `inputs_length` after span corruption, and how long the targets then are.

    Both lengths count the EOS: (512, 0.15, 3.0) gives (568, 114). Source: t5's `random_spans_helper`.
    """

    def lengths(raw: int) -> tuple[int, int]:
        noise = round(raw * noise_density)
        spans = round(noise / mean_noise_span_length)
        return raw - noise + spans + 1, noise + spans + 1

    raw = inputs_length - 1
    while lengths(raw + 1)[0] <= inputs_length:
        raw += 1
    inputs, targets = lengths(raw)
    if noise_density == 0.5 and targets > inputs:  # t5 prefers equal lengths here
        return raw - 1, targets - 1
    return raw, targets


def denoise(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.utils.Feature],
    *,
    noise_density: float,
    noise_mask: NoiseMask,
    inputs: NoiseEncoding,
    targets: NoiseEncoding | None,
) -> tf.data.Dataset:
    """Makes `inputs` and `targets` from tokenised `targets` by a noise mask; `targets=None` keeps the whole text."""
    vocabulary = output_features["targets"].vocabulary
    if "inputs" in output_features and output_features["inputs"].vocabulary != vocabulary:
        raise ValueError("denoising makes inputs from tokenised targets: the two features need the same vocabulary")

    @seqio.map_over_dataset(num_seeds=1)
    def corrupt(x: Example, seed: tf.Tensor) -> Example:
        tokens, seeds = x["targets"], tf.random.split(seed, 6)
        mask = noise_mask(tf.size(tokens), noise_density, seeds=seeds[:2])
        return {
            "inputs": inputs(tokens, mask, vocabulary, seeds=seeds[2:4]),
            "targets": targets(tokens, mask, vocabulary, seeds=seeds[4:6]) if targets else tokens,
        }

    return corrupt(dataset)  # pyright: ignore[reportCallIssue]


# ---------------------------------------------------------------------------------------------------------- noise masks


def iid_noise_mask(length: tf.Tensor, noise_density: float, seeds: tf.Tensor) -> tf.Tensor:
    """Each token is noise independently, with probability `noise_density`. Bool [length]."""
    return tf.random.stateless_uniform(tf.expand_dims(length, 0), seed=seeds[0]) < noise_density


def random_spans_noise_mask(
    length: tf.Tensor,
    noise_density: float,
    seeds: tf.Tensor,
    mean_noise_span_length: float = 3.0,
    random_roll: bool = False,
) -> tf.Tensor:
    """Alternating spans, first text and last noise, of random lengths; how much and how many follow from the length.

    All such masks are equally likely. A sequence of one token has no noise. `random_roll` turns the mask by a random
    offset, so that it may begin with noise. Bool [length].
    """
    true_length, length = length, tf.maximum(length, 2)
    noise = tf.cast(tf.round(tf.cast(length, tf.float32) * noise_density), tf.int32)
    noise = tf.clip_by_value(noise, 1, length - 1)
    spans = tf.maximum(tf.cast(tf.round(tf.cast(noise, tf.float32) / mean_noise_span_length), tf.int32), 1)
    noise_starts = _random_starts(noise, spans, seeds[0])
    text_starts = _random_starts(length - noise, spans, seeds[1])
    # Span k of the text and span k of the noise, laid end to end: each begins where those before it end.
    ends = tf.cumsum(tf.reshape(tf.stack([_lengths(text_starts), _lengths(noise_starts)], axis=1), [-1]))
    boundaries = tf.math.unsorted_segment_sum(tf.ones_like(ends[:-1]), ends[:-1], length)
    mask = (tf.cumsum(boundaries) % 2 == 1)[:true_length]
    if not random_roll:
        return mask
    seed = tf.stack([seeds[0][0] + seeds[1][1], seeds[0][1] - seeds[1][0]])
    return tf.roll(mask, tf.random.stateless_uniform([], maxval=length, dtype=tf.int32, seed=seed), axis=0)


def _random_starts(items: tf.Tensor, segments: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Marks with 1 where the first item and those beginning one of `segments` random segments stand. Int [items]."""
    others = tf.cast(tf.range(items - 1) < segments - 1, tf.int32)
    return tf.concat([[1], seqio.stateless_shuffle(others, seed)], axis=0)


def _lengths(starts: tf.Tensor) -> tf.Tensor:
    return tf.math.bincount(tf.cumsum(starts) - 1)


# ----------------------------------------------------------------------------------- tokens and mask to inputs, targets


def _sentinel(vocabulary: seqio.Vocabulary) -> int:
    """The first sentinel, <extra_id_0>: the last id; the others count downwards from it."""
    return vocabulary.vocab_size - 1


def noise_token_to_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary, seeds: tf.Tensor | None = None
) -> tf.Tensor:
    """Each noise token becomes the first sentinel (MASS)."""
    return tf.where(noise_mask, tf.cast(_sentinel(vocabulary), tokens.dtype), tokens)


def noise_span_to_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary, seeds: tf.Tensor | None = None
) -> tf.Tensor:
    """Each span of noise becomes one first sentinel."""
    keep = tf.logical_not(noise_mask) | _first_of_span(noise_mask)
    return tf.boolean_mask(noise_token_to_sentinel(tokens, noise_mask, vocabulary), keep)


def nonnoise_span_to_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary, seeds: tf.Tensor | None = None
) -> tf.Tensor:
    """Each span of text becomes one first sentinel."""
    return noise_span_to_sentinel(tokens, tf.logical_not(noise_mask), vocabulary)


def noise_span_to_unique_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary, seeds: tf.Tensor | None = None
) -> tf.Tensor:
    """Span k of the noise becomes sentinel k: "Thank you <X> me to your party <Y> week ." """
    first = _first_of_span(noise_mask)
    sentinels = _sentinel(vocabulary) + 1 - tf.cumsum(tf.cast(first, tokens.dtype))
    return tf.boolean_mask(tf.where(first, sentinels, tokens), tf.logical_not(noise_mask) | first)


def nonnoise_span_to_unique_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary, seeds: tf.Tensor | None = None
) -> tf.Tensor:
    """Span k of the text becomes sentinel k: "<X> for inviting <Y> last <Z>"."""
    return noise_span_to_unique_sentinel(tokens, tf.logical_not(noise_mask), vocabulary)


def drop_noise_tokens(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary, seeds: tf.Tensor | None = None
) -> tf.Tensor:
    """The text without its noise."""
    return tf.boolean_mask(tokens, tf.logical_not(noise_mask))


def drop_nonnoise_tokens(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary, seeds: tf.Tensor | None = None
) -> tf.Tensor:
    """The noise alone."""
    return tf.boolean_mask(tokens, noise_mask)


def _first_of_span(mask: tf.Tensor) -> tf.Tensor:
    return mask & tf.logical_not(tf.pad(mask[:-1], [[1, 0]]))
