"""Tokenizers without TensorFlow: SentencePiece models, as SeqIO reads them, and ByT5's bytes.

Reads SentencePiece files and Hugging Face's tokenizer.json of such a model. Must not depend on models, checkpoints or
tasks.
"""

import base64
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.errors import UserError

logger = logging.getLogger(__name__)

END = 1
_SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")


class Vocabulary:
    """A SentencePiece model with T5's sentinels after its pieces; <extra_id_0> is the last id.

    Ids and text equal those of seqio.SentencePieceVocabulary(file, 100). No sentinels are added to a model that has
    its own.

    Args:
      model: the model's file, or its content as bytes.
    """

    def __init__(self, model: str | Path | bytes, extra_ids: int = 100):
        import sentencepiece
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

        proto = ModelProto.FromString(model if isinstance(model, bytes) else Path(model).read_bytes())
        if not any(piece.piece.endswith("<extra_id_0>") for piece in proto.pieces):
            for i in reversed(range(extra_ids)):
                proto.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=proto.SentencePiece.USER_DEFINED)
        self._model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        if self._model.pad_id() != 0 or self._model.eos_id() != END:
            name = "this model" if isinstance(model, bytes) else model
            raise UserError(f"{name} has pad {self._model.pad_id()} and end {self._model.eos_id()}; T5's are 0 and 1")

    def __len__(self) -> int:
        return self._model.get_piece_size()

    @property
    def cls(self) -> int:
        """The [CLS] id of a BERT pre-trained with this vocabulary, <extra_id_1>; [MASK] is <extra_id_0>."""
        return len(self) - 2

    @property
    def sep(self) -> int:
        """The [SEP] id of such a BERT, <extra_id_2>."""
        return len(self) - 3

    def encode(self, text: str) -> list[int]:
        """Return token ids, without an EOS token."""
        return self._model.encode(text)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text up to the first EOS or padding. Ids beyond the vocabulary decode as unknown."""
        ids = [token if token < len(self) else self._model.unk_id() for token in _until_eos(tokens)]
        return self._model.decode(ids)


class ByteVocabulary:
    """ByT5's vocabulary: padding, EOS and unknown are 0, 1 and 2, UTF-8 bytes are their value + 3, then 125 sentinels.

    Byte ids equal those of seqio.ByteVocabulary; the sentinels, from <extra_id_0> = 259, those of Hugging Face's
    ByT5Tokenizer. (T5's own tasks on bytes use the last byte values as sentinels: 258, 257, ...)
    """

    _BYTES, _SENTINELS = 3, 259

    def __len__(self) -> int:
        return self._SENTINELS + 125

    def encode(self, text: str) -> list[int]:
        """Return token ids, without an EOS token."""
        tokens: list[int] = []
        for i, part in enumerate(re.split(r"<extra_id_(\d+)>", text)):
            if i % 2 and int(part) < 125:
                tokens.append(self._SENTINELS + int(part))
            else:
                text = f"<extra_id_{part}>" if i % 2 else part
                tokens += [byte + self._BYTES for byte in text.encode()]
        return tokens

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text up to the first EOS or padding, without invalid UTF-8 and unknown ids."""
        text = b""
        for token in _until_eos(tokens):
            if token >= self._SENTINELS:
                text += f"<extra_id_{token - self._SENTINELS}>".encode() if token < len(self) else b""
            elif token >= self._BYTES:
                text += bytes([token - self._BYTES])
        return text.decode(errors="ignore")


AnyVocabulary = Vocabulary | ByteVocabulary


def _until_eos(tokens: Sequence[int] | np.ndarray) -> list[int]:
    ids = [int(token) for token in tokens]
    return ids[: next((i for i, token in enumerate(ids) if token in (0, END)), len(ids))]


def beside(folder: Path) -> Vocabulary | ByteVocabulary | None:
    """Return the tokenizer of a Hugging Face directory without a SentencePiece file: ByT5's or tokenizer.json's."""
    config = folder / "tokenizer_config.json"
    if config.is_file() and json.loads(config.read_text()).get("tokenizer_class") == "ByT5Tokenizer":
        return ByteVocabulary()
    model = rebuilt(folder)
    return None if model is None else Vocabulary(model)


def rebuilt(folder: Path) -> bytes | None:
    """Return the SentencePiece model of a tokenizer.json in `folder`; None, with a warning, if it is not one."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return sentencepiece_model(folder / "tokenizer.json")
    except ValueError as error:
        logger.warning("no tokenizer: %s", error)
        return None


def sentencepiece_model(file: Path) -> bytes:
    """Rebuild the SentencePiece unigram model that a tokenizer.json was made from, without T5's trailing sentinels.

    The result has the pieces, the scores and the normaliser's character map.

    Raises UserError if the tokenizer is of another kind.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

    config = json.loads(file.read_text())
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


_FETCH = "put the model's spiece.model next to it"


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    return [] if step is None else step[name] if step["type"] == "Sequence" else [step]
