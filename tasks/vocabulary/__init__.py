"""The vocabulary that every task shares: T5's, read only when first needed, and replaceable for a whole run.

Tasks are registered when `tasks` is imported, long before a run knows which vocabulary it wants, and SeqIO refuses a
mixture whose tasks hold different vocabularies. So all tasks hold one object, `SHARED`, which passes every call on to
the vocabulary in force: T5's 32,000 SentencePiece pieces and 100 sentinels, unless `set_default` named another one.

Must not know: any task, any model. Importing it reads no file and no network.
"""

import os
from collections.abc import Sequence

import seqio
import tensorflow as tf
from absl import logging
from sentencepiece import sentencepiece_model_pb2

from tasks import readers
from tasks.errors import MissingFileError, UserError
from tasks.vocabulary.trainer import train as train
from tasks.vocabulary.wordpiece import WordPieceVocabulary as WordPieceVocabulary

EXTRA_IDS = 100
T5_MODEL = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
_MODEL_IN_DATA_DIR = "vocab/sentencepiece.model"


def load(model_file: str, extra_ids: int = EXTRA_IDS) -> seqio.SentencePieceVocabulary:
    """Loads a SentencePiece model and puts `extra_ids` sentinels after its pieces, unless it has its own, as mT5's has.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a SentencePiece model, or its padding or end-of-sequence id is not one that T5 can use.
    """
    if not tf.io.gfile.exists(model_file):
        raise MissingFileError(
            f"no SentencePiece model at {model_file}: give the path of a .model file, or put T5's at "
            f"${readers.DATA_DIR_VARIABLE}/{_MODEL_IN_DATA_DIR}"
        )
    try:
        vocabulary = seqio.SentencePieceVocabulary(model_file, 0 if _has_sentinels(model_file) else extra_ids)
        pad, end = vocabulary.tokenizer.pad_id(), vocabulary.eos_id
    except Exception as error:
        raise UserError(f"{model_file} is not a SentencePiece model: {error}") from error
    if pad != 0 or end is None or end < 1:
        raise UserError(
            f"{model_file} has pad id {pad} and end-of-sequence id {end}; T5 needs padding at 0 and an end: "
            "train it with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1"
        )
    return vocabulary


def _has_sentinels(model_file: str) -> bool:
    with tf.io.gfile.GFile(model_file, "rb") as file:
        content = file.read()
    model = sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
    return any(piece.piece.endswith("<extra_id_0>") for piece in model.pieces)


def _load_t5() -> seqio.SentencePieceVocabulary:
    data_dir = readers.data_dir()
    local = data_dir and os.path.join(data_dir, _MODEL_IN_DATA_DIR)
    if local and tf.io.gfile.exists(local):
        path = local
    else:
        path = T5_MODEL
        try:
            found = tf.io.gfile.exists(path)
            reason = "it is not there"
        except tf.errors.OpError as error:
            found, reason = False, str(error.message).splitlines()[0]
        if not found:
            tried = f"{local} is not there" if local else f"{readers.DATA_DIR_VARIABLE} is not set"
            raise MissingFileError(
                f"T5's vocabulary was not found: {tried}, and {path} cannot be read ({reason}). Put "
                f"sentencepiece.model at ${readers.DATA_DIR_VARIABLE}/{_MODEL_IN_DATA_DIR}, or name another vocabulary "
                "(gin macro VOCABULARY, or tasks.vocabulary.set_default)"
            )
    logging.info("vocabulary: T5's, from %s", path)
    return load(path)


_chosen: seqio.Vocabulary | None = None  # set by set_default; None means T5's
_t5: tuple[str | None, seqio.Vocabulary] | None = None  # T5's vocabulary and the data folder it was looked up with


def set_default(vocabulary: str | seqio.Vocabulary | None) -> None:
    """Puts one vocabulary in force for all tasks, those already registered too.

    Args:
      vocabulary: the path of a SentencePiece model (100 sentinels are added) or of a BERT's vocab.txt, "bytes" for
        ByT5's byte vocabulary with 100 sentinels, a ready SeqIO vocabulary, or None for T5's own.

    Raises FileNotFoundError or ValueError for a path that cannot serve. Datasets built before keep the old one.
    """
    global _chosen
    if isinstance(vocabulary, _SharedVocabulary):
        return
    if vocabulary == "bytes":
        vocabulary = seqio.ByteVocabulary(EXTRA_IDS)
    elif isinstance(vocabulary, str):
        vocabulary = WordPieceVocabulary(vocabulary) if vocabulary.endswith(".txt") else load(vocabulary)
    _chosen = vocabulary
    logging.info("vocabulary: %s", "T5's" if vocabulary is None else vocabulary)


def default_vocabulary() -> seqio.Vocabulary:
    """The vocabulary in force: the one given to `set_default`, else T5's (read now if it was not yet)."""
    global _t5
    if _chosen is not None:
        return _chosen
    if _t5 is None or _t5[0] != readers.data_dir():
        _t5 = (readers.data_dir(), _load_t5())
    return _t5[1]


class _SharedVocabulary(seqio.Vocabulary):
    """Stands in every task's features and passes each call on to `default_vocabulary()`."""

    def __init__(self) -> None:
        super().__init__(extra_ids=0)

    def __reduce__(self):
        return _shared, ()  # copies (gin copies its arguments, Beam pickles them) are the same object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SharedVocabulary) or default_vocabulary() == other

    def __hash__(self) -> int:
        return hash(_SharedVocabulary)

    def __str__(self) -> str:
        return str(default_vocabulary())

    def __repr__(self) -> str:
        return "tasks.vocabulary.SHARED"

    @property
    def bos_id(self) -> int | None:
        return default_vocabulary().bos_id

    @property
    def eos_id(self) -> int | None:
        return default_vocabulary().eos_id

    @property
    def pad_id(self) -> int:
        return default_vocabulary().pad_id

    @property
    def unk_id(self) -> int | None:
        return default_vocabulary().unk_id

    @property
    def extra_ids(self) -> int:
        return default_vocabulary().extra_ids

    @property
    def vocab_size(self) -> int:
        return default_vocabulary().vocab_size

    @property
    def _base_vocab_size(self) -> int:
        return default_vocabulary()._base_vocab_size

    def _encode(self, s: Sequence[int] | str) -> Sequence[int]:
        return default_vocabulary().encode(s)

    def _decode(self, ids):
        return default_vocabulary().decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        return default_vocabulary().encode_tf(s)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return default_vocabulary().decode_tf(ids)

    # The public calls go over whole: the clean-up that seqio.Vocabulary does round the private ones is the other's.
    encode, decode, encode_tf, decode_tf = _encode, _decode, _encode_tf, _decode_tf


SHARED = _SharedVocabulary()


def resolved(which: seqio.Vocabulary) -> seqio.Vocabulary:
    """The vocabulary itself where `which` stands for the one in force."""
    return default_vocabulary() if which is SHARED else which


def _shared() -> _SharedVocabulary:
    return SHARED


def output_features() -> dict[str, seqio.utils.Feature]:
    """The features of every text-to-text task: `inputs` (absent in language modelling) and `targets`, both with EOS."""
    return {
        "inputs": seqio.Feature(vocabulary=SHARED, add_eos=True, required=False),
        "targets": seqio.Feature(vocabulary=SHARED, add_eos=True),
    }


def require_sentinels(vocabulary: seqio.Vocabulary, count: int) -> None:
    """Refuses a vocabulary with fewer than `count` sentinels (its last ids, kept apart for marking spans)."""
    if vocabulary.extra_ids < count:
        raise UserError(
            f"this objective marks up to {count} spans with sentinels, and the vocabulary has "
            f"{vocabulary.extra_ids} extra ids ({vocabulary}): real pieces would be overwritten. "
            f"Give the vocabulary extra_ids={count} or more, ask for longer spans (mean_noise_span_length), "
            "or use shorter inputs"
        )
