"""Cached decoding against the full forward pass, and against Hugging Face and T5X."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from core.test_model import DECODER_INPUT, ENCODER_INPUT, init, logits
from repeats import fast

from t5x_lite.data import packing
from t5x_lite.inference import decode
from t5x_lite.model.t5 import T5

score = jax.jit(decode.score, static_argnames="config")


def decoder(golden_t5, **settings):
    return compiled(golden_t5.config, decode.Decoding(**settings))


@functools.cache
def compiled(config, decoding):
    return jax.jit(functools.partial(decode.generate, config=config, max_length=24, decoding=decoding))


@pytest.mark.parametrize("chunk", fast([1, 2], "1"))
def test_cached_decoding_equals_the_full_forward_on_every_prefix(chunk):
    params = init(tiny.CONFIG)
    model = T5(tiny.CONFIG)

    @jax.jit
    def start():
        encoded = model.apply({"params": params}, ENCODER_INPUT, method=T5.encode)
        return model.apply({"params": params}, encoded, len(encoded), 6, method=T5.start_cache)

    @jax.jit
    def next_logits(tokens, index, cache):
        return model.apply({"params": params}, tokens, index, cache, ENCODER_INPUT, method=T5.decode_step)

    cache = start()
    full = logits(tiny.CONFIG, params, ENCODER_INPUT, DECODER_INPUT)
    for index in range(0, 4, chunk):
        got, cache = next_logits(DECODER_INPUT[:, index : index + chunk], index, cache)
        np.testing.assert_allclose(got, full[:, index : index + chunk], atol=1e-4)


def test_greedy_follows_the_argmax_of_the_full_forward_and_stops_at_the_end_token():
    params = init(tiny.CONFIG, seed=3)
    tokens, scores = jax.jit(functools.partial(decode.generate, config=tiny.CONFIG, max_length=9))(
        params, ENCODER_INPUT
    )
    assert tokens.shape == (2, 1, 9) and scores.shape == (2, 1)
    for row in range(2):
        prefix, log_likelihood = [0], 0.0
        while len(prefix) < 10 and prefix[-1] != 1:
            padded = np.tile(np.pad(prefix, (0, 10 - len(prefix))), (2, 1))
            last = logits(tiny.CONFIG, params, ENCODER_INPUT, padded)[row, len(prefix) - 1]
            log_likelihood += float(jax.nn.log_softmax(last).max())
            prefix.append(int(last.argmax()))
        expected = np.pad(prefix[1:], (0, 10 - len(prefix)))
        np.testing.assert_array_equal(tokens[row, 0], expected)
        np.testing.assert_allclose(scores[row, 0], log_likelihood, rtol=1e-4)


def test_greedy_agrees_with_hugging_face(golden_t5):
    expected = np.asarray(golden_t5.outputs["generation"]["hf_greedy"]["sequences"])[:, 1:]
    inputs = golden_t5.io["input_ids"] * golden_t5.io["attention_mask"]
    tokens, _ = decoder(golden_t5)(golden_t5.params, inputs)
    np.testing.assert_array_equal(tokens[:, 0, : expected.shape[1]], expected)
    assert not np.any(tokens[:, 0, expected.shape[1] :])


def test_score_is_the_log_likelihood_of_the_targets(golden_t5):
    io = golden_t5.io
    batch = golden_t5.batch
    got = score(golden_t5.params, batch, config=golden_t5.config)
    expected = -np.sum(io["token_nll"] * (io["targets"] != 0), axis=-1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.6, *(pytest.param(alpha, marks=pytest.mark.slow) for alpha in (0.0, 1.0))])
def test_beam_search_agrees_with_t5x(golden_t5, alpha):
    reference = golden_t5.outputs["generation"][f"t5x_beam4_alpha{alpha:g}"]
    inputs = golden_t5.io["input_ids"] * golden_t5.io["attention_mask"]
    beam = decoder(golden_t5, method="beam", beam_size=4, num_decodes=4, alpha=alpha)
    tokens, scores = beam(golden_t5.params, inputs)
    np.testing.assert_array_equal(tokens, np.asarray(reference["sequences"])[:, ::-1])  # T5X's come worst first
    np.testing.assert_allclose(scores, np.asarray(reference["scores"])[:, ::-1], atol=1e-4)
    greedy, _ = decoder(golden_t5)(golden_t5.params, inputs)
    assert np.any(np.asarray(greedy)[:, 0] != np.asarray(tokens)[:, 0])


@pytest.mark.slow
def test_one_beam_is_greedy(golden_t5):
    inputs = golden_t5.io["input_ids"] * golden_t5.io["attention_mask"]
    one, scores = decoder(golden_t5, method="beam", beam_size=1, alpha=0.0)(golden_t5.params, inputs)
    greedy, greedy_scores = decoder(golden_t5)(golden_t5.params, inputs)
    np.testing.assert_array_equal(one, greedy)
    np.testing.assert_allclose(scores, greedy_scores, atol=1e-4)


@pytest.mark.slow
def test_beams_that_never_end_are_given_as_they_are(golden_t5):
    inputs = golden_t5.io["input_ids"] * golden_t5.io["attention_mask"]
    beam = decode.Decoding("beam")
    short = jax.jit(functools.partial(decode.generate, config=golden_t5.config, max_length=2, decoding=beam))
    tokens, scores = short(golden_t5.params, inputs)
    assert np.all(tokens[2, 0] > 1)  # the shortest ended result of this row has 21 tokens
    assert scores[2, 0] > -100


@pytest.mark.slow
def test_sampling_draws_from_the_models_distribution(golden_t5):
    rows, draws = golden_t5.io["input_ids"][2:3] * golden_t5.io["attention_mask"][2:3], 4000
    model_logits = jax.jit(T5(golden_t5.config).apply)
    logits = model_logits({"params": golden_t5.params}, rows, np.zeros((1, 1), np.int32))[0, 0]

    def shares(drawn):
        return np.bincount(np.asarray(drawn), minlength=len(logits)) / draws

    def drawn(**settings):
        decoding, keys = decode.Decoding("sample", **settings), jax.random.split(jax.random.key(1), draws)
        return shares(decode._draw(jnp.tile(logits, (draws, 1)), keys, decoding=decoding))

    decoding = decode.Decoding("sample", num_decodes=draws, temperature=0.5)
    sample = jax.jit(functools.partial(decode.generate, config=golden_t5.config, max_length=1, decoding=decoding))
    tokens, scores = sample(golden_t5.params, rows, key=jax.random.key(0))
    np.testing.assert_allclose(scores[0], np.asarray(jax.nn.log_softmax(logits))[tokens[0, :, 0]], atol=1e-4)
    for temperature, got in ((0.5, shares(tokens[0, :, 0])), (1.0, drawn())):
        expected = np.asarray(jax.nn.softmax(logits / temperature))
        spread = 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-3
        assert np.all(np.abs(got - expected) < spread)
    assert np.abs(shares(tokens[0, :, 0]) - np.asarray(jax.nn.softmax(logits))).max() > 0.05
    order = np.argsort(-np.asarray(logits))
    assert set(np.flatnonzero(drawn(top_k=3))) == set(order[:3])
    probabilities = np.asarray(jax.nn.softmax(logits))[order]
    kept = int(np.searchsorted(np.cumsum(probabilities), 0.6)) + 1
    assert set(np.flatnonzero(drawn(top_p=0.6))) == set(order[:kept])


@pytest.mark.slow
def test_samples_depend_on_the_key_alone_and_rows_have_their_own_limits(golden_t5):
    inputs = golden_t5.io["input_ids"] * golden_t5.io["attention_mask"]
    sample = decoder(golden_t5, method="sample", num_decodes=3)
    keys, others = jax.random.split(jax.random.key(2), 4), jax.random.split(jax.random.key(1), 4)
    together, _ = sample(golden_t5.params, inputs, key=keys)
    again, _ = sample(golden_t5.params, inputs, key=keys)
    other, _ = sample(golden_t5.params, inputs, key=others)
    np.testing.assert_array_equal(together, again)
    assert np.any(together != other)
    assert np.any(together[:, 0] != together[:, 1])
    alone, _ = sample(golden_t5.params, np.pad(inputs[2:3], [(0, 0), (0, 5)]), key=keys[2:3])
    np.testing.assert_array_equal(alone[0], together[2])  # whatever the rows beside it, and their width
    limits = np.array([1, 2, 3, 4])
    limited, _ = decoder(golden_t5)(golden_t5.params, inputs, max_lengths=limits)
    whole, _ = decoder(golden_t5)(golden_t5.params, inputs)
    for row, limit in enumerate(limits):
        np.testing.assert_array_equal(limited[row, 0, :limit], whole[row, 0, :limit])
        assert not np.any(limited[row, 0, limit:])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"method": "beam", "num_decodes": 4}, marks=pytest.mark.slow),
        pytest.param({"method": "sample", "num_decodes": 3}, marks=pytest.mark.slow),
        {},
    ],
)
def test_log_likelihoods_of_results_are_what_scoring_them_gives(golden_t5, settings):
    inputs = golden_t5.io["input_ids"] * golden_t5.io["attention_mask"]
    key = {"key": jax.random.split(jax.random.key(0), 4)} if settings.get("method") == "sample" else {}
    tokens, ranked = decoder(golden_t5, **settings)(golden_t5.params, inputs, **key)
    got = decode.log_likelihoods(tokens, ranked, decode.Decoding(**settings))
    got = np.asarray(got)
    for n in range(tokens.shape[1]):
        expected = np.asarray(
            score(golden_t5.params, packing.unpacked(inputs, np.asarray(tokens)[:, n]), config=golden_t5.config)
        )
        found = np.isfinite(got[:, n])
        np.testing.assert_allclose(got[found, n], expected[found], rtol=1e-5)
        assert n > 0 or np.all(found)
    assert np.any(np.abs(got - ranked) > 1) == (settings.get("method") == "beam")


def test_of_beams_that_never_ended_there_is_no_log_likelihood():
    tokens = jnp.array([[[5, 1, 0], [0, 0, 0]], [[5, 6, 7], [5, 6, 8]]])
    scores = jnp.array([[-2.0, -1e7], [-3.0, -4.0]])
    got = decode.log_likelihoods(tokens, scores, decode.Decoding("beam", alpha=1.0))
    np.testing.assert_allclose(got, [[-2 * 7 / 6, -np.inf], [-3, -4]], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "best"}, "DECODE_METHOD 'best'"),
        ({"method": "beam", "num_decodes": 5}, "NUM_DECODES 5: beam gives 1 to 4"),
        ({"num_decodes": 2}, "NUM_DECODES 2: greedy gives 1 to 1"),
        ({"method": "sample", "temperature": 0.0}, "TEMPERATURE 0"),
        ({"method": "sample", "top_p": 0.0}, "TOP_P 0"),
        ({"method": "sample"}, "needs a key"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says, unchecked_types):
    with pytest.raises(ValueError, match=says):
        decoding = decode.Decoding(**settings)
        decode.generate({}, np.ones((1, 2), np.int32), config=tiny.CONFIG, max_length=3, decoding=decoding)
