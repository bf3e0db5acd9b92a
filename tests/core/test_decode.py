"""Cached decoding against the full forward pass, and against Hugging Face and T5X."""

import functools

import jax
import numpy as np
import pytest
from core.test_model import DECODER_INPUT, ENCODER_INPUT, TINY, init, logits

from t5x_lite import decode
from t5x_lite.model import T5


@pytest.mark.parametrize("chunk", [1, 2])
def test_cached_decoding_equals_the_full_forward_on_every_prefix(chunk):
    params = init(TINY)
    model = T5(TINY)

    @jax.jit
    def start():
        encoded = model.apply({"params": params}, ENCODER_INPUT, method=T5.encode)
        return model.apply({"params": params}, encoded, 6, method=T5.start_cache)

    @jax.jit
    def next_logits(tokens, index, cache):
        return model.apply({"params": params}, tokens, index, cache, ENCODER_INPUT, method=T5.decode_step)

    cache = start()
    full = logits(TINY, params, ENCODER_INPUT, DECODER_INPUT)
    for index in range(0, 4, chunk):
        got, cache = next_logits(DECODER_INPUT[:, index : index + chunk], index, cache)
        np.testing.assert_allclose(got, full[:, index : index + chunk], atol=1e-4)


def test_greedy_follows_the_argmax_of_the_full_forward_and_stops_at_the_end_token():
    params = init(TINY, seed=3)
    tokens, scores = jax.jit(functools.partial(decode.greedy, config=TINY, max_length=9))(params, ENCODER_INPUT)
    assert tokens.shape == (2, 1, 9) and scores.shape == (2, 1)
    for row in range(2):
        prefix, log_likelihood = [0], 0.0
        while len(prefix) < 10 and prefix[-1] != 1:
            padded = np.tile(np.pad(prefix, (0, 10 - len(prefix))), (2, 1))
            last = logits(TINY, params, ENCODER_INPUT, padded)[row, len(prefix) - 1]
            log_likelihood += float(jax.nn.log_softmax(last).max())
            prefix.append(int(last.argmax()))
        expected = np.pad(prefix[1:], (0, 10 - len(prefix)))
        np.testing.assert_array_equal(tokens[row, 0], expected)
        np.testing.assert_allclose(scores[row, 0], log_likelihood, rtol=1e-4)


def test_greedy_agrees_with_hugging_face(golden_t5):
    expected = np.asarray(golden_t5.outputs["generation"]["hf_greedy"]["sequences"])[:, 1:]
    inputs = golden_t5.io["input_ids"] * golden_t5.io["attention_mask"]
    greedy = jax.jit(functools.partial(decode.greedy, config=golden_t5.config, max_length=24))
    tokens, _ = greedy(golden_t5.params, inputs)
    np.testing.assert_array_equal(tokens[:, 0, : expected.shape[1]], expected)
    assert not np.any(tokens[:, 0, expected.shape[1] :])


def test_score_is_the_log_likelihood_of_the_targets(golden_t5):
    io = golden_t5.io
    batch = golden_t5.batch
    got = jax.jit(functools.partial(decode.score, config=golden_t5.config))(golden_t5.params, batch)
    expected = -np.sum(io["token_nll"] * (io["targets"] != 0), axis=-1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
