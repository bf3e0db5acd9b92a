"""Encodes texts by a dictionary of words, with the ids of tf-text in a fraction of its time.

Pieces of T5's model cross no space, so a word has the same pieces in every text, unless two segmentations of it have
nearly the same score: then rounding, which depends on what stands before the word, decides between them. The scores of
its two best segmentations tell how long a text may be before rounding matters. In longer texts the word is fragile: its
pieces are searched anew, from the rounded score of what stands before it. Texts with a word that could have other
pieces for another reason are encoded by tf-text as a whole.

Words are found and looked up by TensorFlow's operations, which run in parallel; Python sees new words only.

Must not import: datasets, task names.
"""

import itertools
import math
import re
import threading
import unicodedata
from typing import Any, NamedTuple

import numpy as np
import seqio
import tensorflow as tf
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from tasks import blocks

_MAX_WORDS = 1 << 20  # about 200 MB; the dictionary then stays as it is
_MAX_CHARACTERS = 256  # of a word
_MAX_COMPARED = 64  # characters of a word whose two best segmentations are compared; longer ones are always searched
_MAX_SEARCHED = 64  # words of a text; tf-text is faster above
_NEAR = 1e6  # score of the longest texts in which words are searched anew; T5 takes some 10 a token
_NEW_AT_MOST, _NEW_AT_MOST_WHEN_FULL = 3 / 4, 1 / 32  # of the words of a block; above, tf-text is faster
_SPACE = "\u2581"
_PLAIN = re.compile(rb"[!-~]{1,%d}" % _MAX_CHARACTERS)


class _Words(NamedTuple):
    """Words by their indices: where their ids are, their score, and the score of a text below which the ids hold."""

    ids: np.ndarray  # int32, of all words
    starts: np.ndarray  # int64, in `ids`
    sizes: np.ndarray  # int64
    scores: np.ndarray  # float64, without their sign
    limits: np.ndarray  # float64; negative if a text with the word is encoded as a whole


_NO_WORDS = _Words(np.zeros(0, np.int32), *np.zeros((2, 0), np.int64), *np.zeros((2, 0)))


def _take(known: np.ndarray, more: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Take from two arrays as if they were concatenated; an index outside of them gives anything."""
    if not len(more):
        return known.take(indices, mode="clip") if len(known) else np.zeros(len(indices), known.dtype)
    return np.where(indices < len(known), _take(known, more[:0], indices), more.take(indices - len(known), mode="clip"))


class WordEncoder:
    """Encodes texts by a dictionary that grows with the words it meets. Threads may share it.

    Attributes:
      fits: whether a dictionary of words can give tf-text's ids with this kind of model.
    """

    def __init__(self, vocabulary: seqio.SentencePieceVocabulary):
        proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.sp_model)  # pyright: ignore[reportAttributeAccessIssue]
        self._vocabulary = vocabulary
        self._processor = SentencePieceProcessor(model_proto=vocabulary.sp_model)
        types = proto.SentencePiece
        scores = [piece.score for piece in proto.pieces if piece.type == types.NORMAL]
        self._unknown_score = 10.0 - min(scores, default=0.0)  # of a character, without its sign: kUnkPenalty
        # Bytes' NaN is below no limit: their texts are encoded as a whole.
        is_unknown = np.array([piece.type == types.UNKNOWN for piece in proto.pieces])
        score = np.array([-piece.score if piece.type == types.NORMAL else math.nan for piece in proto.pieces])
        size = np.array([len(piece.piece) for piece in proto.pieces])
        self._scores = -score.astype(np.float32)  # as the model adds them
        self._ids = {piece.piece: k for k, piece in enumerate(proto.pieces) if piece.type == types.NORMAL}
        self._longest = max(map(len, self._ids), default=0)
        self._near: dict[int, str] = {}  # the normalised texts of words with a limit, by their indices
        self._facts = np.stack([np.where(is_unknown, 0, score), np.where(is_unknown, 0, size), is_unknown], axis=1)
        symbols = [x.piece.strip(_SPACE) for x in proto.pieces if x.type == proto.SentencePiece.USER_DEFINED]
        self._symbol = re.compile("|".join(map(re.escape, symbols)) or "(?!)")
        self._lock = threading.Lock()
        self._table = tf.lookup.experimental.DenseHashTable(
            tf.string, tf.int64, default_value=-1, empty_key="", deleted_key=" "
        )
        self._words = _NO_WORDS
        self._buffers = list(_NO_WORDS)
        trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
        self.fits = (
            trainer.model_type == trainer.UNIGRAM
            and not trainer.treat_whitespace_as_suffix
            and normalizer.add_dummy_prefix
            and normalizer.remove_extra_whitespaces
            and normalizer.escape_whitespaces
            and any(piece.piece == _SPACE for piece in proto.pieces)
            and not any(re.search(rf"[^{_SPACE}]{_SPACE}|{_SPACE}{_SPACE}|\s", piece.piece) for piece in proto.pieces)
            and self._processor.normalize(" a\tb\nc\rd\fe  f ") == "".join(_SPACE + letter for letter in "abcdef")
        )

    def __call__(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Return the ids of strings [N], int32 [N, (length)]."""
        words: Any = tf.strings.split(texts)
        indices = tf.ensure_shape(self._table.lookup(words.values), [None])
        new, new_indices = tf.unique(tf.boolean_mask(words.values, indices < 0))
        is_worth = tf.numpy_function(self._is_worth, [tf.size(new), tf.size(indices)], tf.bool, stateful=False)
        new = new[: tf.where(tf.ensure_shape(is_worth, []), tf.size(new), 0)]
        arguments = [words.row_lengths(), indices, new, new_indices, *self._reference(new)]
        # Python runs no TensorFlow function: it would wait for a thread, and threads for Python.
        ids, sizes, holds = tf.numpy_function(self._encoded, arguments, [tf.int32, tf.int64, tf.bool], stateful=False)
        # A vertical tab ends a word of `split`, but not of the model.
        holds = tf.ensure_shape(holds, [None]) & ~tf.strings.regex_full_match(texts, r"(?s).*\v.*")
        rows = tf.concat([blocks.ragged(ids, sizes), blocks.ragged(*self._reference(texts[~holds]))], axis=0)
        others = tf.size(texts) - 1 + tf.cumsum(tf.cast(~holds, tf.int32))
        return tf.gather(rows, tf.where(holds, tf.range(tf.size(texts)), others))

    def _reference(self, texts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        rows = self._vocabulary.encode_tf(texts)
        return rows.values, rows.row_lengths()

    def _is_worth(self, new: np.int32, words: np.int32) -> np.bool_:
        """Return whether it takes less time to learn a block's new words than to encode its texts as a whole."""
        is_full = len(self._words.sizes) >= _MAX_WORDS
        return np.bool_(new <= words * (_NEW_AT_MOST_WHEN_FULL if is_full else _NEW_AT_MOST))

    def _encoded(
        self,
        counts: np.ndarray,
        indices: np.ndarray,
        new: np.ndarray,
        indices_in_new: np.ndarray,
        new_ids: np.ndarray,
        new_sizes: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the ids of texts of `counts` words, how many each has, and whether they hold: they are tf-text's."""
        words, more = self._words, _NO_WORDS  # at least the words that the table had when it was asked
        if len(new):
            words, more, learned = self._learned(new, new_ids, new_sizes)
            indices = indices.copy()
            indices[indices < 0] = learned[indices_in_new]

        is_known = indices >= 0
        first_words = np.append(0, np.cumsum(counts))
        sizes = np.where(is_known, _take(words.sizes, more.sizes, indices), 0)
        ends = np.cumsum(sizes)
        in_words = np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)
        ids = _take(words.ids, more.ids, np.repeat(_take(words.starts, more.starts, indices), sizes) + in_words)

        holds, has_words = np.ones(len(counts), bool), np.flatnonzero(counts)
        if len(has_words):
            firsts = first_words[has_words]
            scores = np.add.reduceat(_take(words.scores, more.scores, indices), firsts)
            limits = np.where(is_known, _take(words.limits, more.limits, indices), 0.0)
            holds[has_words] = scores < np.minimum.reduceat(limits, firsts)
        splits = np.append(0, ends)[first_words]
        counts = np.diff(splits)
        parts, done = [], 0
        for text in np.flatnonzero(~holds):
            own, start, end = indices[first_words[text] : first_words[text + 1]], splits[text], splits[text + 1]
            resolved = self._resolved(words, own, ids[start:end])
            if resolved is not None:
                parts += [ids[done:start], resolved]
                done, counts[text], holds[text] = end, len(resolved), True
        return np.concatenate([*parts, ids[done:]]), counts, holds

    def _resolved(self, words: _Words, indices: np.ndarray, ids: np.ndarray) -> np.ndarray | None:
        """Return the ids of a text with fragile words, given the dictionary's; None if they cannot be told."""
        if (indices < 0).any() or (indices >= len(words.limits)).any() or (words.limits[indices] < 0).any():
            return None
        sums = self._running(ids)
        ends = np.cumsum(words.sizes[indices])
        fragile = np.flatnonzero(words.limits[indices] <= words.scores[indices].sum())
        if len(fragile) > _MAX_SEARCHED:
            return None
        for k in fragile:
            start, end = ends[k] - words.sizes[indices[k]], ends[k]
            text = self._near.get(indices[k])
            row = None if text is None else self._searched(text, float(sums[start]))
            if row is None:
                return None
            if not np.array_equal(row, ids[start:end]):
                ids, ends = np.concatenate([ids[:start], row, ids[end:]]), ends + len(row) - (end - start)
                sums = self._running(ids)
        return None if np.isnan(sums[-1]) else ids

    def _running(self, ids: np.ndarray) -> np.ndarray:
        """Return the scores before each piece and after the last, added as the model does."""
        return np.add.accumulate(np.append(np.float32(0), self._scores[ids]))

    def _searched(self, word: str, before: float) -> np.ndarray | None:
        """Return the ids that tf-text's search finds for a normalised word, from the score of all pieces before it.

        Sums are compared in float64 with the best so far in float32, as SentencePiece 0.1.96 does (`EncodeOptimized`).
        """
        scores, pieces = {0: before}, {}
        for i, character in enumerate(word):
            if character not in self._ids:
                return None  # unknown characters are joined and count differently
            for j in range(i + 1, min(i + self._longest, len(word)) + 1):
                if (piece := self._ids.get(word[i:j])) is None:
                    continue
                score = scores[i] + float(self._scores[piece])
                if j not in scores or score > scores[j]:
                    scores[j], pieces[j] = float(np.float32(score)), (i, piece)
        ids, end = [], len(word)
        while end:
            end, piece = pieces[end]
            ids.append(piece)
        return np.array(ids[::-1], np.int32)

    def _learned(self, new: np.ndarray, ids: np.ndarray, sizes: np.ndarray) -> tuple[_Words, _Words, np.ndarray]:
        """Add words with their ids to the dictionary.

        Returns the dictionary, words that it has no place for, and the indices of `new` in the two concatenated.
        """
        with self._lock:
            words, more = self._words, _NO_WORDS
            indices = self._table.lookup(tf.constant(new)).numpy()
            is_new = indices < 0  # no other thread has learned it
            if is_new.any():
                more, near = self._segmented(new[is_new].tolist(), ids[np.repeat(is_new, sizes)], sizes[is_new])
                more = more._replace(starts=more.starts + len(words.ids))
                indices[is_new] = len(words.sizes) + np.arange(len(more.sizes))
                if len(words.sizes) + len(more.sizes) <= _MAX_WORDS:
                    self._near |= {len(words.sizes) + k: text for k, text in near.items()}
                    self._words = words = _Words(*map(self._appended, range(len(words)), words, more))
                    more = _NO_WORDS
                    self._table.insert(tf.constant(new[is_new]), tf.constant(indices[is_new]))
        return words, more, indices

    def _appended(self, column: int, known: np.ndarray, more: np.ndarray) -> np.ndarray:
        """Append to a column in its buffer, behind what other threads read."""
        size = len(known) + len(more)
        if size > len(self._buffers[column]):
            self._buffers[column] = np.resize(known, 2 * size) if len(known) else np.zeros(2 * size, known.dtype)
        self._buffers[column][len(known) : size] = more
        return self._buffers[column][:size]

    def _segmented(self, words: list[bytes], ids: np.ndarray, sizes: np.ndarray) -> tuple[_Words, dict[int, str]]:
        """Return what the dictionary keeps of words, and the normalised texts of those that have a limit."""
        texts = {i: text for i, word in enumerate(words) if (text := self._plain_text(word)) is not None}
        starts = np.cumsum(sizes) - sizes
        rows = [row.tolist() for row in np.split(ids, starts[1:])]
        is_compared = [len(text) <= _MAX_COMPARED for text in texts.values()]
        short = list(itertools.compress(texts.values(), is_compared))
        compared = iter(self._processor.nbest_encode(short, nbest_size=2))
        pairs = [next(compared) if x else [rows[i]] * 2 for i, x in zip(texts, is_compared, strict=True)]
        best, second = self._sums([x[0] for x in pairs]), self._sums([x[-1] for x in pairs])
        size = np.maximum(best[1], second[1])
        for k in np.flatnonzero(best[2] * second[2]):  # unknown characters on both sides
            size[k] = len(self._processor.normalize(list(texts.values())[k]))
        best_score, second_score = (x[0] + (size - x[1]) * self._unknown_score for x in (best, second))
        has_second = np.array([len(pair) > 1 for pair in pairs], bool)
        margin = np.where(has_second, second_score - best_score, np.inf)

        # Each addition of a score, at most one a character in each of two segmentations, rounds the sum up to there by
        # 2^-24 of it.
        limit = margin * 2**23 / np.maximum(size, 1)
        is_same = np.array([pair[0] == rows[i] for i, pair in zip(texts, pairs, strict=True)], bool)
        is_sure = np.isfinite(best_score) & ~np.isnan(limit)
        scores, limits = np.zeros(len(words)), np.full(len(words), -1.0)
        scores[list(texts)] = np.where(is_sure, best_score, 0.0)
        limits[list(texts)] = np.where(is_sure, np.where(is_same, np.maximum(limit, 0.0), 0.0), -1.0)
        near = {
            i: self._processor.normalize(texts[i]) for i in np.flatnonzero((limits >= 0) & (limits < _NEAR)).tolist()
        }
        return _Words(ids, starts, sizes, scores, limits), near

    def _sums(self, rows: list[list[int]]) -> np.ndarray:
        """Return the sums of `_facts` over each word's pieces, [3, n]."""
        splits = np.cumsum([0, *map(len, rows)])
        sums, has_pieces = np.zeros((len(rows), 3)), np.flatnonzero(np.diff(splits))
        if len(has_pieces):
            pieces = np.fromiter(itertools.chain.from_iterable(rows), np.int32, splits[-1])
            sums[has_pieces] = np.add.reduceat(self._facts[pieces], splits[has_pieces], axis=0)
        return sums.T

    def _plain_text(self, word: bytes) -> str | None:
        """Return a word's text, or None if its pieces may not be those of the word alone, whatever their scores."""
        if _PLAIN.fullmatch(word):
            text = word.decode()
        else:
            try:
                text = word.decode()
            except UnicodeDecodeError:
                return None
            if (
                len(text) > _MAX_CHARACTERS
                or _SPACE in text
                or unicodedata.combining(text[0])  # as if the normaliser could compose it with a space
                or any(unicodedata.category(x) == "Cc" and self._processor.normalize(x) != _SPACE + x for x in text)
            ):
                return None
        return None if self._symbol.search(text) else text
