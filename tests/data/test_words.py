"""Texts encoded by a dictionary of words have tf-text's ids, whatever is in them and in many threads at once."""

import concurrent.futures
import random

import numpy as np
import pytest
import seqio
import tensorflow as tf

from tasks import vocabulary
from tasks.vocabulary import words

LETTERS = [*"aeioutnsrl!?.-_'\"#=&0189AZ", "\t", "\n", "\v", "\f", "\0", "\x1c", "\x85", "\u00a0", "\u200b", "\u2028"]
LETTERS += ["\u2581", "é", "e\u0301", "\u0301", "ﬁ", "…", "雪", "山", "😀", "\u3000", "ﷺ", "ｶ", "ﾞ", "</s>", "<unk>"]
VOCABULARY = (
    "the cat sat on a mat and then another cat!! what?? so far, so good; a dog's log: www.cats.com/the-cat".split()
)


def odd_texts(count: int, seed: int = 0) -> list[bytes]:
    """Words that repeat, runs of a letter, letters of all kinds, and bytes that are not text."""
    draw = random.Random(seed)

    def text() -> str:
        kind = draw.random()
        if kind < 0.3:
            return "".join(draw.choice(LETTERS) * draw.choice([1, 1, 2, 3, 7]) for _ in range(draw.randint(0, 30)))
        if kind < 0.5:
            return draw.choice(LETTERS) * draw.randint(0, 90)
        chosen = [*draw.choices(VOCABULARY, k=draw.randint(0, 40)), draw.choice(VOCABULARY) + draw.choice(LETTERS)]
        return draw.choice([" ", "\n", "  ", " \t"]).join(chosen) + draw.choice("!.a") * draw.randint(0, 20)

    texts = [text().encode() for _ in range(count)]
    return [*texts, b"", b" ", bytes(range(128, 256)), b"the \xff cat", " ".join(VOCABULARY * 200).encode()]


@pytest.fixture(scope="module", params=["", "byte_fallback"])
def small(request, tmp_path_factory) -> seqio.SentencePieceVocabulary:
    path = str(tmp_path_factory.mktemp("model") / "m.model")
    lines = [" ".join(random.Random(i).choices(VOCABULARY, k=12)) for i in range(300)]
    size = 290 if request.param else 32
    vocabulary.train(lines, path, size, byte_fallback=bool(request.param), threads=1)
    return seqio.SentencePieceVocabulary(path, extra_ids=4)


def encoder_of(
    model: seqio.SentencePieceVocabulary,
) -> tuple[words.WordEncoder, tf.types.experimental.PolymorphicFunction]:
    encoder = words.WordEncoder(model)
    assert encoder.fits
    return encoder, tf.function(lambda texts: encoder(texts), input_signature=[tf.TensorSpec([None], tf.string)])  # pyright: ignore


def same(encode, model: seqio.SentencePieceVocabulary, texts: list[bytes]) -> bool:
    encoded, expected = encode(tf.constant(texts, tf.string)), model.encode_tf(tf.constant(texts, tf.string))
    np.testing.assert_array_equal(encoded.row_lengths(), expected.row_lengths())
    return np.array_equal(encoded.values, expected.values)


def test_ids_are_those_of_tf_text(small):
    encoder, encode = encoder_of(small)
    texts = odd_texts(1500)
    for start in range(0, len(texts), 128):
        assert same(encode, small, texts[start : start + 128])
    assert len(encoder._words.sizes) > 300 and same(encode, small, texts[:200]) and same(encode, small, [])
    assert 0 in encoder._words.limits and np.isfinite(encoder._words.limits).any(), "some words are fragile"


def test_fragile_words_are_searched(data_dir, monkeypatch):
    """Equally good pieces in another order, which tf-text tells by its rounding; it need not encode the text."""
    model = vocabulary.default_vocabulary()
    assert isinstance(model, seqio.SentencePieceVocabulary)
    encoder, encode = encoder_of(model)
    texts = [f"the {word}{'!' * n} sat on{'.' * n} a mat".encode() for word in VOCABULARY[:4] for n in range(2, 25)]
    assert same(encode, model, texts * 2)
    searched, left = [], []
    search, reference = encoder._searched, encoder._reference
    monkeypatch.setattr(encoder, "_searched", lambda *arguments: searched.append(search(*arguments)) or searched[-1])
    monkeypatch.setattr(encoder, "_reference", lambda texts: left.extend(texts.numpy()) or reference(texts))
    expected = model.encode_tf(tf.constant(texts))
    assert encoder(tf.constant(texts)).to_list() == expected.to_list() and len(searched) > 20 and not left


def test_a_full_dictionary_gives_the_same_ids(small, monkeypatch):
    monkeypatch.setattr(words, "_MAX_WORDS", 20)
    monkeypatch.setattr(words, "_NEW_AT_MOST_WHEN_FULL", 0.5)
    encoder, encode = encoder_of(small)
    texts = [" ".join(VOCABULARY[:18] * 9).encode(), b"the cat sat new! on another2 mat! " * 9, *odd_texts(40)]
    assert all(same(encode, small, [text, text]) for text in texts)
    assert len(encoder._words.sizes) <= 20


def test_words_that_mostly_are_new_are_not_learned(small):
    encoder, encode = encoder_of(small)
    assert same(encode, small, [f"cat{i} dog{i}".encode() for i in range(50)])
    assert not len(encoder._words.sizes)


def test_threads_share_a_dictionary(small):
    texts = odd_texts(600)
    blocks = [draw.choices(texts, k=64) for draw in map(random.Random, range(24))]
    encoder, encode = encoder_of(small)
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        assert all(threads.map(lambda block: same(encode, small, block), blocks))
    assert len(encoder._words.sizes) > 100


def test_a_dataset_encodes_many_blocks_at_once(small):
    """Python code that ran a TensorFlow function would wait for a thread that waits for Python."""
    texts = odd_texts(600)
    encode = vocabulary.block_encoder(small)
    blocks = tf.data.Dataset.from_tensor_slices(texts).batch(4).map(encode, 64)
    rows = [row for block in blocks for row in np.split(block.values, block.row_splits[1:-1])]
    expected = small.encode_tf(tf.constant(texts))
    assert [len(row) for row in rows] == expected.row_lengths().numpy().tolist()
    assert np.array_equal(np.concatenate(rows), expected.values)


def test_t5s_own_vocabulary(data_dir):
    """Near ties too, which rounding decides far inside of long texts: "ravine" after 30,000 of score has other ids."""
    model = vocabulary.default_vocabulary()
    assert isinstance(model, seqio.SentencePieceVocabulary)
    _, encode = encoder_of(model)
    texts = odd_texts(800) + [b"word ravine ravine), YUMSSSSS zzz's " * n for n in (1, 30, 300, 2000)]
    for start in range(0, len(texts), 128):
        assert same(encode, model, texts[start : start + 128])
    assert same(encode, model, texts[-2:])
