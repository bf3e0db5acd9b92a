"""A decoder alone: who sees whom, decoding against the full forward pass, training on rows of inputs and targets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from t5x_lite import sharding
from t5x_lite.data import packing
from t5x_lite.inference import decode, pretrained
from t5x_lite.model.t5 import T5, T5Config, forward
from t5x_lite.training import step
from t5x_lite.training.optim import adafactor, constant, make_optimizer

LM = T5Config(d_model=12, d_ff=20, num_heads=3, head_dim=5, num_encoder_layers=0, num_decoder_layers=2, vocab_size=61)
PREFIX_LM = dataclasses.replace(LM, prefix_lm=True)
# Two examples in the first row, one in the second; every token of a row is another, and none is the end token.
INPUTS = np.array([[11, 12, 13, 14], [21, 22, 0, 0], [31, 32, 33, 0]])
TARGETS = np.array([[41, 42, 43], [51, 52, 0], [45, 46, 0]])
PACKED = packing.pack_joined(INPUTS, TARGETS, 11)


init = functools.cache(tiny.random_params)


@functools.partial(jax.jit, static_argnums=0)
def jitted_forward(config, params, batch):
    return forward(config, params, batch)


@functools.partial(jax.jit, static_argnums=0)
def slope(config, params, batch, row, place):
    """Of the logits at `place` of `row`, by the table of tokens."""
    return jax.grad(lambda p: forward(config, p, batch)[row, place].sum())(params)["token_embedder"]["embedding"]


def seen_from(config, batch, row, place):
    """The ids of the tokens read in `row` that the logits at `place` depend on."""
    table = slope(config, init(config), batch, row, place)
    return set(np.flatnonzero(np.abs(table).sum(axis=1)).tolist())


@pytest.mark.parametrize(
    ("config", "place", "seen"),
    [
        (LM, 2, {0, 11, 12}),  # what is read at 2 is the second input
        (PREFIX_LM, 2, {0, 11, 12, 13, 14}),
        (PREFIX_LM, 0, {0, 11, 12, 13, 14}),
        (LM, 4, {0, 11, 12, 13, 14}),  # the last input predicts the first target
        (PREFIX_LM, 4, {0, 11, 12, 13, 14}),
        (PREFIX_LM, 5, {0, 11, 12, 13, 14, 41}),  # targets are causal
        (LM, 9, {0, 21, 22}),  # the second example sees nothing of the first
        (PREFIX_LM, 8, {0, 21, 22}),
        (PREFIX_LM, 10, {0, 21, 22, 51}),
    ],
)
def test_gradients_show_who_sees_whom_in_a_packed_row(config, place, seen):
    np.testing.assert_array_equal(PACKED["decoder_input_tokens"][0], [0, 11, 12, 13, 14, 41, 42, 0, 21, 22, 51])
    assert seen_from(config, PACKED, 0, place) == seen


def test_packed_rows_give_each_example_the_logits_it_has_alone():
    alone = jitted_forward(PREFIX_LM, init(PREFIX_LM), packing.joined(INPUTS, TARGETS))
    packed = jitted_forward(PREFIX_LM, init(PREFIX_LM), PACKED)
    np.testing.assert_allclose(packed[0, :7], alone[0, :7], atol=1e-5)
    np.testing.assert_allclose(packed[0, 7:11], alone[1, :4], atol=1e-5)
    causal = jitted_forward(LM, init(PREFIX_LM), PACKED)
    assert np.abs(causal[0, :7] - packed[0, :7]).max() > 1e-3


@pytest.mark.parametrize(
    "config", [pytest.param(LM, id="lm", marks=pytest.mark.slow), pytest.param(PREFIX_LM, id="prefix_lm")]
)
def test_decoding_from_a_prefilled_cache_follows_the_full_forward(config):
    params = init(config, seed=4)
    inputs = np.pad(INPUTS, [(0, 1), (0, 0)])  # the last row has no inputs
    generate = functools.partial(decode.generate, config=config, max_length=6)
    tokens, scores = jax.jit(generate)(params, inputs)
    for row, sizes in enumerate(np.count_nonzero(inputs, axis=1)):
        targets, likelihood = [], 0.0
        while len(targets) < 6 and targets[-1:] != [1]:
            # The token behind the last one is only there so that the last one is read.
            batch = packing.joined(inputs[row : row + 1], np.array([[*targets, 1]]))
            batch = {name: np.pad(x, [(0, 0), (0, 12 - x.shape[1])]) for name, x in batch.items()}
            last = jitted_forward(config, params, batch)[0, sizes + len(targets)]
            likelihood += float(jax.nn.log_softmax(last).max())
            targets.append(int(last.argmax()))
        np.testing.assert_array_equal(tokens[row, 0], np.pad(targets, (0, 6 - len(targets))))
        np.testing.assert_allclose(scores[row, 0], likelihood, rtol=1e-4)
    assert len({tuple(row) for row in np.asarray(tokens[:, 0]).tolist()}) > 1  # the inputs matter
    one_beam = decode.Decoding("beam", beam_size=1, alpha=0.0)
    beams, beam_scores = jax.jit(functools.partial(generate, decoding=one_beam))(params, inputs)
    np.testing.assert_array_equal(beams, tokens)
    np.testing.assert_allclose(beam_scores, scores, rtol=1e-4)


@pytest.mark.slow
def test_loaded_models_read_inputs_before_targets():
    model = pretrained.LoadedModel(PREFIX_LM, init(PREFIX_LM))
    start = np.pad(TARGETS, [(0, 0), (1, 0)])[:, :-1]
    got = model.logits(INPUTS, start)
    rows = packing.joined(INPUTS, TARGETS)
    whole = model.logits(None, rows["decoder_input_tokens"], decoder_causal_attention=rows["decoder_causal_attention"])
    causal = [model.logits(rows["decoder_input_tokens"]), model.logits(None, rows["decoder_input_tokens"])]
    np.testing.assert_array_equal(*causal)
    assert np.abs(causal[0] - whole).max() > 1e-3
    for row, size in enumerate(np.count_nonzero(INPUTS, axis=1)):
        count = np.count_nonzero(TARGETS[row])
        np.testing.assert_allclose(got[row, :count], whole[row, size : size + count], atol=1e-5)
    expected = [
        sum(jax.nn.log_softmax(got[row, t])[TARGETS[row, t]] for t in range(np.count_nonzero(TARGETS[row])))
        for row in range(3)
    ]
    np.testing.assert_allclose(model.score(INPUTS, TARGETS), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LM, id="lm", marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(PREFIX_LM, scan_layers=False), id="prefix_lm", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_alone_learns_its_targets_on_a_mesh(config):
    mesh = sharding.make_mesh(2, 2, 1, devices=jax.devices()[:4])
    optimizer = make_optimizer(adafactor(), constant(0.05))
    compiler = step.Compiler(mesh)
    abstract = step.abstract_state(config, optimizer, mesh)
    state = tiny.random_state(optimizer, abstract)
    train = compiler.train_step(abstract, config=config, optimizer=optimizer)
    batch = {name: np.tile(x, (2, 1)) for name, x in PACKED.items()}
    assert batch["decoder_input_tokens"].shape == (4, 11)
    on_mesh = sharding.shard_batch(batch, sharding.batch_sharding(mesh))
    losses = []
    for _ in range(12):
        state, metrics = train(state, on_mesh, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 3
    assert float(metrics["target_tokens"]) == 14 and float(metrics["input_tokens"]) == 18


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="prefix_lm needs a decoder-only model"):
        dataclasses.replace(PREFIX_LM, num_encoder_layers=2)
    with pytest.raises(ValueError, match="needs encoder_input_tokens"):
        T5(dataclasses.replace(LM, num_encoder_layers=1)).init(jax.random.key(0), None, jnp.ones((1, 1), jnp.int32))
