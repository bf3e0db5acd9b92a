"""Learns a SentencePiece model with T5's special ids: padding 0, end 1, unknown 2, no beginning.

Used by `python -m tasks.vocabulary train` and by the quickstart. Must not know: tasks, where text comes from.
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
# T5 has nmt_nfkc: NFKC, and every white space and control character as a space. `_cf` folds case, identity keeps all.
Normalization = Literal["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"]

# SentencePiece leaves out whole lines that hold its own mark for the unknown, and refuses NUL: neither can be a piece.
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
    """Learns a model from `texts` and writes it to `model_file`, whole or not at all.

    Args:
      texts: documents or sentences of any length; learnt from line by line.
      model_file: local or gs://; its folder is made. An old file of that name is replaced.
      size: pieces in all, special ones included; T5's 32,000. The sentinels are not in the model, they come on top.
      kind: "unigram" (T5's) or "bpe".
      normalization: what is done to text before it is cut, in training and ever after.
      character_coverage: the share of all characters in the text that get a piece; the rarest of the others are left to
        <unk>, or to bytes. (SentencePiece's 0.9995 is meant for Chinese and leaves out "#" and "~" on English C4.)
      byte_fallback: adds 256 pieces, one a byte, that spell what would be <unk>.
      threads: all cores unless given. With 1 the same text gives the same model to the last bit.

    Raises ValueError when the text is empty, too small or too varied for `size`; OSError when the file cannot be
    written, before anything is learnt.
    """
    if kind not in get_args(Kind):
        raise UserError(f"type {kind!r}: use 'unigram' or 'bpe'")
    if normalization not in get_args(Normalization):
        raise UserError(f"normalization {normalization!r}: use one of {', '.join(get_args(Normalization))}")
    if not 0 < character_coverage <= 1:
        raise UserError(f"character coverage {character_coverage}: it is a share, above 0 and at most 1")
    if size < 1:
        raise UserError(f"size {size}: a vocabulary needs at least its special pieces and the characters of the text")
    failed: list[BaseException] = []  # what reading the text raised: SentencePiece makes a string of it

    def lines() -> Iterator[str]:
        try:
            yield from _lines(texts)
        except (Exception, KeyboardInterrupt) as error:
            failed.append(error)
            raise

    with _written_whole(model_file) as partial:
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
                max_sentence_length=2**30,  # the default drops every line beyond 4,192 bytes without a word
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
def _written_whole(path: str) -> Iterator[str]:
    """A file beside `path`, found writable at once, that takes its place when all went well."""
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
    """SentencePiece names its own source lines; what a person can do is said here."""
    said = str(error)
    if "sentences_.empty()" in said:
        return ValueError("there is no text to learn a vocabulary from: every line is empty")
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", said):
        return ValueError(
            f"this text gives at most {found[1]} pieces, not {size}: ask for a size up to {found[1]}, or give more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", said):
        bytes_too = ", 256 bytes among them" if byte_fallback else ""
        return ValueError(
            f"{size} pieces cannot hold the text's characters: they and the special pieces are {found[1]}{bytes_too}. "
            f"Ask for a size above {found[1]}, or a lower character coverage"
        )
    return ValueError(f"SentencePiece could not learn from this text: {said}")
