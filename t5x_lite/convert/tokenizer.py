"""Tokenizers without TensorFlow: SentencePiece models of T5 and Gemma, as SeqIO reads them, and ByT5's bytes.

Reads SentencePiece files and Hugging Face's tokenizer.json of such a model. Must not depend on models, checkpoints or
tasks.
"""

import base64
import dataclasses
import itertools
import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_lite.convert.bucket import AnyPath, place_of
from t5x_lite.errors import UserError

logger = logging.getLogger(__name__)

END = 1
CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
_OTHERS = ("tokenizer.json", "special_tokens_map.json")
_SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")
_UNUSED = re.compile(r"<unused\d+>")


@dataclasses.dataclass(frozen=True)
class Description:
    """What Hugging Face's files beside a model say of it.

    Attributes:
      config: tokenizer_config.json, or {}.
      extra_ids: number of sentinels; None if they do not say.
      ids: id of each token that they add, sentinels and special tokens included.
      names: more tokens that they add, which get the next ids.
      exists: whether there is such a file.
    """

    config: Mapping[str, Any]
    extra_ids: int | None
    ids: Mapping[str, int]
    names: Sequence[str]
    exists: bool


def describe(folder: AnyPath) -> Description:
    """Read Hugging Face's files in `folder`, as far as they exist. Raises UserError if one cannot be understood."""
    files = {name: _json(folder / name) for name in (CONFIG, ADDED, *_OTHERS)}
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
        extra_ids = len({name for name in (*ids, *names) if _SENTINEL.fullmatch(name)}) or None
    elif isinstance(extra_ids, bool) or not isinstance(extra_ids, int) or extra_ids < 0:
        raise UserError(f"{CONFIG} has extra_ids {extra_ids!r}: it must be a whole number, at least 0")
    names = [name for name in dict.fromkeys(names) if name not in ids and not _SENTINEL.fullmatch(name)]
    exists = any((folder / name).is_file() for name in (CONFIG, ADDED, "tokenizer.json"))
    return Description(files[CONFIG], extra_ids, ids, names, exists)


def _part(files: Mapping[str, Mapping[str, Any]], file: str, key: str, kind: type) -> Any:
    """Return a value of a file, empty if it is not there. Raises UserError if it is of another type."""
    value = files[file].get(key)
    if value is not None and not isinstance(value, kind):
        raise UserError(
            f"{file}: {key} is a {type(value).__name__}, expected {'an object' if kind is dict else 'a list'}"
        )
    return kind() if value is None else value


def _json(file: AnyPath) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} has a {type(value).__name__}, expected an object")
    return value


class Vocabulary:
    """A SentencePiece model with T5's sentinels after its pieces, <extra_id_0> last, and the tokens added after them.

    Without a description beside the model, ids and text equal those of seqio.SentencePieceVocabulary(file, 100). With
    one, they equal those of Hugging Face's T5Tokenizer: sentinels and added tokens are found wherever they stand. A
    model that has sentinels of its own, as mT5's, gets no others.

    Ids of a Gemma model equal those of Hugging Face's GemmaTokenizer without special tokens around the text; those in
    the text are found, <bos> and the like too. It gets no sentinels: they are its pieces `unused`.

    Args:
      model: the model's file, or its content as bytes.
      extra_ids: number of sentinels. None: those of the description, else 100.
      description: None reads the files beside the model, if `model` is a file.

    Raises:
      UserError: padding or end of sequence are not T5's, or the description contradicts the model.
    """

    def __init__(
        self, model: str | AnyPath | bytes, extra_ids: int | None = None, description: Description | None = None
    ):
        import sentencepiece
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

        name = "this model" if isinstance(model, bytes) else str(model)
        if description is None and not isinstance(model, bytes):
            description = describe(place_of(model).parent)
        proto = ModelProto.FromString(model if isinstance(model, bytes) else place_of(model).read_bytes())
        pieces, own = {piece.piece: i for i, piece in enumerate(proto.pieces)}, {}
        self._is_gemma = is_gemma(pieces)
        if self._is_gemma:
            own = prepare_gemma(proto, {} if description is None else gemma_names(description, proto))
            pieces, extra_ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}, 0
        elif any(piece.endswith("<extra_id_0>") for piece in pieces):
            extra_ids = 0
        elif extra_ids is None:
            extra_ids = 100 if description is None or description.extra_ids is None else description.extra_ids
        added = [] if description is None else _added_tokens(name, description, pieces, extra_ids)
        for piece in [*(f"▁<extra_id_{i}>" for i in reversed(range(extra_ids))), *added]:
            proto.pieces.add(piece=piece, score=0.0, type=proto.SentencePiece.USER_DEFINED)
        self._model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._ids: dict[str, int] = own  # of the tokens at which text is split
        if description is not None and description.exists:
            sentinels = {f"<extra_id_{i}>": len(pieces) + extra_ids - 1 - i for i in range(extra_ids)}
            self._ids |= sentinels | {token: len(pieces) + extra_ids + i for i, token in enumerate(added)}
        self._first_sentinel = (unused(pieces).stop if self._is_gemma else len(pieces) + extra_ids) - 1
        split = "|".join(re.escape(token) for token in sorted(self._ids, key=len, reverse=True))
        self._split = re.compile(f"({split})") if split else None
        if self._model.pad_id() != 0 or self._model.eos_id() != END:
            raise UserError(f"{name} has pad {self._model.pad_id()} and end {self._model.eos_id()}; T5's are 0 and 1")

    def __len__(self) -> int:
        return self._model.get_piece_size()

    @property
    def cls(self) -> int:
        """The [CLS] id of a BERT pre-trained with this vocabulary, <extra_id_1>; [MASK] is <extra_id_0>."""
        return self._first_sentinel - 1

    @property
    def sep(self) -> int:
        """The [SEP] id of such a BERT, <extra_id_2>."""
        return self._first_sentinel - 2

    def encode(self, text: str) -> list[int]:
        """Return token ids, without an EOS token."""
        if self._split is None:
            return self._model.encode(text)
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._ids:
                ids.append(self._ids[part])
            elif part if self._is_gemma else part.strip():  # T5's models would give a piece to spaces alone
                ids += self._model.encode(part)
        return ids

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text up to the first EOS or padding. Ids beyond the vocabulary decode as unknown."""
        ids = [token if token < len(self) else self._model.unk_id() for token in _until_eos(tokens)]
        return self._model.decode(ids)


def _added_tokens(name: str, description: Description, pieces: Mapping[str, int], extra_ids: int) -> list[str]:
    """Return the added tokens in the order of their ids. Raises UserError for an id that they cannot have."""
    size, tokens = len(pieces) + extra_ids, []
    for token, number in sorted(description.ids.items(), key=lambda pair: pair[1]):
        if sentinel := _SENTINEL.fullmatch(token):
            expected = pieces.get(token, pieces.get(f"▁{token}", size - 1 - int(sentinel[1])))
        else:
            expected = pieces.get(token, size + len(tokens))
            tokens += [] if token in pieces else [token]
        if number != expected:
            raise UserError(
                f"the files beside {name} give the token {token!r} the id {number}; with {len(pieces)} pieces and "
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


class ByteVocabulary:
    """ByT5's vocabulary: padding, EOS and unknown are 0, 1 and 2, UTF-8 bytes are their value + 3, then sentinels.

    Ids equal those of Hugging Face's ByT5Tokenizer, whose <extra_id_0> is 259. With `extra_ids` = 0 the sentinels are
    the byte values that no text has, from the last one down: <extra_id_0> is 258, as in ByT5's pre-training.

    Args:
      extra_ids: number of sentinels after the bytes.
      descending: <extra_id_0> is the last id instead of the first after the bytes, as in seqio.ByteVocabulary.
    """

    _BYTES, _SIZE, _UNUSED = 3, 259, 11

    def __init__(self, extra_ids: int = 125, descending: bool = False):
        self._extra_ids = extra_ids
        names = range(extra_ids or self._UNUSED)
        first, step = (len(self) - 1, -1) if descending or not extra_ids else (self._SIZE, 1)
        self._sentinels = {f"<extra_id_{i}>": first + step * i for i in names}
        self._names = {token: name for name, token in self._sentinels.items()}

    def __len__(self) -> int:
        return self._SIZE + self._extra_ids

    def encode(self, text: str) -> list[int]:
        """Return token ids, without an EOS token."""
        tokens: list[int] = []
        for part in re.split(r"(<extra_id_\d+>)", text):
            is_sentinel = part in self._sentinels
            tokens += [self._sentinels[part]] if is_sentinel else [byte + self._BYTES for byte in part.encode()]
        return tokens

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text up to the first EOS or padding, without invalid UTF-8 and unknown ids."""
        text = b""
        for token in _until_eos(tokens):
            if token in self._names:
                text += self._names[token].encode()
            elif self._BYTES <= token < self._SIZE:
                text += bytes([token - self._BYTES])
        return text.decode(errors="ignore")


AnyVocabulary = Vocabulary | ByteVocabulary


def _until_eos(tokens: Sequence[int] | np.ndarray) -> list[int]:
    ids = [int(token) for token in tokens]
    return ids[: next((i for i, token in enumerate(ids) if token in (0, END)), len(ids))]


def beside(folder: AnyPath) -> Vocabulary | ByteVocabulary | None:
    """Return the tokenizer of a directory without a SentencePiece file: ByT5's or tokenizer.json's."""
    description = describe(folder)
    if description.config.get("tokenizer_class") == "ByT5Tokenizer":
        # transformers 5 writes 0 and lists them.
        sentinels = {name for name in description.ids if _SENTINEL.fullmatch(name)}
        extra_ids = description.config.get("extra_ids", 125) or len(sentinels)
        if others := {*description.ids, *description.names} - sentinels - {"<pad>", "</s>", "<unk>"}:
            logger.warning("%s: the added tokens %s are read as bytes", folder, ", ".join(sorted(others)))
        return ByteVocabulary(extra_ids, bool(description.config.get("extra_ids_descend")))
    model = rebuilt(folder)
    return None if model is None else Vocabulary(model, description=description)


def rebuilt(folder: AnyPath) -> bytes | None:
    """Return the SentencePiece model of a tokenizer.json in `folder`; None, with a warning, if it is not one."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return sentencepiece_model(folder / "tokenizer.json")
    except ValueError as error:
        logger.warning("no tokenizer: %s", error)
        return None


def file_name(model: bytes) -> str:
    """Return the name under which Hugging Face looks for a SentencePiece model."""
    return "tokenizer.model" if b"<unused0>" in model else "spiece.model"


def sentencepiece_model(file: AnyPath) -> bytes:
    """Rebuild the SentencePiece model that a tokenizer.json was made from: T5's unigram model, or Gemma's BPE.

    Of a unigram model the result has the pieces, the scores and the normaliser's character map, without T5's trailing
    sentinels. Scores of BPE are minus the ranks of the merges.

    Raises UserError if the tokenizer is of another kind.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

    config = json.loads(file.read_text(encoding="utf-8"))
    if config["model"].get("type") == "BPE":
        return _gemma_model(file, config)
    model, added = config["model"], {token["id"]: token["content"] for token in config["added_tokens"]}
    split = _parts(config["pre_tokenizer"], "pretokenizers")
    normalizers = _parts(config["normalizer"], "normalizers")
    tables = [part["precompiled_charsmap"] for part in normalizers if part["type"] == "Precompiled"]
    others = {part["type"] for part in normalizers} - {"Precompiled", "Strip", "Replace"}
    kinds_of_split = {part["type"] for part in split} - {"WhitespaceSplit"}
    if model.get("type") != "Unigram" or kinds_of_split != {"Metaspace"} or split[-1].get("prepend_scheme") == "never":
        raise UserError(f"{file} is not a SentencePiece unigram model: {_FETCH}")
    if len(tables) != 1 or others:
        raise UserError(f"{file} lacks SentencePiece's character map, or has normalizers {sorted(others)}: {_FETCH}")

    pieces = [piece for piece, _ in model["vocab"]]
    scores = [score for _, score in model["vocab"]]
    for i in sorted(i for i in added if i >= len(pieces)):
        if i != len(pieces):
            raise UserError(f"{file}: no piece has id {len(pieces)}, but {added[i]} has {i}: {_FETCH}")
        pieces, scores = [*pieces, added[i]], [*scores, 0.0]
    sentinels = [_SENTINEL.fullmatch(piece) for piece in pieces]
    if [match and int(match[1]) for match in sentinels[-100:]] == [*reversed(range(100))]:
        pieces = pieces[:-100]

    proto = ModelProto()
    kinds = proto.SentencePiece
    for i, (piece, score, sentinel) in enumerate(zip(pieces, scores, sentinels, strict=False)):
        if i == model["unk_id"]:
            kind = kinds.UNKNOWN
        elif model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            kind = kinds.BYTE
        elif sentinel:
            piece, kind = f"▁<extra_id_{sentinel[1]}>", kinds.USER_DEFINED
        elif i in added:
            kind = kinds.CONTROL if i < model["unk_id"] or i == END else kinds.USER_DEFINED
        else:
            kind = None  # SentencePiece omits the type of NORMAL pieces
        proto.pieces.add(piece=piece, score=score, type=kind)
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = spec.UNIGRAM, len(pieces), bool(model.get("byte_fallback"))
    spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = 0, END, model["unk_id"], -1
    spec.pad_piece, spec.eos_piece, spec.unk_piece = pieces[0], pieces[END], pieces[model["unk_id"]]
    proto.normalizer_spec.precompiled_charsmap = base64.b64decode(tables[0])
    return proto.SerializeToString()


def _gemma_model(file: AnyPath, config: Mapping[str, Any]) -> bytes:
    """Rebuild Gemma's SentencePiece model. Raises UserError if the tokenizer is not one of Gemma's."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

    model, fetch = config["model"], "put the model's tokenizer.model next to it"
    if not (
        isinstance(model["vocab"], dict)
        and is_gemma(model["vocab"])
        and config["normalizer"] == {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        and config["pre_tokenizer"] == _GEMMA_SPLIT
        and model.get("byte_fallback")
        and model.get("unk_token") in model["vocab"]
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    ):
        raise UserError(f"{file} is not a SentencePiece unigram model, nor Gemma's BPE: {fetch}, or its spiece.model")
    names = {number: piece for piece, number in model["vocab"].items()}
    names |= {token["id"]: token["content"] for token in config["added_tokens"]}
    if gaps := set(range(len(names))) - names.keys():
        raise UserError(f"{file}: no piece has id {min(gaps)}, but {names[max(names)]} has {max(names)}: {fetch}")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)

    if "<0x09>" not in model["vocab"] and "\t" in model["vocab"]:
        names[model["vocab"]["\t"]] = "<0x09>"  # transformers calls this byte so
    added = {token["content"] for token in config["added_tokens"]}
    proto = ModelProto()
    kinds = proto.SentencePiece
    for _, piece in sorted(names.items()):
        score, kind = 0.0, None  # SentencePiece omits the type of NORMAL pieces
        if piece == model["unk_token"]:
            kind = kinds.UNKNOWN
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            kind = kinds.BYTE
        elif piece in ("<pad>", "<eos>", "<bos>"):
            kind = kinds.CONTROL
        elif piece in added:
            kind = kinds.USER_DEFINED
        else:
            score = -float(ranks.get(piece, len(merges)))
            if len(piece) > 1 and piece not in ranks:  # it is never merged: SentencePiece splits such pieces again
                score, kind = score - 1, kinds.UNUSED
        proto.pieces.add(piece=piece, score=score, type=kind)
    if sum(piece.type == kinds.BYTE for piece in proto.pieces) != 256:
        raise UserError(f"{file} lacks some of the 256 pieces <0x00> to <0xFF>: {fetch}")
    if others := _other_merges(proto, model["vocab"], set(merges)):
        logger.warning("%s lacks %d of the merges that SentencePiece makes: some texts may get other ids", file, others)
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = spec.BPE, len(names), True
    spec.pad_piece, spec.eos_piece, spec.bos_piece, spec.unk_piece = "<pad>", "<eos>", "<bos>", model["unk_token"]
    spec.pad_id, spec.eos_id, spec.bos_id = (model["vocab"].get(piece, -1) for piece in ("<pad>", "<eos>", "<bos>"))
    spec.unk_id = model["vocab"][model["unk_token"]]
    normalizer = proto.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", False, False
    return proto.SerializeToString()


_GEMMA_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def _other_merges(proto: Any, vocab: Mapping[str, int], merges: Collection[tuple[str, ...]]) -> int:
    """Return how many ways to merge two pieces into an ordinary one are not among the merges."""
    pieces = (piece.piece for piece in proto.pieces if piece.type == proto.SentencePiece.NORMAL)
    splits = ((piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece)))
    return sum(left in vocab and right in vocab and (left, right) not in merges for left, right in splits)


_FETCH = "put the model's spiece.model next to it"


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    return [] if step is None else step[name] if step["type"] == "Sequence" else [step]
