"""BERT's WordPiece vocabularies, from the vocab.txt of a Hugging Face directory or of google-research/bert.

seqio.BertWordPieceVocabulary pads the pieces of each word to the longest word's number; here they come one behind the
other, of text that is cleaned as BERT's own tokenizer cleans it. Must not know: tasks, models.
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
    """The pieces of a vocab.txt, a line each.

    Text is lower-cased and loses its accents where `do_lower_case` of the tokenizer_config.json beside says so (without
    a word of it, as Hugging Face, yes); where there is no such file, if no piece has a capital.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it has not [PAD] first, or lacks another special token; the config asks for another way of splitting.
    """

    def __init__(self, path: str):
        if not tf.io.gfile.exists(path):
            raise MissingFileError(f"no WordPiece vocabulary at {path}: give the path of a BERT's vocab.txt")
        with tf.io.gfile.GFile(path) as file:
            self.pieces = file.read().removesuffix("\n").split("\n")
        ids = {piece: i for i, piece in enumerate(self.pieces)}
        if missing := [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if piece not in ids]:
            raise UserError(f"{path} is no BERT's vocab.txt: it lacks {', '.join(missing)}")
        if ids["[PAD]"] != 0:
            raise UserError(f"{path} has [PAD] in line {ids['[PAD]'] + 1}: padding must be token 0, its first line")
        self.file, self.lower_case = path, _lower_case(path, self.pieces)
        super().__init__(path, start_of_sequence_id=ids["[CLS]"], end_of_sequence_id=ids["[SEP]"])

    @property
    def _base_vocab_size(self) -> int:
        return len(self.pieces)  # SeqIO's has one more, which TensorFlow's table keeps for what [UNK] stands for here

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        text = tf.strings.regex_replace(s, r"[\t\n\r\p{Zs}\p{Zl}\p{Zp}]", " ")
        text = tf.strings.regex_replace(text, r"[\p{C}\x{FFFD}]", "")
        if self.lower_case:
            text = tf_text.normalize_utf8(tf.strings.lower(text, encoding="utf-8"), "NFD")
            text = tf.strings.regex_replace(text, r"\p{Mn}", "")
        return tf.cast(self.tf_tokenizer.tokenize(text).flat_values, tf.int32)

    def _encode(self, s: str) -> Sequence[int]:
        return self._encode_tf(tf.constant(s)).numpy().tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Words with single spaces between them, padding left out; special tokens as they are written."""
        known = (self.pieces[i] if i < len(self.pieces) else "[UNK]" for i in np.asarray(list(ids), int) if i)
        return " ".join(known).replace(" ##", "")

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.lower_case == getattr(other, "lower_case", None)

    def __str__(self) -> str:
        case = "text in lower case" if self.lower_case else "text as it is"
        return f"WordPiece of {self.file}: {len(self.pieces)} pieces, {case}"


def _lower_case(path: str, pieces: Sequence[str]) -> bool:
    config = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    if not tf.io.gfile.exists(config):
        return not any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
    with tf.io.gfile.GFile(config) as file:
        said = json.loads(file.read())
    lower = bool(said.get("do_lower_case", True))
    for key, due in (("tokenize_chinese_chars", True), ("strip_accents", lower)):
        if said.get(key, due) not in (due, None):
            raise UserError(f"{config}: {key} is {said[key]!r}; BERT as published, and here, has {due!r}")
    return lower
