"""BERT's WordPiece vocabularies, from the vocab.txt of a Hugging Face directory or of google-research/bert.

seqio.BertWordPieceVocabulary pads the pieces of each word to the same number; here they are concatenated, and text is
cleaned as in BERT's tokenizer. Must not import: tasks, models.
"""

import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_text as tf_text

from tasks.errors import MissingFileError, UserError


class WordPieceVocabulary(seqio.BertWordPieceVocabulary):
    """A vocabulary from a vocab.txt, one piece per line.

    The tokenizer_config.json in the same folder says whether text is lower-cased (`do_lower_case`, default true, as in
    Hugging Face) and accents are stripped (`strip_accents`, default as lower-casing). Without that file, both are done
    if no piece has a capital letter.

    Raises:
      MissingFileError: the file does not exist.
      UserError: [PAD] is not first, another special token is missing, or the config has unsupported settings.
    """

    def __init__(self, path: str):
        if not tf.io.gfile.exists(path):
            raise MissingFileError(f"no WordPiece vocabulary at {path}: give the path of a BERT's vocab.txt")
        with tf.io.gfile.GFile(path) as file:
            self.pieces = file.read().removesuffix("\n").split("\n")
        ids = {piece: i for i, piece in enumerate(self.pieces)}
        if missing := [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if piece not in ids]:
            raise UserError(f"{path} is not a BERT vocab.txt: it lacks {', '.join(missing)}")
        if ids["[PAD]"] != 0:
            raise UserError(f"{path} has [PAD] on line {ids['[PAD]'] + 1}: padding must be token 0, the first line")
        self.file, (self.lower_case, self.strip_accents) = path, _switches(path, self.pieces)
        super().__init__(path, start_of_sequence_id=ids["[CLS]"], end_of_sequence_id=ids["[SEP]"])

    @property
    def _base_vocab_size(self) -> int:
        return len(self.pieces)  # SeqIO's has one more, an out-of-vocabulary bucket of TensorFlow's table

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        text = tf.strings.regex_replace(s, r"[\t\n\r\p{Zs}\p{Zl}\p{Zp}]", " ")
        text = tf.strings.regex_replace(text, r"[\p{C}\x{FFFD}]", "")
        if self.strip_accents:
            text = tf.strings.regex_replace(tf_text.normalize_utf8(text, "NFD"), r"\p{Mn}", "")
        if self.lower_case:
            text = tf.strings.lower(text, encoding="utf-8")
        return tf.cast(self.tf_tokenizer.tokenize(text).flat_values, tf.int32)

    def _encode(self, s: str) -> Sequence[int]:
        return self._encode_tf(tf.constant(s)).numpy().tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words joined by single spaces, without padding; special tokens are written out."""
        pieces = (self.pieces[i] if i < len(self.pieces) else "[UNK]" for i in np.asarray(list(ids), int) if i)
        return " ".join(pieces).replace(" ##", "")

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and (self.lower_case, self.strip_accents) == (
            getattr(other, "lower_case", None),
            getattr(other, "strip_accents", None),
        )

    def __str__(self) -> str:
        case = "lower-cased" if self.lower_case else "cased"
        return f"WordPiece of {self.file}: {len(self.pieces)} pieces, {case}"


def _switches(path: str, pieces: Sequence[str]) -> tuple[bool, bool]:
    """Return whether text is lower-cased, and whether accents are stripped."""
    config = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    if not tf.io.gfile.exists(config):
        lower = not any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
        return lower, lower
    with tf.io.gfile.GFile(config) as file:
        settings = json.loads(file.read())
    if settings.get("tokenize_chinese_chars", True) is False:
        raise UserError(f"{config}: tokenize_chinese_chars is False; TensorFlow's tokenizer supports only True")
    lower, strip = bool(settings.get("do_lower_case", True)), settings.get("strip_accents")
    return lower, lower if strip is None else bool(strip)
