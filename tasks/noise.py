"""Noise masks and encodings of T5's denoising objectives, in numpy.

All functions work on N pieces of text of one length L at once:

  mask      (length L, noise_density, seeds [N, 2, 2]) -> bool [N, L], True for noise tokens
  encoding  (tokens [N, L], mask [N, L], vocabulary, seeds [N, 2, 2]) -> values [N, L], keep bool [N, L];
            the result of a row is values[keep]

All randomness of a row is a function of its seeds, so any position in the data can be replayed. The random numbers are
those of TensorFlow's stateless functions: the same seeds give the same examples as the t5 package. They are generated
here for all rows at once, because a TensorFlow call per row would take most of a pipeline's time.

Must not import: TensorFlow, SeqIO, datasets, task names.
"""

from typing import Protocol

import numpy as np

from tasks.errors import UserError


class Vocabulary(Protocol):
    @property
    def vocab_size(self) -> int: ...


# ------------------------------------------------------------------------------------------------------- random numbers

_U32, _BITS = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLY = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_ADVANCE = np.arange(10, dtype=np.uint64)[:, None] * np.array([0x9E3779B9, 0xBB67AE85], np.uint64)


def _philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011): counter uint64 [4, N, n] and key [2, N, 1], 32 bits each -> [4, N, n]."""
    counter = counter.copy()
    even, odd = counter[::2], counter[1::2]
    products = np.empty_like(even)
    for round_key in (key + _ADVANCE[:, :, None, None]) & _U32:
        np.multiply(even, _MULTIPLY[:, None, None], out=products)
        np.right_shift(products[::-1], _BITS, out=even)
        even ^= odd
        even ^= round_key
        np.bitwise_and(products[::-1], _U32, out=odd)
    return counter


def _random_bits(seeds: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` 32-bit numbers of TensorFlow's kernels, seeds int [N, 2] -> uint64 [N, count]."""
    seeds = np.ascontiguousarray(seeds, np.int64).view(np.uint64)
    words = np.stack([seeds & _U32, seeds >> _BITS], axis=-1).reshape(len(seeds), 4).T[:, :, None]
    scrambled = _philox(words, np.array([0x3EC8F720, 0x02461E29], np.uint64)[:, None, None])
    counter = np.zeros((4, len(seeds), (count + 3) // 4), np.uint64)
    counter[0] = np.arange(counter.shape[2])
    counter[2:] = scrambled[2:]
    return np.moveaxis(_philox(counter, scrambled[:2]), 0, -1).reshape(len(seeds), -1)[:, :count]


def uniform(seeds: np.ndarray, count: int) -> np.ndarray:
    """Return float32 [N, count] in [0, 1): row n is tf.random.stateless_uniform([count], seeds[n])."""
    bits = (_random_bits(seeds, count).astype(np.uint32) & np.uint32(0x7FFFFF)) | np.uint32(0x3F800000)
    return bits.view(np.float32) - np.float32(1)


def integers(seeds: np.ndarray, count: int, low: int, high: int) -> np.ndarray:
    """Return int32 [N, count]: row n is tf.random.stateless_uniform([count], seeds[n], low, high, tf.int32)."""
    return (low + _random_bits(seeds, count) % np.uint64(high - low)).astype(np.int32)


def split(seeds: np.ndarray, count: int) -> np.ndarray:
    """Return `count` new seeds for each, int64 [N, count, 2], like tf.random.split of an int64 seed."""
    bits = _random_bits(seeds, 4 * count).reshape(len(seeds), count, 2, 2)
    return (bits[..., 0] | bits[..., 1] << _BITS).view(np.int64)


def _permutations(size: int, seeds: np.ndarray) -> np.ndarray:
    """Return a permutation of 0..size-1 for each seed, [N, size], that of seqio.stateless_shuffle."""
    drawn = _random_bits(seeds, size) & np.uint64(0x7FFFFF)  # the bits of `uniform`
    keys = np.sort(drawn << _BITS | np.arange(size, dtype=np.uint64), axis=1)  # much faster than argsort
    return (keys & _U32).view(np.int64)


# ---------------------------------------------------------------------------------------------------------------- masks


def noise_counts(length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """Return the number of noise tokens and spans for `length` (at least 2); rounds half to even, in float32."""
    noise = min(max(round(float(np.float32(length) * np.float32(noise_density))), 1), length - 1)
    return noise, max(round(float(np.float32(noise) / np.float32(mean_noise_span_length))), 1)


def iid_noise_mask(length: int, noise_density: float, seeds: np.ndarray) -> np.ndarray:
    """Each token is noise independently with probability `noise_density`."""
    return uniform(seeds[:, 0], length) < np.float32(noise_density)


def random_spans_noise_mask(
    length: int,
    noise_density: float,
    seeds: np.ndarray,
    mean_noise_span_length: float = 3.0,
    random_roll: bool = False,
) -> np.ndarray:
    """Alternating spans of random lengths, first text and last noise; `noise_counts` gives their total and number.

    All such masks are equally likely. A sequence of one token has no noise. `random_roll` rotates each mask by a random
    offset, so that it may begin with noise.
    """
    true_length, length = length, max(length, 2)
    noise, spans = noise_counts(length, noise_density, mean_noise_span_length)
    # Text span k is followed by noise span k; a span starts where the previous one ends.
    lengths = np.stack(
        [_span_lengths(length - noise, spans, seeds[:, 1]), _span_lengths(noise, spans, seeds[:, 0])], axis=2
    )
    ends = np.cumsum(lengths.reshape(len(seeds), -1), axis=1)
    boundaries = np.zeros((len(seeds), length + 1), bool)
    np.put_along_axis(boundaries, ends, True, axis=1)
    mask = np.logical_xor.accumulate(boundaries[:, :true_length], axis=1)
    if not random_roll:
        return mask
    roll_seeds = np.stack([seeds[:, 0, 0] + seeds[:, 1, 1], seeds[:, 0, 1] - seeds[:, 1, 0]], axis=1)
    return np.take_along_axis(mask, (np.arange(true_length) - integers(roll_seeds, 1, 0, length)) % true_length, axis=1)


def _span_lengths(items: int, spans: int, seeds: np.ndarray) -> np.ndarray:
    """Return random span lengths [N, spans], at least 1, that sum to `items`; all compositions are equally likely."""
    first = _permutations(items - 1, seeds) < spans - 1  # whether item k + 1 starts a span
    starts = np.nonzero(first)[1].reshape(len(seeds), spans - 1) + 1
    return np.diff(starts, axis=1, prepend=0, append=items)


def random_prefix_noise_mask(length: int, noise_density: float, seeds: np.ndarray) -> np.ndarray:
    """A prefix is noise; its length is uniform over [1, length - 1], so the density must be 0.5."""
    if noise_density != 0.5:
        raise UserError(f"noise_density {noise_density}: the length of a prefix is uniform, so it must be 0.5")
    shortest = min(1, length - 1)
    return np.arange(length) < integers(seeds[:, 0], 1, shortest, max(length, shortest + 1))


def random_end_noise_mask(length: int, noise_density: float, seeds: np.ndarray) -> np.ndarray:
    """The end is noise; its length is uniform from 1 to `longest_end`, so its mean is that of the density."""
    longest = longest_end(length, noise_density)
    if not longest:
        return np.zeros((len(seeds), length), bool)
    return np.arange(length) >= length - integers(seeds[:, 0], 1, 1, longest + 1)


def longest_end(length: int, noise_density: float) -> int:
    """Return the most noise tokens that `random_end_noise_mask` has, less than `length`."""
    return min(max(round(2 * noise_density * length) - 1, 1), length - 1)


# ------------------------------------------------------------------------------------------------------------ encodings


def _sentinel(vocabulary: Vocabulary) -> int:
    """Return the first sentinel, <extra_id_0>; the others count down from it. It is the last id, or a vocabulary with
    tokens behind it says which."""
    return getattr(vocabulary, "first_sentinel", vocabulary.vocab_size - 1)


def _all(tokens: np.ndarray) -> np.ndarray:
    return np.ones(tokens.shape, bool)


def _first_of_span(mask: np.ndarray) -> np.ndarray:
    return mask & ~np.pad(mask[:, :-1], [[0, 0], [1, 0]])[:, : mask.shape[1]]


def noise_token_to_sentinel(tokens, mask, vocabulary, seeds=None):
    """Each noise token becomes the first sentinel (MASS)."""
    return np.where(mask, np.int32(_sentinel(vocabulary)), tokens), _all(tokens)


def noise_span_to_sentinel(tokens, mask, vocabulary, seeds=None):
    """Each noise span becomes a single first sentinel."""
    return noise_token_to_sentinel(tokens, mask, vocabulary)[0], ~mask | _first_of_span(mask)


def nonnoise_span_to_sentinel(tokens, mask, vocabulary, seeds=None):
    """Each text span becomes a single first sentinel."""
    return noise_span_to_sentinel(tokens, ~mask, vocabulary)


def noise_span_to_unique_sentinel(tokens, mask, vocabulary, seeds=None):
    """Noise span k becomes sentinel k: "Thank you <X> me to your party <Y> week ."

    Spans for which there are no more sentinels get the ids below, as in t5, or the last sentinel if the vocabulary says
    which that is.
    """
    first = _first_of_span(mask)
    sentinels = _sentinel(vocabulary) + 1 - np.cumsum(first, axis=1, dtype=np.int32)
    sentinels = np.maximum(sentinels, np.int32(getattr(vocabulary, "last_sentinel", np.iinfo(np.int32).min)))
    return np.where(first, sentinels, tokens), ~mask | first


def nonnoise_span_to_unique_sentinel(tokens, mask, vocabulary, seeds=None):
    """Text span k becomes sentinel k: "<X> for inviting <Y> last <Z>"."""
    return noise_span_to_unique_sentinel(tokens, ~mask, vocabulary)


def drop_noise_tokens(tokens, mask, vocabulary, seeds=None):
    """Noise tokens are dropped."""
    return tokens, ~mask


def drop_nonnoise_tokens(tokens, mask, vocabulary, seeds=None):
    """Only noise tokens are kept."""
    return tokens, mask


def permute_noise_tokens(tokens, mask, vocabulary, seeds):
    """Noise tokens are permuted, others stay (deshuffling, if all tokens are noise)."""
    values = tokens.copy()
    for row, noise, seed in zip(values, mask, seeds, strict=True):
        row[noise] = row[noise][_permutations(noise.sum(), seed[:1])[0]]
    return values, _all(tokens)


def noise_token_to_gathered_token(tokens, mask, vocabulary, seeds):
    """Each noise token becomes a random token of the same piece of text."""
    length = tokens.shape[1]
    positions = integers(seeds[:, 0], length, 0, max(length, 1))
    return np.where(mask, np.take_along_axis(tokens, positions, axis=1), tokens), _all(tokens)


def noise_token_to_random_token(tokens, mask, vocabulary, seeds):
    """Each noise token becomes a random id of the vocabulary, sentinels included; 0, 1 and 2 are never drawn."""
    drawn = integers(seeds[:, 0], tokens.shape[1], 3, vocabulary.vocab_size)
    return np.where(mask, drawn, tokens), _all(tokens)


def noise_token_to_random_token_or_sentinel(tokens, mask, vocabulary, seeds, random_prob=0.1):
    """Each noise token becomes the first sentinel, or with probability `random_prob` a random id (T5's BERT-style)."""
    use_random = uniform(seeds[:, 0], tokens.shape[1]) < np.float32(random_prob)
    random_tokens, keep = noise_token_to_random_token(tokens, mask, vocabulary, seeds[:, 1:])
    return np.where(use_random, random_tokens, noise_token_to_sentinel(tokens, mask, vocabulary)[0]), keep
