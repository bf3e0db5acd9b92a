"""Dot-product attention with T5's relative-position bias.

One signature for every implementation: queries, keys, values, an additive bias, and *who may see whom* said by its
meaning (`Visibility`) rather than as a dense mask, so that a fused kernel never has to build one. This module knows
arrays only: no parameters, no layers, no config.
"""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

# Large enough to vanish in a float32 softmax, small enough that a bias added to it does not overflow.
MASKED = -1e10

Implementation = Literal["batch", "rows"]

CACHED_LOGITS = 2**21  # so many of them, in float32, are 8 MiB


@flax.struct.dataclass
class Visibility:
    """Which keys each query may attend to.

    A query sees a key when their segments are equal and the key's segment is not 0 (padding), and, if `causal`, when
    the key's position is not after the query's or the key is of its segment's `key_prefix` (1 there, else 0). `None`
    for the segments means that nothing is hidden by them. The first query stands at position `offset` of the keys: 0 in
    training, the number of tokens so far in cached decoding.
    """

    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    key_prefix: Int[Array, "B S"] | None = None
    offset: Int[Array, ""] | int = 0
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "_ 1 _ S"] | None:
        """The mask written out, `True` where visible; with batch axis 1 if all rows agree; `None`: all visible."""
        mask = None
        if self.key_segments is not None:
            if self.query_segments is None:
                mask = (self.key_segments != 0)[:, None, None, :]
            else:
                q_B1T1 = self.query_segments[:, None, :, None]
                k_B11S = self.key_segments[:, None, None, :]
                mask = (q_B1T1 == k_B11S) & (k_B11S != 0)
        if self.causal:
            query_positions = self.offset + jnp.arange(query_length)
            seen = (jnp.arange(key_length)[None, :] <= query_positions[:, None])[None, None]
            if self.key_prefix is not None:
                seen = seen | (self.key_prefix != 0)[:, None, None, :]
            mask = seen if mask is None else mask & seen
        return mask


def dot_product_attention(
    query_BTHK: Float[Array, "B T H K"],
    key_BSHK: Float[Array, "B S H K"],
    value_BSHK: Float[Array, "B S H K"],
    bias_HTS: Float[Array, "H T S"] | None,
    visibility: Visibility,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(q k + bias) v, without a 1/sqrt(K): T5 folds that into the query's initialiser (T5X layers.py).

    Logits and softmax are float32 whatever the inputs; the weights go back to the values' dtype. Dropout on the weights
    is shared by all queries of a row (T5X broadcasts it along the query axis). Queries that see no key get an average
    over all keys: such rows are padding, and nothing reads them.

    Args:
      implementation: "batch" holds the weights of all rows at once. "rows" goes row by row, forward and backward, so
        that a row's weights stay in a CPU's cache: twice as fast there at [8, 6, 512, 512], in a fraction of the
        memory. None: "rows" on a lone CPU device where the logits are larger than its caches, else "batch".
    """
    rows, query_length, heads, _ = query_BTHK.shape
    key_length = key_BSHK.shape[1]
    if implementation is None:
        lone_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
        exported = not isinstance(rows, int)  # for batches of any size on any platform
        large = not exported and rows * heads * query_length * key_length > CACHED_LOGITS
        implementation = "rows" if lone_cpu and large else "batch"
    with jax.named_scope("attention"):
        mask_B1TS = visibility.dense(query_length, key_length)
        kept_BH1S = None
        if dropout_rate > 0.0 and dropout_key is not None:
            kept_BH1S = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, (rows, heads, 1, key_length))
            kept_BH1S = (kept_BH1S / (1.0 - dropout_rate)).astype(value_BSHK.dtype)
        arrays = (query_BTHK, key_BSHK, value_BSHK, mask_B1TS, kept_BH1S)
        if implementation == "batch":
            return _attend(bias_HTS, *arrays)
        return _attend_rows(bias_HTS, jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), arrays))


def _logits(
    bias_HTS: Float[Array, "H T S"] | None,
    query: Float[Array, "*B T H K"],
    key: Float[Array, "*B S H K"],
    mask: Bool[Array, "*_ 1 #T S"] | None,
) -> Float[Array, "*B H T S"]:
    logits = jnp.einsum("...THK,...SHK->...HTS", query, key, preferred_element_type=jnp.float32)
    if bias_HTS is not None:
        logits += bias_HTS.astype(jnp.float32)
    return logits if mask is None else jnp.where(mask, logits, MASKED)


def _attend(
    bias_HTS: Float[Array, "H T S"] | None,
    query_BTHK: Float[Array, "B T H K"],
    key_BSHK: Float[Array, "B S H K"],
    value_BSHK: Float[Array, "B S H K"],
    mask_B1TS: Bool[Array, "_ 1 #T S"] | None,
    kept_BH1S: Float[Array, "B H 1 S"] | None,
) -> Float[Array, "B T H K"]:
    weights_BHTS = jax.nn.softmax(_logits(bias_HTS, query_BTHK, key_BSHK, mask_B1TS), axis=-1).astype(value_BSHK.dtype)
    if kept_BH1S is not None:
        weights_BHTS = weights_BHTS * kept_BH1S
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, value_BSHK)


@jax.custom_vjp
def _attend_rows(bias_HTS: Float[Array, "H T S"] | None, arrays: tuple[Array | None, ...]) -> Float[Array, "B T H K"]:
    """`_attend` one row after another. The backward pass makes a row's weights again from their maxima and sums."""
    return _attend_rows_forward(bias_HTS, arrays)[0]


def _attend_rows_forward(bias_HTS: Array | None, arrays: tuple[Array | None, ...]) -> tuple[Array, tuple]:
    def attend(row: tuple) -> tuple[Array, Array, Array]:
        query_THK, key_SHK, value_SHK, mask_1TS, kept_H1S = row
        logits_HTS = _logits(bias_HTS, query_THK, key_SHK, mask_1TS)
        max_HT1 = jnp.max(logits_HTS, axis=-1, keepdims=True)
        exp_HTS = jnp.exp(logits_HTS - max_HT1)
        sum_HT1 = jnp.sum(exp_HTS, axis=-1, keepdims=True)
        if kept_H1S is not None:
            exp_HTS = exp_HTS * kept_H1S
        y_THK = jnp.einsum(
            "HTS,SHK->THK", exp_HTS.astype(value_SHK.dtype), value_SHK, preferred_element_type=jnp.float32
        )
        return (y_THK / jnp.swapaxes(sum_HT1, 0, 1)).astype(value_SHK.dtype), max_HT1, sum_HT1

    y_BTHK, *normalizers = jax.lax.map(attend, arrays)
    return y_BTHK, (bias_HTS, arrays, y_BTHK, normalizers)


def _attend_rows_backward(saved: tuple, d_y_BTHK: Array) -> tuple[Array | None, tuple[Array | None, ...]]:
    bias_HTS, arrays, y_BTHK, normalizers = saved

    def attend(d_bias_HTS: Array | None, row: tuple) -> tuple[Array | None, tuple[Array, Array, Array]]:
        (query_THK, key_SHK, value_SHK, mask_1TS, kept_H1S), y_THK, (max_HT1, sum_HT1), d_y_THK = row
        dtype = value_SHK.dtype
        weights_HTS = jnp.exp(_logits(bias_HTS, query_THK, key_SHK, mask_1TS) - max_HT1) / sum_HT1
        d_weights_HTS = jnp.einsum("THK,SHK->HTS", d_y_THK, value_SHK, preferred_element_type=jnp.float32)
        kept_weights_HTS = weights_HTS
        if kept_H1S is not None:
            d_weights_HTS, kept_weights_HTS = d_weights_HTS * kept_H1S, weights_HTS * kept_H1S
        # The softmax's own backward pass needs sum_S(d_weights * weights), which is sum_K(d_y * y): a far smaller sum.
        inner_TH = jnp.sum(d_y_THK.astype(jnp.float32) * y_THK, axis=-1)
        d_logits_HTS = weights_HTS * (d_weights_HTS - inner_TH.T[..., None])
        if mask_1TS is not None:
            d_logits_HTS = jnp.where(mask_1TS, d_logits_HTS, 0.0)
        if d_bias_HTS is not None:
            d_bias_HTS += d_logits_HTS
        d_logits_HTS = d_logits_HTS.astype(dtype)
        return d_bias_HTS, (
            jnp.einsum("HTS,SHK->THK", d_logits_HTS, key_SHK),
            jnp.einsum("HTS,THK->SHK", d_logits_HTS, query_THK),
            jnp.einsum("HTS,THK->SHK", kept_weights_HTS.astype(dtype), d_y_THK),
        )

    d_bias_HTS = None if bias_HTS is None else jnp.zeros_like(bias_HTS)
    d_bias_HTS, d_arrays = jax.lax.scan(attend, d_bias_HTS, (arrays, y_BTHK, normalizers, d_y_BTHK))
    return d_bias_HTS, (*d_arrays, None, None)


_attend_rows.defvjp(_attend_rows_forward, _attend_rows_backward)
