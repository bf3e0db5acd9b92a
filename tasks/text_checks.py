"""Count what a vocabulary and the lengths of a run do to texts: cut, unknown, empty, or not given back.

Must not import: files, other tasks.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import seqio

from tasks import vocabulary as vocabularies

MOST_ROWS = 20_000  # rows of a file that are counted


@dataclasses.dataclass
class Counts:
    """Of one feature of the rows of a file."""

    tokens: int = 0
    longest: int = 0  # tokens of a text, with the end
    cut: int = 0  # texts longer than the run's length
    empty: int = 0
    unknown: int = 0  # tokens that are <unk>
    lost: int = 0  # texts that encoding and decoding do not give back even after normalisation: they have an <unk>
    changed: int = 0  # texts that come back otherwise than they are in the file, such as with single spaces
    unknown_texts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def given_back(which: seqio.Vocabulary, text: str) -> str | None:
    """Return the text as a model that writes it without a mistake gives it back, or None if it cannot.

    The vocabulary may normalise it (one space for several, composed accents). It cannot give back what is <unk>.
    """
    vocabulary = vocabularies.resolved(which)
    ids = list(vocabulary.encode(text))
    return None if vocabulary.unk_id in ids else vocabulary.decode(ids)


def count(rows: Iterable[Mapping[str, str]], which: seqio.Vocabulary, lengths: Mapping[str, int]) -> dict[str, Counts]:
    """Count the texts of each feature.

    Args:
      lengths: tokens of each feature, with the end; a feature without a length is never cut.
    """
    vocabulary = vocabularies.resolved(which)
    counts: dict[str, Counts] = collections.defaultdict(Counts)
    for row in rows:
        for feature, text in row.items():
            ids, own = list(vocabulary.encode(text)), counts[feature]
            own.tokens += len(ids) + 1
            own.longest = max(own.longest, len(ids) + 1)
            own.cut += len(ids) + 1 > lengths.get(feature, len(ids) + 1)
            own.empty += not text.strip()
            if vocabulary.unk_id in ids:
                own.unknown += ids.count(vocabulary.unk_id)
                own.lost += 1
                own.unknown_texts.update(_unknown_parts(vocabulary, text))
            elif feature == "targets":
                own.changed += vocabulary.decode(ids) != text
    return counts


def _unknown_parts(vocabulary: seqio.Vocabulary, text: str) -> list[str]:
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return []
    pieces = vocabulary.tokenizer.encode(text, out_type=str)
    return [piece for piece in pieces if vocabulary.tokenizer.piece_to_id(piece) == vocabulary.unk_id]


def sentences(path: str, counts: Mapping[str, Counts], lengths: Mapping[str, int]) -> Iterator[str]:
    """Yield a line for each thing that a user should know of a file."""
    for feature, own in counts.items():
        is_target = feature == "targets"
        if own.cut:
            limit = f"TASK_FEATURE_LENGTHS['{feature}'] = {lengths[feature]}"
            never = ", and a cut target is never matched exactly" if is_target else ""
            yield f"{path}: {own.cut:,} {feature} are cut to {limit} tokens; the longest has {own.longest:,}{never}"
        if own.empty:
            yield f"{path}: {own.empty:,} {feature} are empty"
        if own.unknown:
            parts = ", ".join(repr(part) for part, _ in own.unknown_texts.most_common(5))
            parts, never = f" ({parts})" * bool(parts), ", which no model can write" * is_target
            yield (
                f"{path}: {own.unknown:,} of {own.tokens:,} tokens of the {feature} are <unk>{parts}, in {own.lost:,} "
                f"{feature}{never}: use another VOCABULARY, or write these characters in another way"
            )
        if own.changed:
            yield (
                f"{path}: {own.changed:,} {feature} come back from the vocabulary otherwise than they are written, "
                "such as with single spaces; metrics compare what comes back"
            )
