"""A loaded model against what Hugging Face and T5X made of the same one, and text through a tokenizer."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import t5x_lite
from t5x_lite import convert, sharding
from t5x_lite.convert import tokenizer


@pytest.fixture(scope="module")
def model(golden):
    return t5x_lite.load(golden("hf_t5_v11"))


def test_logits_also_of_packed_rows_agree_with_hugging_face_and_t5x(model, golden_t5):
    io, batch = golden_t5.io, golden_t5.batch
    got = model.logits(batch["encoder_input_tokens"], batch["decoder_input_tokens"])
    at = io["targets"] != 0
    np.testing.assert_allclose(got[at], io["logits"][at], atol=1e-4)
    names = ("encoder_input_tokens", "decoder_input_tokens", "encoder_segment_ids", "decoder_segment_ids")
    got = model.logits(*(io[f"packed_{name}"] for name in names))
    at = io["packed_decoder_target_tokens"] != 0
    np.testing.assert_allclose(got[at], io["packed_t5x_logits"][at], atol=1e-4)


@pytest.mark.slow
def test_greedy_tokens_and_scores_agree(model, golden_t5):
    io, inputs = golden_t5.io, golden_t5.batch["encoder_input_tokens"]
    tokens, scores = model.generate(inputs, max_length=24)
    expected = np.asarray(golden_t5.outputs["generation"]["hf_greedy"]["sequences"])[:, 1:]
    np.testing.assert_array_equal(tokens[:, 0, : expected.shape[1]], expected)
    found = model.score(inputs, io["targets"], batch_size=3)
    np.testing.assert_allclose(found, -np.sum(io["token_nll"] * (io["targets"] != 0), axis=-1), rtol=1e-5)
    # Of its own greedy answers the model's score is what decoding said.
    np.testing.assert_allclose(model.score(inputs, tokens[:, 0]), scores[:, 0], rtol=1e-4)


@pytest.mark.slow
def test_rows_need_not_divide_over_a_mesh(model, golden, golden_t5):
    inputs, targets = golden_t5.batch["encoder_input_tokens"], golden_t5.io["targets"]
    spread = t5x_lite.load(golden("hf_t5_v11"), mesh=sharding.make_mesh(4, devices=jax.devices()[:4]))
    expected = model.score(inputs, targets)
    np.testing.assert_allclose(spread.score(inputs, targets, batch_size=3), expected, rtol=1e-4)
    spread.vocabulary = tokenizer.ByteVocabulary()
    model = t5x_lite.LoadedModel(model.config, model.params, spread.vocabulary)
    texts = ["one", "two", "three", "four", "five"]
    answers = model.predict(texts, max_length=5)
    assert spread.predict(texts, max_length=5, batch_size=3) == answers
    assert len(set(answers)) > 1


@pytest.mark.exhaustive
def test_samples_and_limits_of_each_row(model, golden_t5):
    inputs = golden_t5.batch["encoder_input_tokens"]
    together, _ = model.generate(inputs, "sample", 9, seed=[5, 6, 7, 8], max_lengths=np.array([9, 9, 9, 2]))
    alone, _ = model.generate(inputs[2:3], "sample", 9, seed=[7])
    np.testing.assert_array_equal(alone[0], together[2])
    assert not np.any(together[3, 0, 2:])
    assert np.all(together[3, 0, :2])


@pytest.mark.slow
def test_bfloat16_is_near(model, golden, golden_t5):
    inputs = golden_t5.batch["encoder_input_tokens"], golden_t5.batch["decoder_input_tokens"]
    exact, near = model.logits(*inputs), t5x_lite.load(golden("hf_t5_v11"), dtype="bfloat16").logits(*inputs)
    at = golden_t5.io["targets"] != 0
    error = np.linalg.norm((near - exact)[at]) / np.linalg.norm(exact[at])
    assert 1e-4 < error < 2e-2


def test_text_needs_a_tokenizer(model):
    with pytest.raises(ValueError, match=r"spiece\.model"):
        model.predict(["some text"])


@pytest.mark.slow
def test_predictions_come_in_the_order_asked_whatever_their_lengths(data_dir, monkeypatch):
    model = t5x_lite.load(data_dir / "t5x_test_t5_tiny.checkpoint_0")
    model.vocabulary = t5x_lite.Vocabulary(data_dir / "vocab" / "sentencepiece.model")
    texts = ["a b c d e f g h i j " * n for n in (1, 5, 2, 4)]
    assert len(model.predict(texts[:1], method="sample", num_decodes=3, max_length=5)) == 3
    scores = model.score(texts, ["x", "y", "z", "w"])
    np.testing.assert_allclose(scores[2:3], model.score(texts[2:3], ["z"]), rtol=1e-5)
    with pytest.raises(ValueError, match="put it in a list"):
        model.predict("one text")
    monkeypatch.setattr(model, "generate", lambda rows, **_: (rows[:, None], None))  # says its inputs again
    assert model.predict(texts, batch_size=3) == [text.strip() for text in texts]


def test_the_vocabulary_is_t5s(data_dir):
    vocabulary = t5x_lite.Vocabulary(data_dir / "vocab" / "sentencepiece.model")
    assert len(vocabulary) == 32100
    assert vocabulary.encode("Thank you <extra_id_0> me <extra_id_1>") == [1562, 25, 32099, 140, 32098]
    assert vocabulary.decode([1562, 25, 32099, 140, 1, 7, 0]) == "Thank you <extra_id_0> me"
    assert "⁇" in vocabulary.decode([32127])


def test_the_tokenizer_of_a_checkpoint_is_beside_it_or_in_its_runs_config(tmp_path):
    step = tmp_path / "checkpoints" / "7"
    (step / "params").mkdir(parents=True)
    assert convert.tokenizer_file(step) is None
    (tmp_path / "mine.model").touch()
    (tmp_path / "config.gin").write_text(f"VOCABULARY = '{tmp_path / 'mine.model'}'\n")
    assert convert.tokenizer_file(step) == tmp_path / "mine.model"
    (tmp_path / "spiece.model").touch()
    assert convert.tokenizer_file(step) == tmp_path / "spiece.model"


@pytest.mark.slow
def test_loading_needs_no_tokenizer_library():
    check = (
        "import sys, t5x_lite; from t5x_lite.inference.pretrained import LoadedModel; assert callable(t5x_lite.load);"
        "assert t5x_lite.LoadedModel is LoadedModel; assert not {'tensorflow', 'sentencepiece'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
