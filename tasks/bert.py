"""BERT's pre-training task: masked language modelling and next-sentence prediction, on C4.

The features of `c4_v220_bert`, for sequences [CLS] A [SEP] B [SEP] of at most `TASK_FEATURE_LENGTHS["inputs"]` tokens:

  inputs     the tokens; of 15 % selected ones, 80 % become [MASK], 10 % a random token and 10 % stay unchanged
  targets    the original token at the selected positions, 0 elsewhere
  segments   0 for [CLS] A [SEP], 1 for B [SEP]
  random     [1] if B is from another document, [0] if it follows A

Source: google-research/bert, create_pretraining_data.py (not to be confused with T5's "BERT-style" objective). B is
taken from another document in the same block of 128. Must not import: models, other tasks.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from tasks import c4, data_sources, objectives, vocabulary
from tasks.errors import UserError

_SHORT = 0.1  # share of sequences that are shortened at random, to match the shorter inputs of fine-tuning
_SELECTED, _MASKED, _RANDOM = 0.15, 0.8, 0.1


class Special(NamedTuple):
    """Ids of the tokens that only BERT has."""

    cls: int
    sep: int
    mask: int


def special(vocab: seqio.Vocabulary) -> Special:
    """Return [CLS], [SEP] and [MASK] of a WordPiece vocabulary, or the sentinels <extra_id_1>, _2 and _0 of another.

    Raises UserError if the vocabulary has neither.
    """
    vocab = vocabulary.resolved(vocab)
    if isinstance(vocab, seqio.BertWordPieceVocabulary):
        ids = np.asarray(vocab._vocab.lookup(tf.constant(["[CLS]", "[SEP]", "[MASK]"]))).tolist()
        if min(ids) < 0:
            raise UserError(f"the WordPiece vocabulary lacks one of [CLS], [SEP], [MASK]: their ids are {ids}")
        return Special(*ids)
    vocabulary.require_sentinels(vocab, 3)
    first = getattr(vocab, "first_sentinel", vocab.vocab_size - 1)
    return Special(cls=first - 1, sep=first - 2, mask=first)


def needed_length(sequence_length: objectives.Lengths | None) -> int:
    """Return the length of a row. Raises UserError if it is missing or too short for a pair."""
    length = objectives.needed_lengths(sequence_length, "inputs")["inputs"]
    if length < 5:
        raise UserError(f"TASK_FEATURE_LENGTHS['inputs'] = {length}: [CLS] A [SEP] B [SEP] needs 5 tokens or more")
    return length


def sentences(dataset: tf.data.Dataset, output_features: objectives.Features) -> tf.data.Dataset:
    """Tokenise documents to `targets`, with the number of tokens of each sentence in `sentences`."""
    vocab = output_features["targets"].vocabulary

    def split(x: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        lines = tf.strings.split(tf.strings.regex_replace(x["text"], r"([.!?])\s+", "\\1\n"), "\n")
        tokens = tf.map_fn(vocab.encode_tf, lines, fn_output_signature=tf.RaggedTensorSpec([None], tf.int32, 0))
        sizes = tf.cast(tokens.row_lengths(), tf.int32)
        return {"targets": tokens.flat_values, "sentences": tf.boolean_mask(sizes, sizes > 0)}

    tokens = dataset.map(split, num_parallel_calls=tf.data.AUTOTUNE)
    return tokens.filter(lambda x: tf.size(x["targets"]) > 0)


def masked_pairs(
    dataset: tf.data.Dataset, sequence_length: objectives.Lengths | None, output_features: objectives.Features
) -> tf.data.Dataset:
    """Turn documents split into sentences into the four features above."""
    length = needed_length(sequence_length)
    vocab = output_features["targets"].vocabulary
    ids = special(vocab)

    def make(tokens: np.ndarray, sizes: np.ndarray, seeds: np.ndarray) -> list[list[np.ndarray]]:
        documents = [
            np.split(row[: sum(cuts)], np.cumsum(cuts[cuts > 0])[:-1]) for row, cuts in zip(tokens, sizes, strict=True)
        ]
        columns: list[list[np.ndarray]] = [[], [], [], []]
        for i, seed in enumerate(seeds):
            rng = np.random.default_rng(seed.astype(np.uint64))
            for first, second, is_random in _pairs(documents, i, length - 3, rng):
                text = np.concatenate([[ids.cls], first, [ids.sep], second, [ids.sep]]).astype(np.int32)
                inputs, targets = _mask(text, ids, vocab.vocab_size, rng)
                segments = (np.arange(len(text)) >= len(first) + 2).astype(np.int32)
                for column, value in zip(columns, (inputs, targets, segments, [is_random]), strict=True):
                    column.append(np.array(value, np.int32))
        return columns

    names = ["inputs", "targets", "segments", "random"]
    return objectives.map_blocks(dataset, make, names, features=("targets", "sentences"))


def _pairs(
    documents: Sequence[list[np.ndarray]], i: int, room: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield document i as pairs A, B of at most `room` tokens together, at least one each.

    Sentences are collected until they fill a sequence. A is a random prefix of them. B is the rest or, in half of the
    cases and if there is no rest, sentences of another document; then the rest goes to the next pair.
    """
    document, start = documents[i], 0
    while start < len(document):
        target_length = rng.integers(2, room + 1) if rng.random() < _SHORT else room
        end, total = start, 0
        while end < len(document) and total < target_length:
            total, end = total + len(document[end]), end + 1
        middle = start + (rng.integers(1, end - start) if end - start > 1 else 1)
        first = np.concatenate(document[start:middle])
        is_random = len(documents) > 1 and (middle == end or rng.random() < 0.5)
        if is_random:
            other = documents[(i + int(rng.integers(1, len(documents)))) % len(documents)]
            second = np.concatenate(other[rng.integers(len(other)) :])[: max(target_length - len(first), 1)]
            end = middle
        elif middle < end:
            second = np.concatenate(document[middle:end])
        else:
            return  # one sentence, and no other document to take B from
        yield *_cut(first, second, room, rng), is_random
        start = end


def _cut(first: np.ndarray, second: np.ndarray, room: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Truncate both until they fit: the longer one loses a token at its front or end, at random."""
    while (over := len(first) + len(second) - room) > 0:
        longer, shorter = (first, second) if len(first) > len(second) else (second, first)
        drop = min(over, max(len(longer) - len(shorter), 1))
        front = rng.binomial(drop, 0.5)
        cut = longer[front : len(longer) - (drop - front)]
        first, second = (cut, second) if longer is first else (first, cut)
    return first, second


def _mask(text: np.ndarray, ids: Special, vocab_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets of masked language modelling; [CLS] and [SEP] are never selected."""
    candidates = np.flatnonzero((text != ids.cls) & (text != ids.sep))
    count = min(max(1, round(_SELECTED * len(text))), max(1, 20 * len(text) // 128), len(candidates))
    selected = rng.permutation(candidates)[:count]
    draw = rng.random(count)
    new = np.where(draw < _MASKED, ids.mask, rng.integers(3, vocab_size, count))
    inputs, targets = text.copy(), np.zeros_like(text)
    inputs[selected] = np.where(draw < _MASKED + _RANDOM, new, text[selected])
    targets[selected] = text[selected]
    return inputs, targets


seqio.TaskRegistry.add(
    "c4_v220_bert",
    source=c4.source,  # pyright: ignore[reportArgumentType]  as in c4.py
    preprocessors=[sentences, seqio.CacheDatasetPlaceholder(), masked_pairs],
    output_features={
        **{name: seqio.Feature(vocabulary.SHARED, add_eos=False) for name in ("inputs", "targets")},
        **{name: seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False) for name in ("segments", "random")},
    },
    metric_fns=[],
    task_cls=data_sources.CorpusTask,
)
