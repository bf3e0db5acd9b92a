"""The vocabulary shared by all tasks: T5's by default, loaded on first use, and replaceable for a run.

Tasks are registered when `tasks` is imported, before a run selects its vocabulary, and SeqIO rejects a mixture of tasks
with different vocabularies. So all tasks use one object, `SHARED`, which forwards every call to the current vocabulary:
T5's 32,000 SentencePiece pieces and 100 sentinels, unless `set_default` has set another.

Must not import: any task or model. Importing this module reads no files.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import seqio
import tensorflow as tf
from absl import logging
from sentencepiece import sentencepiece_model_pb2

from tasks import readers
from tasks.errors import MissingFileError, UserError
from tasks.vocabulary import sentencepieces
from tasks.vocabulary.trainer import train as train
from tasks.vocabulary.wordpiece import WordPieceVocabulary as WordPieceVocabulary
from tasks.vocabulary.words import WordEncoder

EXTRA_IDS = 100
T5_MODEL = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
_UNUSED_BYTES = 11  # the byte values above 0xF4, which UTF-8 never has
_MODEL_IN_DATA_DIR = "vocab/sentencepiece.model"


def load(model_file: str, extra_ids: int | None = None) -> seqio.SentencePieceVocabulary:
    """Loads a SentencePiece model with the sentinels and added tokens that the files beside it describe.

    Args:
      extra_ids: number of sentinels after the pieces. None: those of `tokenizer_config.json` or `added_tokens.json`,
        else 100; a model that has its own, as mT5's, gets no others. Those of a Gemma model are its <unused0> ...

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a SentencePiece model, or its padding or end-of-sequence id is not one that T5 can use, or
        the files beside it contradict it.
    """
    if not tf.io.gfile.exists(model_file):
        raise MissingFileError(
            f"no SentencePiece model at {model_file}: give the path of a .model file, or put T5's at "
            f"${readers.DATA_DIR_VARIABLE}/{_MODEL_IN_DATA_DIR}"
        )
    if extra_ids is not None and extra_ids < 0:
        raise UserError(f"extra_ids = {extra_ids}: the number of sentinels must be at least 0")
    description = sentencepieces.describe(os.path.dirname(model_file))
    given = extra_ids
    try:
        model = _model(model_file)
        pieces = {piece.piece: i for i, piece in enumerate(model.pieces)}
        if sentencepieces.is_gemma(pieces) or any(piece.endswith("<extra_id_0>") for piece in pieces):
            extra_ids = 0
        elif extra_ids is None:
            extra_ids = EXTRA_IDS if description.extra_ids is None else description.extra_ids
        vocabulary = seqio.SentencePieceVocabulary(model_file, extra_ids)
        pad, end = vocabulary.tokenizer.pad_id(), vocabulary.eos_id
    except Exception as error:
        raise UserError(f"{model_file} (VOCABULARY) is not a SentencePiece model: {error}") from error
    if pad != 0 or end is None or end < 1:
        raise UserError(
            f"{model_file} has pad id {pad} and end-of-sequence id {end}; T5 needs pad id 0 and an end-of-sequence id: "
            "train it with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1"
        )
    if sentencepieces.is_gemma(pieces):
        if given:
            raise UserError(
                f"VOCABULARY_EXTRA_IDS = {given}: {model_file} is a Gemma model, which has no sentinels but its pieces "
                "<unused0> ...: leave it unset"
            )
        return sentencepieces.gemma(model_file, model, description)
    if not description.exists:
        return vocabulary
    added = sentencepieces.added_tokens(model_file, description, pieces, extra_ids)
    return sentencepieces.SentencePieceVocabulary(model_file, extra_ids, added)


def _model(model_file: str) -> Any:
    with tf.io.gfile.GFile(model_file, "rb") as file:
        content = file.read()
    return sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]


def _load_t5() -> seqio.SentencePieceVocabulary:
    data_dir = readers.data_dir()
    local = data_dir and os.path.join(data_dir, _MODEL_IN_DATA_DIR)
    if local and tf.io.gfile.exists(local):
        path = local
    else:
        path = T5_MODEL
        try:
            exists = tf.io.gfile.exists(path)
            reason = "it does not exist"
        except tf.errors.OpError as error:
            exists, reason = False, str(error.message).splitlines()[0]
        if not exists:
            tried = f"{local} does not exist" if local else f"{readers.DATA_DIR_VARIABLE} is not set"
            raise MissingFileError(
                f"T5's vocabulary was not found: {tried}, and {path} cannot be read ({reason}). Put "
                f"sentencepiece.model at ${readers.DATA_DIR_VARIABLE}/{_MODEL_IN_DATA_DIR}, or set another vocabulary "
                "(gin macro VOCABULARY, or tasks.vocabulary.set_default)"
            )
    logging.info("vocabulary: T5's, from %s", path)
    return load(path)


_chosen: seqio.Vocabulary | None = None  # set by set_default; None means T5's
_t5: tuple[str | None, seqio.Vocabulary] | None = None  # T5's vocabulary, and the data folder at the time it was loaded


def set_default(vocabulary: str | seqio.Vocabulary | None, extra_ids: int | None = None) -> None:
    """Set the vocabulary of all tasks, including those already registered.

    Args:
      vocabulary: the path of a SentencePiece model (see `load`) or of a BERT vocab.txt, "bytes" for ByT5's bytes, a
        SeqIO vocabulary, or None for T5's.
      extra_ids: number of sentinels. None: see `load`; with "bytes" the last byte values are sentinels, as in ByT5's
        pre-training.

    Raises MissingFileError or UserError for an unusable path. Datasets that are already built keep the old vocabulary.
    """
    global _chosen
    if isinstance(vocabulary, _SharedVocabulary):
        return
    if vocabulary == "bytes":
        vocabulary = seqio.ByteVocabulary(extra_ids or 0)
    elif isinstance(vocabulary, str):
        vocabulary = WordPieceVocabulary(vocabulary) if vocabulary.endswith(".txt") else load(vocabulary, extra_ids)
    elif vocabulary is None and extra_ids is not None:
        vocabulary = load(_load_t5().sentencepiece_model_file, extra_ids)
    _chosen = vocabulary
    logging.info("vocabulary: %s", "T5's" if vocabulary is None else vocabulary)


def default_vocabulary() -> seqio.Vocabulary:
    """Return the current vocabulary: that of `set_default`, else T5's (loaded on first use)."""
    global _t5
    if _chosen is not None:
        return _chosen
    if _t5 is None or _t5[0] != readers.data_dir():
        _t5 = (readers.data_dir(), _load_t5())
    return _t5[1]


class _SharedVocabulary(seqio.Vocabulary):
    """The vocabulary in the features of all tasks; forwards each call to `default_vocabulary()`."""

    def __init__(self) -> None:
        super().__init__(extra_ids=0)

    def __reduce__(self):
        return _shared, ()  # copies (by gin, or pickled by Beam) are the same object

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
    def first_sentinel(self) -> int:
        return getattr(default_vocabulary(), "first_sentinel", self.vocab_size - 1)

    @property
    def last_sentinel(self) -> int:
        return getattr(default_vocabulary(), "last_sentinel", 0)

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

    # The public methods are forwarded too, because the current vocabulary does its own cleaning of ids.
    encode, decode, encode_tf, decode_tf = _encode, _decode, _encode_tf, _decode_tf


SHARED = _SharedVocabulary()


def resolved(which: seqio.Vocabulary) -> seqio.Vocabulary:
    """Return the current vocabulary if `which` is SHARED, else `which`."""
    return default_vocabulary() if which is SHARED else which


_encoders: dict[tuple[type, bytes | None], WordEncoder] = {}


def block_encoder(which: seqio.SentencePieceVocabulary) -> Callable[[tf.Tensor], tf.RaggedTensor]:
    """Return a function that encodes strings [N] like the vocabulary's `encode_tf`, faster where it can.

    Uses tf-text instead of the sentencepiece package, which from 0.2.2 on breaks ties between equally good pieces
    differently: "???!" would get other tokens than in T5's training.
    """
    if which._use_fast_tokenizer:
        return which.encode_tf
    key = type(which), which.sp_model
    if key not in _encoders:
        _encoders.clear()  # a process seldom has two
        _encoders[key] = WordEncoder(which)
    encoder = _encoders[key]
    return encoder if encoder.fits else which.encode_tf


def _shared() -> _SharedVocabulary:
    return SHARED


def output_features() -> dict[str, seqio.utils.Feature]:
    """Return the features of text-to-text tasks: `inputs` (absent in language modelling) and `targets`, with EOS."""
    return {
        "inputs": seqio.Feature(vocabulary=SHARED, add_eos=True, required=False),
        "targets": seqio.Feature(vocabulary=SHARED, add_eos=True),
    }


def sentinel_count(vocabulary: seqio.Vocabulary) -> int:
    """Return how many sentinels mark spans: the extra ids, or a model's own, or byte values that no text has."""
    vocabulary = resolved(vocabulary)
    if isinstance(vocabulary, seqio.ByteVocabulary) and not vocabulary.extra_ids:
        return _UNUSED_BYTES
    if isinstance(vocabulary, sentencepieces.GemmaVocabulary):
        return len(vocabulary.sentinels)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary) and not vocabulary.extra_ids:
        pieces = map(vocabulary.tokenizer.id_to_piece, range(vocabulary.vocab_size))
        return sum(sentencepieces.SENTINEL.fullmatch(piece) is not None for piece in pieces)
    return vocabulary.extra_ids


def require_sentinels(vocabulary: seqio.Vocabulary, count: int) -> None:
    """Raise UserError if the vocabulary has fewer than `count` sentinels, which mark spans."""
    if (available := sentinel_count(vocabulary)) < count:
        kind, others = type(vocabulary).__name__, vocabulary.vocab_size - vocabulary.extra_ids
        use = f"Set VOCABULARY_EXTRA_IDS = {count} (and the model's vocab_size to at least {others + count}), use"
        if isinstance(resolved(vocabulary), sentencepieces.GemmaVocabulary):
            use = "Use"  # a Gemma model gets no others
        raise UserError(
            f"this objective marks up to {count} spans with sentinels, but the vocabulary ({kind} of "
            f"{vocabulary.vocab_size} ids) has {available}: real pieces would be overwritten. {use} longer spans "
            "(mean_noise_span_length), or shorter inputs"
        )
