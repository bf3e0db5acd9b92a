"""The implementations of attention against one another: outputs and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.attention import Visibility, dot_product_attention

B, T, S, H, K = 3, 5, 7, 2, 4


def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, H, K), (B, S, H, K), (B, S, H, K), (H, T, S)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


SEGMENTS = Visibility(
    jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1], [1, 2, 3, 0, 0]]),
    jnp.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0], [1, 2, 2, 3, 3, 0, 0]]),
)
CASES = {
    "everything visible": (Visibility(), True, 0.0),
    "causal, later queries": (Visibility(offset=2, causal=True), True, 0.0),
    "segments": (SEGMENTS, True, 0.0),
    "no bias": (SEGMENTS, False, 0.0),
    "dropout": (SEGMENTS, True, 0.4),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_equal_batch_in_outputs_and_gradients(case):
    visibility, with_bias, rate = CASES[case]
    query, key, value, bias = arrays()

    def program(implementation):
        def loss(query, key, value, bias):
            out = dot_product_attention(
                *(query, key, value, bias if with_bias else None, visibility),
                dropout_rate=rate,
                dropout_key=jax.random.key(1) if rate else None,
                implementation=implementation,
            )
            return jnp.sum(out**2), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)).lower(query, key, value, bias)

    batch, rows = program("batch"), program("rows")
    assert rows.as_text().count("stablehlo.while") > batch.as_text().count("stablehlo.while")
    results = [jax.tree.leaves(p.compile()(query, key, value, bias)) for p in (batch, rows)]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_attention_is_softmax_of_unscaled_products_and_bias():
    query, key, value, bias = (np.asarray(x, np.float64) for x in arrays())
    logits = np.einsum("bthk,bshk->bhts", query, key) + bias
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshk->bthk", weights, value)
    np.testing.assert_allclose(dot_product_attention(*arrays(), Visibility()), expected, atol=1e-5)
