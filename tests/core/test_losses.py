"""losses.py against T5X's numbers and closed forms, and compiled with a sharded vocabulary."""

import math
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.training.losses import LossConfig, cross_entropy_sums, normalizer


def random_case(vocab: int = 7):
    """Logits [2, 3, 7], targets and unequal weights, one of them 0."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.standard_normal((2, 3, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (2, 3)), jnp.int32)
    return logits, targets, jnp.asarray([[1.0, 0.5, 2.0], [1.0, 1.0, 0.0]])


def by_definition(logits, targets, weights, z_loss: float, smoothing: float) -> float:
    """The loss as a float64 double loop over tokens and a dense target distribution."""
    total = 0.0
    vocab = logits.shape[-1]
    for index in np.ndindex(*targets.shape):
        row = np.asarray(logits, np.float64)[index]
        log_z = math.log(np.exp(row).sum())
        target = np.full(vocab, smoothing / (vocab - 1))
        target[int(targets[index])] = 1 - smoothing
        entropy = -sum(p * math.log(p) for p in target if p > 0)
        total += float(weights[index]) * (-(target * (row - log_z)).sum() - entropy + z_loss * log_z**2)
    return total


def of(batch):
    """The arguments of `normalizer` in a batch of SeqIO's fields."""
    return batch["decoder_loss_weights"], batch.get("decoder_segment_ids")


def test_golden_losses_and_gradients(golden_json):
    data = golden_json("training")["loss"]
    logits = jnp.asarray(data["logits"], jnp.float32)
    targets, weights = jnp.asarray(data["targets"], jnp.int32), jnp.asarray(data["weights"], jnp.float32)
    seen = set()
    for case in data["cases"]:
        settings = {"z_loss": float(case["z_loss"]), "label_smoothing": float(case["label_smoothing"])}
        config = LossConfig(normalizing_factor=case["loss_normalizing_factor"], **settings)
        loss_weights, factor = normalizer(config, weights)

        def loss(logits, loss_weights=loss_weights, factor=factor, settings=settings):
            sums = cross_entropy_sums(logits, targets, loss_weights, **settings)
            return sums["loss"] / factor, sums

        (value, sums), grad = jax.value_and_grad(loss, has_aux=True)(logits)
        np.testing.assert_allclose(value, case["loss_sum"], rtol=1e-6)
        np.testing.assert_allclose(sums["z_loss"] / factor, case["z_loss_sum"], rtol=1e-6)
        np.testing.assert_allclose(sums["weights"], case["weight_sum"], rtol=0)
        np.testing.assert_allclose(grad, case["grad"], rtol=1e-5, atol=1e-6)
        seen.add(round(case["loss_sum"], 3))
    assert len(seen) > 1  # the cases differ, so agreeing with all of them says something


@pytest.mark.parametrize("factor", ["NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"])
def test_golden_normalizing(golden_json, factor):
    data = golden_json("training")["loss"]["loss_normalizing"]
    batch = {name: jnp.asarray(value) for name, value in data["batch"].items()}
    weights, value = normalizer(LossConfig(normalizing_factor=factor), *of(batch))
    np.testing.assert_allclose(value, data[factor]["factor"], rtol=1e-6)
    np.testing.assert_allclose(weights, data[factor]["weights"], rtol=1e-6)


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_sums_and_gradient_by_definition(z_loss, smoothing):
    logits, targets, weights = random_case()
    expected = by_definition(logits, targets, weights, z_loss, smoothing)
    if z_loss or smoothing:
        assert abs(expected - by_definition(logits, targets, weights, 0.0, 0.0)) > 0.1

    def loss(logits):
        return cross_entropy_sums(logits, targets, weights, z_loss=z_loss, label_smoothing=smoothing)["loss"]

    np.testing.assert_allclose(loss(logits), expected, rtol=1e-5)
    grad = jax.grad(loss)(logits)
    probability = np.asarray(jax.nn.softmax(logits), np.float64)
    log_z = np.asarray(jax.nn.logsumexp(logits, axis=-1), np.float64)[..., None]
    soft = np.full(logits.shape, smoothing / 6)
    np.put_along_axis(soft, np.asarray(targets)[..., None], 1 - smoothing, axis=-1)
    closed = np.asarray(weights)[..., None] * ((1 + 2 * z_loss * log_z) * probability - soft)
    np.testing.assert_allclose(grad, closed, rtol=1e-4, atol=1e-5)


def test_uniform_logits_by_hand():
    """Four words, all logits 2: cross entropy log 4, log Z = 2 + log 4."""
    sums = cross_entropy_sums(
        jnp.full((1, 2, 4), 2.0), jnp.asarray([[3, 1]]), jnp.asarray([[1.0, 0.5]]), z_loss=0.1, label_smoothing=0.0
    )
    z = 1.5 * 0.1 * (2 + math.log(4)) ** 2
    np.testing.assert_allclose(sums["z_loss"], z, rtol=1e-6)
    np.testing.assert_allclose(sums["loss"], 1.5 * math.log(4) + z, rtol=1e-6)
    assert sums["weights"] == 1.5


def test_correct_counts_weighted_argmax():
    logits, targets, weights = random_case()
    targets = targets.at[0].set(jnp.argmax(logits[0], axis=-1)).at[1].set(jnp.argmin(logits[1], axis=-1))
    sums = cross_entropy_sums(logits, targets, weights, z_loss=0.0, label_smoothing=0.0)
    assert sums["correct"] == 3.5
    assert sums["weights"] == 5.5


def test_bfloat16_logits_are_summed_in_float32():
    logits, targets, weights = random_case()
    half = logits.astype(jnp.bfloat16)
    assert not np.array_equal(half.astype(jnp.float32), logits)
    options = {"z_loss": 1e-4, "label_smoothing": 0.1}
    sums = cross_entropy_sums(half, targets, weights, **options)
    expected = cross_entropy_sums(half.astype(jnp.float32), targets, weights, **options)
    assert all(sums[name].dtype == jnp.float32 and sums[name] == expected[name] for name in sums)


def test_target_outside_the_vocabulary_is_nan():
    logits, targets, weights = random_case()
    sums = cross_entropy_sums(logits, targets.at[0, 0].set(7), weights, z_loss=0.0, label_smoothing=0.0)
    assert np.isnan(sums["loss"])


def test_average_per_sequence_packed_equals_unpacked():
    """Two sequences of lengths 3 and 1 in one packed row weigh the same as in rows of their own."""
    config = LossConfig(normalizing_factor="AVERAGE_PER_SEQUENCE")
    packed = {
        "decoder_loss_weights": jnp.asarray([[1, 1, 1, 1, 0]], jnp.int32),
        "decoder_segment_ids": jnp.asarray([[1, 1, 1, 2, 0]], jnp.int32),
    }
    rows = {"decoder_loss_weights": jnp.asarray([[1, 1, 1], [1, 0, 0]], jnp.int32)}
    packed_weights, packed_factor = normalizer(config, *of(packed))
    rows_weights, rows_factor = normalizer(config, *of(rows))
    third = np.float32(1 / 3)
    np.testing.assert_allclose(packed_weights, [[third, third, third, 1, 0]])
    np.testing.assert_allclose(rows_weights, [[third, third, third], [1, 0, 0]])
    assert packed_factor == rows_factor == 2
    unsegmented, _ = normalizer(config, packed["decoder_loss_weights"])
    assert not np.allclose(unsegmented, packed_weights)


def test_factor_none_number_and_empty_batch():
    batch = {"decoder_loss_weights": jnp.asarray([[2.0, 0.5, 0.0]])}
    assert normalizer(LossConfig(), *of(batch))[1] == 1
    assert normalizer(LossConfig(normalizing_factor=64.0), *of(batch))[1] == 64
    empty = {"decoder_loss_weights": jnp.zeros((2, 3))}
    for factor in ("NUM_REAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"):
        weights, value = normalizer(LossConfig(normalizing_factor=factor), *of(empty))
        assert value == 1
        assert not weights.any()


@pytest.mark.parametrize(
    ("field", "value"),
    [("z_loss", -1.0), ("z_loss", math.nan), ("label_smoothing", 1.0), ("label_smoothing", -0.1)]
    + [("normalizing_factor", value) for value in (0.0, -2.0, math.inf)],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=rf"LossConfig\.{field} .*{re.escape(repr(value))}"):
        LossConfig(**{field: value})


SHARDED = """
    import re, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from t5x_lite.training.losses import cross_entropy_sums

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows, columns = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "tensor"))
    key_y, key_w, key_t = jax.random.split(jax.random.key(0), 3)
    y = jax.random.normal(key_y, (2, 3, 5))
    kernel = jax.random.normal(key_w, (5, 28))
    targets = jax.random.randint(key_t, (2, 3), 0, 28)
    weights = jnp.asarray([[1.0, 1.0, 0.0], [0.5, 1.0, 1.0]])

    def loss(y, kernel, targets, weights):
        logits = jnp.einsum("BTD,DV->BTV", y, kernel)
        return cross_entropy_sums(logits, targets, weights, z_loss=0.1, label_smoothing=0.2)["loss"]

    step = jax.value_and_grad(loss, argnums=(0, 1))
    compiled = jax.jit(step, in_shardings=(rows, columns, rows, rows)).lower(y, kernel, targets, weights).compile()
    text = compiled.as_text()
    assert "f32[1,3,7]" in text, "the logits are not split over the vocabulary"
    assert not re.search(r"= .*(all-gather|all-to-all|collective-permute)", text), text
    for got, expected in zip(jax.tree.leaves(compiled(y, kernel, targets, weights)),
                             jax.tree.leaves(step(y, kernel, targets, weights)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
def test_sharded_vocabulary_stays_sharded():
    """Eight devices, V over four of them: no logits travel, only [B, T] sums; value and gradients as on one device."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
