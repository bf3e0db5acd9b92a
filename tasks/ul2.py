"""UL2's mixture of denoisers (Tay et al. 2022, arXiv 2205.05131): a piece of text is denoised in one of several ways.

  R   regular: short spans, few tokens, as T5's span corruption
  S   sequential: the end of the text is the target, as with prefixes
  X   extreme: long spans, or half of the tokens

A piece is as long as its denoiser can use: inputs and targets, with EOS and mode tokens, fit TASK_FEATURE_LENGTHS. So
with short targets the denoisers that corrupt much get short pieces. Must not import: files, TFDS, task names.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from tasks import noise, objectives
from tasks import vocabulary as vocabularies
from tasks.errors import UserError
from tasks.objectives import Features, Lengths

Mode = Literal["R", "S", "X"]
MODE_TOKENS: Mapping[str, str] = {"R": "[R]", "S": "[S]", "X": "[X]"}


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to make inputs and targets from a piece of text.

    noise_density: part of the tokens that go to the targets.
    mean_noise_span_length: None is a single span at the end, of uniform length with the mean that the density says.
    rate: how often it is used, relative to the others.
    """

    mode: Mode
    noise_density: float
    mean_noise_span_length: float | None
    rate: float = 1.0

    def __str__(self) -> str:
        span = "the end" if self.mean_noise_span_length is None else f"spans of {self.mean_noise_span_length:g}"
        return f"{self.mode}-denoiser ({span}, {self.noise_density:.0%} noise)"


# Table 1 of the paper; all take part equally.
UL2 = (
    Denoiser("R", 0.15, 3.0),
    Denoiser("R", 0.15, 8.0),
    Denoiser("S", 0.25, None),
    Denoiser("X", 0.5, 3.0),
    Denoiser("X", 0.5, 8.0),
    Denoiser("X", 0.15, 64.0),
    Denoiser("X", 0.5, 64.0),
)
# UL2R (Tay et al. 2022, arXiv 2210.11399), to go on with a trained model: half S, a quarter R and a quarter X.
UL2R = (
    Denoiser("R", 0.15, 3.0, rate=0.25),
    Denoiser("S", 0.25, None, rate=0.5),
    Denoiser("X", 0.15, 32.0, rate=0.125),
    Denoiser("X", 0.5, 3.0, rate=0.125),
)


def ul2(
    dataset: tf.data.Dataset,
    sequence_length: Lengths | None,
    output_features: Features,
    denoisers: Sequence[Denoiser] = UL2,
    mode_tokens: Mapping[str, str] | None = None,
    concatenate: bool = True,
) -> tf.data.Dataset:
    """Split text into pieces, draw a denoiser for each by its rate, and denoise it.

    Args:
      mode_tokens: text that begins the inputs of each mode, such as MODE_TOKENS; None: nothing tells the modes apart.
      concatenate: join blocks of 128 documents before splitting them, as span corruption does.

    Raises:
      UserError: a denoiser does not fit the lengths, or the vocabulary has too few sentinels.
    """
    lengths = objectives.needed_lengths(sequence_length, "inputs", "targets")
    vocabulary = vocabularies.resolved(output_features["targets"].vocabulary)
    prefixes = _prefixes(vocabulary, denoisers, mode_tokens)
    inputs, targets = (lengths[name] - output_features[name].add_eos for name in ("inputs", "targets"))
    pieces = [piece_length(d, inputs - len(prefixes[d.mode]), targets) for d in denoisers]
    vocabularies.require_sentinels(vocabulary, max(map(_checked_spans, denoisers, pieces)))
    bounds = np.cumsum([d.rate for d in denoisers]) / sum(d.rate for d in denoisers)

    def split_and_denoise(documents: Sequence[np.ndarray], seeds: np.ndarray) -> list[list[np.ndarray]]:
        documents = objectives.chunks(documents, seeds)
        texts = [np.concatenate(documents)] if concatenate else documents
        most = sum(len(text) // min(pieces) + 1 for text in texts)
        drawing, shuffling = noise.split(seeds[:1], 2)[0]
        drawn = iter(np.searchsorted(bounds, noise.uniform(drawing[None], most)[0], side="right"))
        cut: list[tuple[int, np.ndarray]] = []
        for text in texts:
            start = 0
            while start < len(text):
                which = min(int(next(drawn)), len(denoisers) - 1)
                cut.append((which, text[start : start + pieces[which]]))
                start += pieces[which]
        keys = noise.split(shuffling[None], max(len(cut), 1))[0]
        columns: list[list] = [[None] * len(cut), [None] * len(cut)]
        for which, denoiser in enumerate(denoisers):
            rows = [row for row, (chosen, _) in enumerate(cut) if chosen == which]
            if not rows:
                continue
            own = [cut[row][1] for row in rows]
            pairs = objectives.corrupted(own, keys[rows], vocabulary, **_steps(denoiser))
            for row, text, target in zip(rows, *pairs, strict=True):
                columns[0][row] = np.concatenate([prefixes[denoiser.mode], text])
                columns[1][row] = target
        return columns

    return objectives.map_blocks(dataset, split_and_denoise, ["inputs", "targets"])


def piece_length(denoiser: Denoiser, inputs: int, targets: int) -> int:
    """Return the number of tokens of a piece, so that the denoiser's inputs and targets fit these lengths.

    Raises UserError if there is none.
    """

    def fits(length: int) -> bool:
        if denoiser.mean_noise_span_length is None:
            return length - 1 <= inputs and noise.longest_end(length, denoiser.noise_density) <= targets
        tokens, spans = noise.noise_counts(length, denoiser.noise_density, denoiser.mean_noise_span_length)
        return length - tokens + spans <= inputs and tokens + spans <= targets

    length = 2
    while fits(length + 1):
        length += 1
    if not fits(length) or length < 4:
        raise UserError(
            f"{denoiser}: no text fits {inputs} tokens of inputs and {targets} of targets (TASK_FEATURE_LENGTHS "
            "without EOS and mode tokens): use longer ones"
        )
    return length


def _checked_spans(denoiser: Denoiser, length: int) -> int:
    """Return the number of spans in a piece, each with a sentinel; log those that pieces of this length cannot have."""
    mean = denoiser.mean_noise_span_length
    if mean is None:
        return 0
    tokens, spans = noise.noise_counts(length, denoiser.noise_density, mean)
    if tokens / spans < 0.75 * mean:
        problem = f"{denoiser} has spans of {tokens // spans} tokens only"
        logging.warning("%s: TASK_FEATURE_LENGTHS is short for it", problem)
    return spans


def _steps(denoiser: Denoiser) -> dict:
    """Return the mask and encodings of a denoiser, as `objectives.corrupted` takes them."""
    if denoiser.mean_noise_span_length is None:
        return {
            "noise_density": denoiser.noise_density,
            "noise_mask": noise.random_end_noise_mask,
            "inputs": noise.drop_noise_tokens,
            "targets": noise.drop_nonnoise_tokens,
        }
    return objectives.spans_to_sentinels(denoiser.noise_density, denoiser.mean_noise_span_length)


def _prefixes(
    vocabulary: seqio.Vocabulary, denoisers: Sequence[Denoiser], mode_tokens: Mapping[str, str] | None
) -> dict[str, np.ndarray]:
    """Return the ids that begin the inputs of each mode. Raises UserError if a mode has none, or an unknown token."""
    if mode_tokens is None:
        return {d.mode: np.zeros(0, np.int32) for d in denoisers}
    modes = list(dict.fromkeys(d.mode for d in denoisers))
    if unknown := [mode for mode in mode_tokens if mode not in modes]:
        raise UserError(f"mode tokens {dict(mode_tokens)} have {unknown[0]!r}; the modes are {', '.join(modes)}")
    prefixes = {}
    for mode in (d.mode for d in denoisers):
        if mode not in mode_tokens:
            raise UserError(f"mode tokens {dict(mode_tokens)} have none for the mode {mode!r}")
        prefixes[mode] = np.array(vocabulary.encode(mode_tokens[mode]), np.int32)
        if not len(prefixes[mode]) or vocabulary.unk_id in prefixes[mode]:
            raise UserError(
                f"the mode token {mode_tokens[mode]!r} is unknown to the vocabulary: choose another text, or add it to "
                "the tokenizer (added_tokens.json)"
            )
    return prefixes
