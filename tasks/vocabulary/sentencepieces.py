"""SentencePiece vocabularies with the sentinels and added tokens that the files beside the model describe.

Hugging Face keeps them in `tokenizer_config.json` and `added_tokens.json`. Must not import: any task or model.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from tasks.errors import UserError

CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
_OTHERS = ("tokenizer.json", "special_tokens_map.json")
SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")
_UNUSED = re.compile(r"<unused\d+>")


@dataclasses.dataclass(frozen=True)
class Description:
    """What the files beside a model say of it.

    Attributes:
      extra_ids: number of sentinels; None if they do not say.
      ids: id of each token that they add, sentinels and special tokens included.
      names: more tokens that they add, which get the next ids.
      exists: whether there is such a file.
    """

    extra_ids: int | None = None
    ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    names: Sequence[str] = ()
    exists: bool = False


def describe(folder: str) -> Description:
    """Read the files in `folder`, as t5x_lite.convert.tokenizer does. Raises UserError if one cannot be understood."""
    files = {name: _read(os.path.join(folder, name)) for name in (CONFIG, ADDED, *_OTHERS)}
    ids: dict[str, int] = {}
    names: list[str] = []

    def add(file: str, token: Any, number: Any = None) -> None:
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str) or not content:
            raise UserError(f"{file} has an added token {token!r}: it needs a text")
        if isinstance(token, dict) and token.get("single_word"):
            raise UserError(f"{file}: single_word of the added token {content!r} is not supported")
        if number is None:
            names.append(content)
            return
        if isinstance(number, bool) or not str(number).isdecimal():
            raise UserError(f"{file} gives the token {content!r} the id {number!r}: it must be a whole number")
        if ids.setdefault(content, int(number)) != int(number):
            raise UserError(f"{file} gives the token {content!r} the id {number}, another file {ids[content]}")

    for token, number in files[ADDED].items():
        add(ADDED, token, number)
    for number, token in _part(files, CONFIG, "added_tokens_decoder", dict).items():
        add(CONFIG, token, number)
    for token in _part(files, "tokenizer.json", "added_tokens", list):
        add("tokenizer.json", token, token.get("id") if isinstance(token, dict) else None)
    for file in (CONFIG, "special_tokens_map.json"):
        for token in _part(files, file, "additional_special_tokens", list):
            add(file, token)
    extra_ids = files[CONFIG].get("extra_ids")
    if extra_ids is None:
        extra_ids = len({name for name in (*ids, *names) if SENTINEL.fullmatch(name)}) or None
    elif isinstance(extra_ids, bool) or not isinstance(extra_ids, int) or extra_ids < 0:
        raise UserError(f"{CONFIG} has extra_ids {extra_ids!r}: it must be a whole number, at least 0")
    names = [name for name in dict.fromkeys(names) if name not in ids and not SENTINEL.fullmatch(name)]
    exists = any(tf.io.gfile.exists(os.path.join(folder, name)) for name in (CONFIG, ADDED, "tokenizer.json"))
    return Description(extra_ids, ids, names, exists)


def _part(files: Mapping[str, Mapping[str, Any]], file: str, key: str, kind: type) -> Any:
    """Return a value of a file, empty if it is not there. Raises UserError if it is of another type."""
    value = files[file].get(key)
    if value is not None and not isinstance(value, kind):
        raise UserError(
            f"{file}: {key} is a {type(value).__name__}, expected {'an object' if kind is dict else 'a list'}"
        )
    return kind() if value is None else value


def _read(path: str) -> Mapping[str, Any]:
    if not tf.io.gfile.exists(path):
        return {}
    try:
        with tf.io.gfile.GFile(path) as file:
            value = json.loads(file.read())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} has a {type(value).__name__}, expected an object")
    return value


def added_tokens(file: str, description: Description, pieces: Mapping[str, int], extra_ids: int) -> list[str]:
    """Return the added tokens in the order of their ids, which follow the sentinels.

    Args:
      file: the model, for errors.
      pieces: id of each piece of the model.

    Raises:
      UserError: a token has an id that no vocabulary of these pieces and sentinels can give it.
    """
    size = len(pieces) + extra_ids
    tokens = []
    for token, number in sorted(description.ids.items(), key=lambda pair: pair[1]):
        if sentinel := SENTINEL.fullmatch(token):
            expected = pieces.get(token, pieces.get(f"▁{token}", size - 1 - int(sentinel[1])))
        else:
            expected = pieces.get(token, size + len(tokens))
            tokens += [token] if token not in pieces else []
        if number != expected:
            raise UserError(
                f"the files beside {file} give the token {token!r} the id {number}; with {len(pieces)} pieces and "
                f"{extra_ids} sentinels it is {expected}: correct {CONFIG} or {ADDED}"
            )
    return [*tokens, *(name for name in description.names if name not in pieces)]


def is_gemma(pieces: Collection[str]) -> bool:
    """Return whether these are the pieces of a Gemma model, which has spare ones: <unused0>, <unused1> ..."""
    return "<unused0>" in pieces


def unused(pieces: Mapping[str, int]) -> range:
    """Return the ids of a Gemma model's <unused0>, <unused1> ... as far as they are consecutive: its sentinels.

    <extra_id_0> is the last of them and the others count down, as T5's do. Which sentinels T5Gemma had in UL2 is not
    published.
    """
    first = pieces.get("<unused0>", 0)
    return range(first, next(i for i in itertools.count(first) if pieces.get(f"<unused{i - first}>") != i))


def gemma_names(description: Description, proto: Any) -> dict[str, int]:
    """Return the tokens that the files beside a Gemma model find in it, but the model itself does not, with their ids.

    They are ordinary pieces, or have taken the place of an <unusedN>.
    """
    pieces = {piece.piece for piece in proto.pieces}
    names = {}
    for token, number in description.ids.items():
        if number >= len(proto.pieces):
            continue
        piece = proto.pieces[number]
        is_spare = token not in pieces and _UNUSED.fullmatch(piece.piece)
        if is_spare or (piece.piece == token and piece.type == proto.SentencePiece.NORMAL):
            names[token] = number
    return names


def prepare_gemma(proto: Any, names: Mapping[str, int]) -> dict[str, int]:
    """Change a Gemma model to find the ids of transformers, and return the ids of tokens at which text is to be split.

    transformers finds every added token in text, <bos> and the like too. It merges runs of spaces pair by pair, where
    SentencePiece takes the longest piece first: other ids, if the run is longer than the longest piece.

    Args:
      names: those of `gemma_names`.
    """
    kinds = proto.SentencePiece
    for token, number in names.items():
        proto.pieces[number].piece = token
    tokens = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type in (kinds.CONTROL, kinds.UNKNOWN)}
    for i, piece in enumerate(proto.pieces):
        if piece.type == kinds.USER_DEFINED and not piece.piece.strip("▁"):
            piece.type, piece.score = kinds.NORMAL, float(len(proto.pieces) - i)  # merged before all others
            tokens[piece.piece] = i
    return {**tokens, **names}


class SentencePieceVocabulary(seqio.SentencePieceVocabulary):
    """A model with sentinels and added tokens that are found in text wherever they stand, as by Hugging Face.

    SeqIO's own class finds a sentinel only after a space or at the beginning, and so do models with sentinels of their
    own.
    """

    def __init__(self, file: str, extra_ids: int, added: Sequence[str] = ()):
        super().__init__(file, extra_ids)
        self._added = tuple(added)

    def _model_context(self) -> Any:
        if self._model:
            return self._model
        context = super()._model_context()
        proto = sentencepiece_model_pb2.ModelProto.FromString(context.sp_model)  # pyright: ignore[reportAttributeAccessIssue]
        own = self._prepare(proto)
        for token in self._added:
            proto.pieces.add(piece=token, score=0.0, type=proto.SentencePiece.USER_DEFINED)
        tokenizer = SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._model = dataclasses.replace(context, tokenizer=tokenizer, sp_model=proto.SerializeToString())
        self._ids = own | {token: tokenizer.piece_to_id(token) for token in self._added}
        self._ids |= {f"<extra_id_{k}>": tokenizer.piece_to_id(f"▁<extra_id_{k}>") for k in range(self._extra_ids)}
        return self._model

    def _prepare(self, proto: Any) -> dict[str, int]:
        """Change the model, and return the ids of pieces of its own at which text is split."""
        return {}

    @property
    def ids(self) -> dict[str, int]:
        """The ids of the tokens at which text is split: sentinels and added tokens."""
        self._model_context()
        return self._ids

    @property
    def first_sentinel(self) -> int:
        return self.vocab_size - 1 - len(self._added)

    @property
    def added(self) -> dict[str, int]:
        """The ids of the tokens that the files beside the model add."""
        return {token: self.ids[token] for token in self._added}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_ids"}

    def _pattern(self) -> str:
        return "|".join(re.escape(token) for token in sorted(self.ids, key=len, reverse=True))

    def _encode(self, s: str) -> list[int]:
        if not self.ids:
            return self.tokenizer.EncodeAsIds(s)
        ids: list[int] = []
        for part in re.split(f"({self._pattern()})", s):
            if part in self.ids:
                ids.append(self.ids[part])
            elif self._has_pieces(part):
                ids += self.tokenizer.EncodeAsIds(part)
        return ids

    def _has_pieces(self, part: str) -> bool:
        """Return whether a part of a split text has pieces; T5's models would give one to spaces alone."""
        return bool(part.strip())

    def _encode_tf(self, s: tf.Tensor) -> Any:
        """Encode a string [] -> int32 [length], or strings [N] -> a ragged tensor [N, length]."""
        fast: Any = self.tf_tokenizer.tokenize
        if not self.ids:
            return fast(s)

        def encode(texts: np.ndarray) -> list[np.ndarray]:
            rows = [self._encode(text.decode()) for text in np.atleast_1d(texts)]
            values = np.array([i for row in rows for i in row], np.int32)
            return [values, np.array([len(row) for row in rows], np.int64)]

        def slow() -> Any:
            values, lengths = tf.numpy_function(encode, [s], [tf.int32, tf.int64], stateful=False)
            return tf.ensure_shape(values, [None]), tf.ensure_shape(lengths, [None])

        def quick() -> Any:
            tokens = fast(s)
            if s.shape.rank == 0:
                return tokens, tf.size(tokens, tf.int64)[None]
            return tokens.values, tokens.row_lengths()  # pyright: ignore[reportOptionalMemberAccess]

        has_any = tf.reduce_any(tf.strings.regex_full_match(s, f"(?s).*({self._pattern()}).*"))
        values, lengths = tf.cond(has_any, slow, quick)
        if s.shape.rank == 0:
            return values
        return tf.RaggedTensor.from_row_lengths(values, lengths, validate=False)  # pyright: ignore


class GemmaVocabulary(SentencePieceVocabulary):
    """A Gemma model, with the ids of transformers: text keeps its spaces, and special tokens are found in it.

    It has no sentinels behind its pieces, which a model's table has no rows for: they are those of `unused`.

    Args:
      added: tokens behind the pieces.
      names: those of `gemma_names`.
    """

    def __init__(self, file: str, added: Sequence[str] = (), names: Mapping[str, int] | None = None):
        super().__init__(file, 0, added)
        self._names = dict(names or {})

    def _prepare(self, proto: Any) -> dict[str, int]:
        tokens = prepare_gemma(proto, self._names)
        self._sentinels = unused({piece.piece: i for i, piece in enumerate(proto.pieces)})
        return tokens

    @property
    def sentinels(self) -> range:
        """The ids of the sentinels, <extra_id_0> last."""
        self._model_context()
        return self._sentinels

    @property
    def first_sentinel(self) -> int:
        return self.sentinels.stop - 1

    @property
    def last_sentinel(self) -> int:
        return self.sentinels.start

    @property
    def added(self) -> dict[str, int]:
        return super().added | self._names

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_sentinels"}

    def _has_pieces(self, part: str) -> bool:
        return bool(part)


def gemma(file: str, model: Any, description: Description) -> GemmaVocabulary:
    """Return the vocabulary of a Gemma model. Raises UserError if the files beside it contradict it."""
    names = gemma_names(description, model)
    taken = set(names.values())
    pieces = {piece.piece: i for i, piece in enumerate(model.pieces) if i not in taken} | names
    return GemmaVocabulary(file, added_tokens(file, description, pieces, 0), names)
