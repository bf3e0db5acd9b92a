"""The training step against other implementations (goldens), and against itself in every shape it can take."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from core.conftest import stack_layers

from t5x_lite import sharding
from t5x_lite.data import packing
from t5x_lite.model.t5 import T5Config, forward
from t5x_lite.training import optim, step
from t5x_lite.training.losses import LossConfig

# Both dimensions of the MLP kernels reach 128, so that Adafactor factors them.
CONFIG = T5Config(
    d_model=128, d_ff=256, num_heads=4, head_dim=6, num_encoder_layers=2, num_decoder_layers=3, vocab_size=136
)
ROWS, INPUTS, TARGETS = 8, 11, 7


def make_batch(seed=0, config=CONFIG):
    random = np.random.default_rng(seed)
    targets = random.integers(2, CONFIG.vocab_size, (ROWS, TARGETS)).astype(np.int32)
    targets *= np.arange(TARGETS) < random.integers(2, TARGETS + 1, (ROWS, 1))
    inputs = random.integers(2, CONFIG.vocab_size, (ROWS, INPUTS)).astype(np.int32)
    inputs *= np.arange(INPUTS) < random.integers(3, INPUTS + 1, (ROWS, 1))
    return packing.joined(inputs, targets) if config.decoder_only else packing.unpacked(inputs, targets)


ADAFACTOR = optim.make_optimizer(optim.adafactor(), optim.rsqrt_decay(0.1, 2))


@functools.cache
def program(config, mesh, optimizer, loss, num_microbatches):
    compiler = step.Compiler(sharding.make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)]))
    abstract = step.abstract_state(config, optimizer, compiler.mesh)
    options = {"config": config, "optimizer": optimizer, "loss": loss, "num_microbatches": num_microbatches}
    return compiler, abstract, compiler.train_step(abstract, **options)


def run(config=CONFIG, mesh=(1, 1, 1), steps=3, optimizer=None, loss=step.T5_LOSS, num_microbatches=1, batches=None):
    """Trains from the same start; returns the final state, the metrics of each step and the number of compilations."""
    optimizer = optimizer or ADAFACTOR
    compiler, abstract, compiled = program(config, mesh, optimizer, loss, num_microbatches)
    state, compiled_before = tiny.random_state(optimizer, abstract), compiled._cache_size()
    key = jax.device_put(jax.random.key(1), compiler.replicated())
    metrics = []
    for n in range(steps):
        batch = batches(n) if batches else make_batch(n, config)
        batch = sharding.shard_batch(batch, sharding.batch_sharding(compiler.mesh))
        state, got = compiled(state, batch, key)
        metrics.append({name: float(x) for name, x in got.items()})
    return state, metrics, compiled._cache_size() - compiled_before


def assert_same_training(a, b, rtol=2e-4):
    for got, expected in zip(a[1], b[1], strict=True):
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], rtol=rtol, atol=1e-6, err_msg=name)
    for x, y in zip(jax.tree.leaves(a[0].params), jax.tree.leaves(b[0].params), strict=True):
        assert np.linalg.norm(np.subtract(x, y)) < 2e-3 * np.linalg.norm(y)


def test_gradients_of_the_mean_loss_agree_with_hugging_face(golden, golden_t5):
    from safetensors.numpy import load_file

    batch = golden_t5.batch
    # The step at learning rate 1 of plain gradient descent is minus the gradient.
    descent = optim.make_optimizer(optax.scale(-1.0), optim.constant(1.0))
    params = jax.tree.map(jnp.asarray, golden_t5.params)
    state = step.TrainState(jnp.zeros((), jnp.int32), params, descent.transform.init(params))
    loss = LossConfig(z_loss=0.0, normalizing_factor="NUM_REAL_TARGET_TOKENS")
    descend = functools.partial(step.train_step, config=golden_t5.config, optimizer=descent, loss=loss)
    new, metrics = jax.jit(descend)(state, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], golden_t5.outputs["loss_mean"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], golden_t5.outputs["grad_global_norm"], rtol=1e-4)
    hub = load_file(golden("hf_t5_v11") / "grads.safetensors")
    got = jax.tree.map(lambda old, new: np.asarray(old - new), params, new.params)
    compare = {
        "shared.weight": got["token_embedder"]["embedding"],
        "lm_head.weight": got["decoder"]["logits_dense"]["kernel"].T,
        "encoder.block.2.layer.0.SelfAttention.q.weight": got["encoder"]["layers"]["attention"]["query"]["kernel"][2].T,
        "decoder.block.1.layer.1.EncDecAttention.k.weight": got["decoder"]["layers"]["encoder_decoder_attention"][
            "key"
        ]["kernel"][1].T,
        "decoder.block.0.layer.2.DenseReluDense.wo.weight": got["decoder"]["layers"]["mlp"]["wo"]["kernel"][0].T,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": got["encoder"]["relpos_bias"][
            "rel_embedding"
        ].T,
        "decoder.final_layer_norm.weight": got["decoder"]["decoder_norm"]["scale"],
    }
    for name, gradient in compare.items():
        np.testing.assert_allclose(gradient, hub[name], atol=2e-4, err_msg=name)
        assert np.abs(hub[name]).max() > 1e-3


def test_summed_loss_with_z_loss_agrees_with_t5x(golden_t5):
    io = golden_t5.io
    logits = jax.jit(functools.partial(forward, golden_t5.config))(golden_t5.params, golden_t5.batch)
    sums = step.cross_entropy_sums(
        logits,
        jnp.asarray(io["targets"]),
        jnp.asarray(io["targets"] != 0, jnp.float32),
        z_loss=1e-4,
        label_smoothing=0.0,
    )
    np.testing.assert_allclose(sums["loss"], golden_t5.outputs["t5x_loss_sum_zloss1e-4"], rtol=1e-5)
    np.testing.assert_allclose(sums["z_loss"], golden_t5.outputs["t5x_z_loss"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    # Meshes with several groups of devices can stand still on two cores: XLA's CPU collectives wait for a free thread.
    [(8, 1, 1), *(pytest.param(mesh, marks=pytest.mark.exhaustive) for mesh in ((2, 2, 2), (1, 2, 4), (1, 8, 1)))],
    ids=str,
)
def test_eight_devices_train_as_one_with_one_compilation(mesh):
    config = dataclasses.replace(CONFIG, dropout_rate=0.1)
    alone, sharded = run(config), run(config, mesh)  # one device's program comes from the compilation cache
    assert_same_training(sharded, alone)
    assert sharded[2] == 1
    embedding = sharded[0].params["token_embedder"]["embedding"]
    assert len(embedding.sharding.device_set) == 8
    assert embedding.is_fully_replicated == (mesh == (8, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", pytest.param("adamw", marks=pytest.mark.exhaustive)])
def test_scanned_and_unrolled_layers_agree_after_three_updates(optimizer):
    optimizer = optim.make_optimizer(getattr(optim, optimizer)(), optim.constant(1e-2))
    config = dataclasses.replace(CONFIG, dropout_rate=0.1)
    scanned = run(config, optimizer=optimizer)
    unrolled = run(dataclasses.replace(config, scan_layers=False), optimizer=optimizer)
    assert_same_training(scanned, unrolled)
    assert scanned[1][0]["loss"] - scanned[1][-1]["loss"] > 0.05  # three updates that did something


@pytest.mark.slow
@pytest.mark.parametrize(
    "factor",
    [
        "NUM_REAL_TARGET_TOKENS",
        *(pytest.param(factor, marks=pytest.mark.exhaustive) for factor in (None, "AVERAGE_PER_SEQUENCE")),
    ],
)
def test_microbatches_equal_the_whole_batch(factor):
    """Also with a normaliser that depends on the batch, where T5X's loss and gradients grow with the parts."""
    loss = LossConfig(normalizing_factor=factor)
    whole, parts = run(loss=loss), run(loss=loss, num_microbatches=4)
    assert_same_training(parts, whole)
    per_part = [np.count_nonzero(make_batch()["decoder_target_tokens"][i::4]) for i in range(4)]
    assert len(set(per_part)) > 1  # parts of unequal weight: averaging them would differ


DROPPED = dataclasses.replace(tiny.SMALL, dropout_rate=0.5)
# The parameters stay, so that losses differ by dropout alone.
AT_REST = {
    "loss": LossConfig(normalizing_factor="NUM_REAL_TARGET_TOKENS"),
    "optimizer": optim.make_optimizer(optax.scale(-1.0), optim.constant(1e-8)),
}


def first_row():
    return {name: rows[:1] for name, rows in make_batch(config=DROPPED).items()}


def test_every_step_has_its_own_dropout():
    _, metrics, _ = run(DROPPED, steps=2, batches=lambda n: first_row(), **AT_REST)
    assert abs(metrics[0]["loss"] - metrics[1]["loss"]) > 1e-4


@pytest.mark.slow
def test_every_microbatch_has_its_own_dropout():
    """Two micro-batches of the same row: with one key, their loss would be that of the row alone."""
    _, (one,), _ = run(DROPPED, steps=1, batches=lambda n: first_row(), **AT_REST)
    twice = {name: np.repeat(rows, 2, axis=0) for name, rows in first_row().items()}
    _, (two,), _ = run(DROPPED, steps=1, num_microbatches=2, batches=lambda n: twice, **AT_REST)
    assert abs(one["loss"] - two["loss"]) > 1e-3


def test_the_logged_learning_rate_is_the_one_used():
    """With any optax transform: T5X ignores its schedule for those, and logs another."""
    schedule = optim.linear(0.1, 1, 4)
    optimizer = optim.make_optimizer(optax.chain(optax.scale_by_sign(), optax.scale(-1.0)), schedule)
    before, _, _ = run(tiny.SMALL, optimizer=optimizer, steps=2)
    after, metrics, _ = run(tiny.SMALL, optimizer=optimizer, steps=3)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), before.params, after.params)
    assert metrics[2]["learning_rate"] == pytest.approx(float(schedule(2)))
    assert max(jax.tree.leaves(moved)) == pytest.approx(metrics[2]["learning_rate"], rel=1e-4)
    assert len({m["learning_rate"] for m in metrics}) == 3


@pytest.mark.slow
def test_remat_and_packing_train_alike():
    def packed(n):
        ones = np.ones((ROWS, 1), np.int32)
        return make_batch(n) | {
            "encoder_segment_ids": np.where(np.arange(INPUTS) < 4, 1, 2) * ones,
            "decoder_segment_ids": np.where(np.arange(TARGETS) < 3, 1, 2) * ones,
        }

    plain = run(batches=packed)
    rematted = run(dataclasses.replace(CONFIG, remat="full"), batches=packed)
    assert_same_training(rematted, plain)
    assert abs(plain[1][0]["loss"] - run()[1][0]["loss"]) > 1e-3  # segments matter


@pytest.mark.parametrize(
    ("tied", "mesh"),
    [
        (False, (1, 1, 1)),
        (True, (8, 1, 1)),
        pytest.param(True, (2, 2, 2), marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.slow
def test_bfloat16_trains_as_float32_does_but_for_its_rounding(tied, mesh):
    whole = dataclasses.replace(CONFIG, tie_embeddings=tied)
    optimizer = optim.make_optimizer(optax.scale(-1.0), optim.constant(1e-3))
    half = run(dataclasses.replace(whole, dtype="bfloat16"), mesh, optimizer=optimizer)
    whole = run(whole, mesh, optimizer=optimizer)
    for name in ("loss", "grad_norm"):
        got, expected = ([metrics[name] for metrics in of[1]] for of in (half, whole))
        np.testing.assert_allclose(got, expected, rtol=0.03, err_msg=name)
        assert np.all(np.not_equal(got, expected))


def test_metrics_are_what_they_say():
    state, metrics, _ = run(tiny.SMALL, steps=1, optimizer=tiny.DESCENT)
    batch, got = make_batch(config=tiny.SMALL), metrics[0]
    assert got["target_tokens"] == np.count_nonzero(batch["decoder_loss_weights"])
    assert got["input_tokens"] == np.count_nonzero(batch["decoder_target_tokens"]) - got["target_tokens"]
    assert got["loss"] == pytest.approx(got["cross_ent_loss"] + got["z_loss"], rel=1e-5)
    assert got["z_loss"] > 0 and 0 <= got["accuracy"] <= 1 and got["grad_norm"] > 0
    evaluated = jax.jit(functools.partial(step.eval_step, config=tiny.SMALL))(state.params, batch)[""]
    assert evaluated["weights"] == got["target_tokens"]
    assert int(state.step) == 1


def test_stack_layers_is_in_order():
    leaves = {f"encoder/layers_{i}/mlp/wo/kernel": np.full((1, 2), i) for i in (10, 2, 0, 1)}
    stacked = stack_layers(leaves)["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    np.testing.assert_array_equal(stacked[:, 0, 0], [0, 1, 2, 10])


def test_a_state_can_begin_with_given_parameters_and_a_part_of_random_ones():
    optimizer = ADAFACTOR
    abstract = step.abstract_state(tiny.SMALL, optimizer, sharding.make_mesh(1, devices=jax.devices()[:1]))
    whole = step.init_state(tiny.SMALL, optimizer, jax.random.key(3), abstract)
    names = ["decoder/logits_dense/kernel", "token_embedder/embedding"]
    part = step.init_params(tiny.SMALL, jax.random.key(3), abstract, names)
    assert sorted(part) == names
    np.testing.assert_array_equal(part[names[0]], whole.params["decoder"]["logits_dense"]["kernel"])
    given = jax.tree.map(lambda x: x + 1, whole.params)
    expected = jax.tree.map(np.asarray, given)
    state = step.init_state(tiny.SMALL, optimizer, jax.random.key(3), abstract, given)
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, whole.opt_state)
