"""The WordPiece tokenizer of a vocab.txt, without TensorFlow.

Must not depend on models, checkpoints or tasks.
"""

import json
import unicodedata
from collections.abc import Sequence

from t5x_lite.convert.bucket import AnyPath, place_of
from t5x_lite.errors import UserError

_LONGEST = 100  # characters; longer words become [UNK]


class WordPiece:
    """A tokenizer from a vocab.txt, one piece per line; gives the same tokens as Hugging Face's BertTokenizer.

    The tokenizer_config.json in the same folder says whether text is lower-cased (`do_lower_case`, default true),
    accents are stripped (`strip_accents`, default as lower-casing) and Chinese characters are tokens of their own
    (`tokenize_chinese_chars`, default true). Without that file, text is lower-cased if no piece has a capital letter.

    Raises UserError if [PAD] is not on the first line or another special token is missing.
    """

    def __init__(self, file: str | AnyPath):
        file = place_of(file)
        self._pieces = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        if self._pieces[0] != "[PAD]" or not self._ids.keys() >= set(special):
            raise UserError(f"{file} is not a BERT vocab.txt: it needs [PAD] on its first line, and {special[1:]}")
        _, self._unknown, self.cls, self.sep, self.mask = (self._ids[piece] for piece in special)
        config = file.parent / "tokenizer_config.json"
        cased = any(p != p.lower() for p in self._pieces if not p.startswith("["))
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {"do_lower_case": not cased}
        self._lower_case = bool(settings.get("do_lower_case", True))
        strip = settings.get("strip_accents")
        self._strip_accents = self._lower_case if strip is None else bool(strip)
        self._split_chinese = bool(settings.get("tokenize_chinese_chars", True))

    def __len__(self) -> int:
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Return token ids, without special tokens."""
        text = "".join(map(_cleaned, text))
        if self._strip_accents:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        if self._lower_case:
            text = text.lower()
        text = "".join(f" {c} " if _alone(c, self._split_chinese) else c for c in text)
        return [token for word in text.split() for token in self._word(word)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the words joined by single spaces, without padding; special tokens are written out."""
        pieces = (self._pieces[i] if i < len(self._pieces) else "[UNK]" for i in map(int, tokens) if i)
        return " ".join(pieces).replace(" ##", "")

    def _word(self, word: str) -> list[int]:
        """Tokenize a word greedily, longest piece first; [UNK] if a part of it has no piece."""
        tokens, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._ids), None)
            if end is None or len(word) > _LONGEST:
                return [self._unknown]
            tokens.append(self._ids[prefix + word[start:end]])
            start = end
        return tokens


def _cleaned(c: str) -> str:
    kind = unicodedata.category(c)
    if c in "\t\n\r" or kind.startswith("Z"):
        return " "
    return "" if c == "\ufffd" or kind in ("Cc", "Cf", "Co", "Cs") else c


# Code point ranges of Chinese and Japanese characters, as in BERT.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _alone(c: str, split_chinese: bool) -> bool:
    """Return whether a character is a token of its own: punctuation (and ASCII symbols) or an ideograph."""
    code = ord(c)
    if code < 128:
        return 32 < code and not c.isalnum() and code != 127
    is_ideograph = any(first <= code <= last for first, last in _IDEOGRAPHS)
    return unicodedata.category(c).startswith("P") or (split_chinese and is_ideograph)
