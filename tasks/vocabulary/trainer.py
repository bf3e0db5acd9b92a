"""Train a SentencePiece model with T5's special ids: padding 0, EOS 1, unknown 2, no BOS.

Used by `python -m tasks.vocabulary train` and the quickstart. Must not depend on tasks or on the source of the text.
"""

import contextlib
import io
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import sentencepiece
import tensorflow as tf

from tasks.errors import UserError, UserFileError

Kind = Literal["unigram", "bpe"]
# T5 uses nmt_nfkc: NFKC with white space and control characters as spaces. `_cf` folds case, identity changes nothing.
Normalization = Literal["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"]

# SentencePiece drops lines with its character for unknown pieces, and rejects NUL: neither can be a piece.
_NO_PIECE = str.maketrans("\u2585\0", "  ")


def train(
    texts: Iterable[str],
    model_file: str,
    size: int,
    kind: Kind = "unigram",
    *,
    normalization: Normalization = "nmt_nfkc",
    character_coverage: float = 0.9999,
    byte_fallback: bool = False,
    threads: int | None = None,
) -> None:
    """Train a model on `texts` and write it atomically to `model_file`.

    Args:
      texts: documents or sentences of any length; split into lines.
      model_file: local or gs:// path; its folder is created, an existing file is replaced.
      size: number of pieces, including special ones (T5: 32,000), excluding sentinels, which are not in the model.
      kind: "unigram" (T5's) or "bpe".
      normalization: normalisation of text in training and in use.
      character_coverage: share of the characters in the text that get a piece; the rarest characters become <unk> or
        bytes. (SentencePiece's default 0.9995 is for Chinese and drops "#" and "~" on English C4.)
      byte_fallback: add 256 byte pieces for characters that would become <unk>.
      threads: default: all cores. With 1 thread the result is bit-identical for the same text.

    Raises:
      ValueError: the text is empty, too small or too varied for `size`.
      UserFileError: the file cannot be written; this is checked before training.
    """
    if kind not in get_args(Kind):
        raise UserError(f"type {kind!r}: use 'unigram' or 'bpe'")
    if normalization not in get_args(Normalization):
        raise UserError(f"normalization {normalization!r}: use one of {', '.join(get_args(Normalization))}")
    if not 0 < character_coverage <= 1:
        raise UserError(f"character coverage {character_coverage}: must be above 0 and at most 1")
    if size < 1:
        raise UserError(f"size {size}: a vocabulary needs at least its special pieces and the characters of the text")
    failed: list[BaseException] = []  # the error in reading the text, which SentencePiece turns into a string

    def lines() -> Iterator[str]:
        try:
            yield from _lines(texts)
        except (Exception, KeyboardInterrupt) as error:
            failed.append(error)
            raise

    with _atomic_write(model_file) as partial:
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines(),
                model_writer=model,
                model_type=kind,
                vocab_size=size,
                normalization_rule_name=normalization,
                character_coverage=character_coverage,
                byte_fallback=byte_fallback,
                num_threads=threads or os.cpu_count() or 1,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                max_sentence_length=2**30,  # the default silently drops lines above 4,192 bytes
                minloglevel=2,
            )
        except RuntimeError as error:
            raise failed[0] if failed else _explained(error, size, byte_fallback) from error
        with tf.io.gfile.GFile(partial, "wb") as file:
            file.write(model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.translate(_NO_PIECE).splitlines():
            if line.strip():
                yield line


@contextlib.contextmanager
def _atomic_write(path: str) -> Iterator[str]:
    """Yield a writable temporary path next to `path`, and rename it to `path` on success."""
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f"partial-{uuid.uuid4().hex[:8]}-{name}")
    try:
        tf.io.gfile.makedirs(folder or ".")
        with tf.io.gfile.GFile(partial, "wb") as file:
            file.write(b"")
    except tf.errors.OpError as error:
        raise UserFileError(f"cannot write {path}: {error.message}") from error
    try:
        yield partial
        tf.io.gfile.rename(partial, path, overwrite=True)
    except BaseException:
        tf.io.gfile.remove(partial)
        raise


def _explained(error: RuntimeError, size: int, byte_fallback: bool) -> ValueError:
    """Turn a SentencePiece error, which names its source lines, into one with a fix."""
    message = str(error)
    if "sentences_.empty()" in message:
        return ValueError("there is no text to train a vocabulary on: every line is empty")
    if match := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return ValueError(
            f"this text gives at most {match[1]} pieces, not {size}: use a size up to {match[1]}, or more text"
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        including_bytes = ", including 256 bytes" if byte_fallback else ""
        return ValueError(
            f"{size} pieces are too few for the text's characters and the special pieces: {match[1]}{including_bytes}. "
            f"Use a size above {match[1]}, or a lower character coverage"
        )
    return ValueError(f"SentencePiece could not train on this text: {message}")
