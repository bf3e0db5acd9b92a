"""Measure a vocabulary on text: fertility, coverage of characters, and the round trip.

Must not depend on tasks or on the source of the text.
"""

import collections
import dataclasses
from collections.abc import Iterable

import sentencepiece

SPACE = "\u2581"  # SentencePiece's character for a space, also for the one added before the first word


@dataclasses.dataclass
class Report:
    """Counts over the measured texts; a text is a document, or one feature of an example."""

    texts: int = 0
    characters: int = 0  # of the normalised text
    words: int = 0  # separated by white space
    tokens: int = 0
    unknown: int = 0  # tokens that are <unk>
    bytes: int = 0  # tokens that are a byte of a character without a piece
    changed: int = 0  # texts that normalisation changes
    whole: int = 0  # texts without <unk>, for which a round trip is possible
    returned: int = 0  # those of them that decode(encode(text)) restores as normalised
    used: set[int] = dataclasses.field(default_factory=set)
    # Characters without a piece of their own, with their counts.
    uncovered: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def fertility(self) -> float:
        """Tokens per word."""
        return self.tokens / max(self.words, 1)

    @property
    def characters_per_token(self) -> float:
        return self.characters / max(self.tokens, 1)

    @property
    def coverage(self) -> float:
        """The share of tokens that are not <unk>."""
        return 1 - self.unknown / max(self.tokens, 1)

    @property
    def lossless(self) -> bool:
        """Whether every text without <unk> survives the round trip."""
        return self.returned == self.whole


def measure(model: sentencepiece.SentencePieceProcessor, texts: Iterable[str]) -> Report:
    """Encode and decode each text, and compare the result with the model's normalisation of the text.

    Normalised text has U+2581 for each space, and with T5's models one before the first word, which decoding removes.
    """
    prefix = " " * model.normalize("a").startswith(SPACE)
    report, characters = Report(), collections.Counter()
    for text in texts:
        normalized = model.normalize(text).replace(SPACE, " ").removeprefix(prefix)
        ids = model.encode(text)
        unknown = ids.count(model.unk_id())
        report.texts += 1
        report.characters += len(normalized)
        report.words += len(normalized.split())
        report.tokens += len(ids)
        report.unknown += unknown
        report.bytes += sum(map(model.is_byte, ids))
        report.changed += normalized != text
        report.whole += not unknown
        report.returned += not unknown and model.decode(ids) == normalized
        report.used.update(ids)
        characters.update(normalized)
    report.used -= {model.unk_id()}
    for character, count in characters.items():
        if model.is_unknown(model.piece_to_id(SPACE if character == " " else character)):
            report.uncovered[character] = count
    return report


def pieces(model: sentencepiece.SentencePieceProcessor) -> int:
    """Return the number of pieces for text: all except padding, EOS and unknown."""
    return sum(not (model.is_control(i) or model.is_unknown(i)) for i in range(model.get_piece_size()))


def to_text(report: Report, model: sentencepiece.SentencePieceProcessor) -> str:
    """Format the report as text."""
    rows = [
        ("tokens", f"{report.tokens:,}"),
        ("tokens per word (fertility)", f"{report.fertility:.3f}"),
        ("characters per token", f"{report.characters_per_token:.3f}"),
        ("coverage: tokens that are not <unk>", f"{report.coverage:.4%}"),
    ]
    if any(map(model.is_byte, range(model.get_piece_size()))):
        rows.append(("tokens that are single bytes", f"{report.bytes / max(report.tokens, 1):.4%}"))
    rows += [
        ("pieces used", f"{len(report.used):,} of {pieces(model):,}"),
        ("characters without a piece", _uncovered(report)),
        ("texts that normalisation changes", f"{report.changed:,} of {report.texts:,}"),
        ("round trip", _round_trip(report)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _uncovered(report: Report) -> str:
    if not report.uncovered:
        return "none"
    most = report.uncovered.most_common(8)
    shown = ", ".join(f"U+{ord(c):04X}{f' {c}' if c.isprintable() else ''} ({n:,})" for c, n in most)
    more = ", ..." if len(report.uncovered) > len(most) else ""
    total, different = report.uncovered.total(), len(report.uncovered)
    return f"{total / report.characters:.4%}: {total:,} of {report.characters:,}, {different:,} distinct: {shown}{more}"


def _round_trip(report: Report) -> str:
    counts = f"{report.returned:,} of {report.whole:,} texts are restored as normalised"
    if report.texts > report.whole:
        counts += f" ({report.texts - report.whole:,} others contain <unk>)"
    return f"{'lossless' if report.lossless else 'NOT LOSSLESS'}, {counts}"
