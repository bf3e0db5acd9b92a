"""Attention in blocks of rows, queries and keys, in plain JAX, for every platform.

The weights exist for one block at a time, forward and backward (online softmax: Milakov and Gimelshein 2018; Dao et
al. 2022): memory is linear in the length, and on a CPU a block stays in the cache. The backward pass recomputes the
weights from the logarithm of their sum. This module handles arrays only; the other implementations are in attention.py.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.model import remat


class Blocks(NamedTuple):
    """Sizes of a block: rows of the batch, queries and keys."""

    rows: int
    queries: int
    keys: int


def materialize_bias(
    bias_HR: Float[Array, "H R"], queries: int, keys: int, offset: Int[Array, ""] | int = 0
) -> Float[Array, "H T S"]:
    """Return the bias of each query and key. See `attention.dot_product_attention` for axis R and `offset`."""
    limit = bias_HR.shape[1] // 2

    def at(distance: Int[Array, " N"]) -> Float[Array, "H N"]:
        return bias_HR[:, jnp.clip(distance - offset, -limit, limit) + limit]

    if queries == 1:
        return at(jnp.arange(keys))[:, None]
    # Diagonals are constant: each row is a part of the array of all of them. Unlike a lookup of each element, this is
    # quick on CPUs, as is its transpose.
    diagonals = at(jnp.arange(1 - queries, keys))

    def row(query: Int[Array, ""]) -> Float[Array, "H S"]:
        return jax.lax.dynamic_slice_in_dim(diagonals, queries - 1 - query, keys, axis=1)

    return jax.vmap(row, out_axes=1)(jnp.arange(queries))


def visible(
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    key_prefix: Int[Array, "B S"] | None,
    query_positions_T: Int[Array, " T"],
    key_positions_S: Int[Array, " S"],
    window: Int[Array, "2"] | None,
    causal: bool,
) -> Bool[Array, "_ 1 _ S"] | None:
    """Return the dense mask of `attention.AttentionMask`, True where visible; None if all keys are visible."""
    mask = None
    if key_segments is not None:
        seen = key_segments[:, None, :] != 0
        if query_segments is not None:
            seen &= query_segments[:, :, None] == key_segments[:, None, :]
        mask = seen[:, None]
    if causal or window is not None:
        distance_TS = key_positions_S - query_positions_T[:, None]
        near = distance_TS <= 0 if causal else jnp.ones(distance_TS.shape, bool)
        if window is not None:
            near &= (-distance_TS <= window[0]) & (distance_TS <= window[1])
        near = near[None, None]
        if key_prefix is not None:
            near |= (key_prefix != 0)[:, None, None, :]
        mask = near if mask is None else mask & near
    return mask


def capped(logits: Float[Array, "..."], softcap: float) -> Float[Array, "..."]:
    return softcap * jnp.tanh(logits / softcap)


class _Settings(NamedTuple):
    blocks: Blocks
    keys: int  # without padding
    causal: bool
    softcap: float | None
    masked: float


class _Arrays(NamedTuple):
    """The arrays, split into blocks: axes G (groups of rows), M (blocks of queries) or N (of keys), and a block's."""

    query: Float[Array, "G M B T H K"]
    key: Float[Array, "G N B S H K"]
    value: Float[Array, "G N B S H K"]
    query_segments: Int[Array, "G M B T"] | None
    key_segments: Int[Array, "G N B S"] | None
    key_prefix: Int[Array, "G N B S"] | None
    offset: Int[Array, ""]
    window: Int[Array, "2"] | None


def block_attention(
    query_BTHK: Float[Array, "B T H K"],
    key_BSHK: Float[Array, "B S H K"],
    value_BSHK: Float[Array, "B S H K"],
    bias_HR: Float[Array, "H R"] | None,
    query_segments_BT: Int[Array, "B T"] | None,
    key_segments_BS: Int[Array, "B S"] | None,
    key_prefix_BS: Int[Array, "B S"] | None,
    offset: Int[Array, ""] | int,
    window: Int[Array, "2"] | None = None,
    *,
    causal: bool,
    softcap: float | None = None,
    masked: float,
    blocks: Blocks,
) -> Float[Array, "B T H K"]:
    """Compute softmax(qk + bias) v. See `attention.dot_product_attention` for the arguments."""
    rows, queries, keys = query_BTHK.shape[0], query_BTHK.shape[1], key_BSHK.shape[1]
    blocks = Blocks(math.gcd(blocks.rows, rows), _even(queries, blocks.queries), _even(keys, blocks.keys))

    def split(x: Array | None, length: int) -> Any:
        if x is None:
            return None
        count = math.ceil(x.shape[1] / length)
        x = jnp.pad(x, [(0, count * length - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)])
        return x.reshape(-1, blocks.rows, count, length, *x.shape[2:]).swapaxes(1, 2)

    arrays = _Arrays(
        split(query_BTHK, blocks.queries),
        split(key_BSHK, blocks.keys),
        split(value_BSHK, blocks.keys),
        split(query_segments_BT, blocks.queries),
        split(key_segments_BS, blocks.keys),
        split(key_prefix_BS, blocks.keys),
        jnp.asarray(offset, jnp.int32),
        window,
    )
    bias: Any = bias_HR
    if bias_HR is not None and arrays.query.shape[1] * arrays.key.shape[1] == 1:
        bias = materialize_bias(bias_HR.astype(jnp.float32), queries, keys, offset)  # all rows share the only tile
    y: Any = _attend(_Settings(blocks, keys, causal, softcap, masked), bias, arrays)
    return y.swapaxes(1, 2).reshape(rows, -1, *query_BTHK.shape[2:])[:, :queries]


def _even(length: int, most: int) -> int:
    """Return the length of blocks as equal as possible, of at most `most`."""
    return math.ceil(length / math.ceil(length / most))


Bias = Float[Array, "H R"] | Float[Array, "H T S"] | None  # by distance, or of the only tile


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: _Settings, bias: Bias, arrays: _Arrays) -> Float[Array, "G M B T H K"]:
    return _attend_forward(settings, bias, arrays)[0]


def _attend_forward(settings: _Settings, bias: Array | None, arrays: _Arrays) -> tuple[Array, tuple]:
    def of_rows(group: _Arrays) -> tuple[Array, Array]:
        def of_queries(block: tuple) -> tuple[Array, Array]:
            m, query_BTHK, query_segments = block
            shape = query_BTHK.shape[0], query_BTHK.shape[2], query_BTHK.shape[1], 1
            start = (
                jnp.full(shape, settings.masked, jnp.float32),
                jnp.zeros(shape, jnp.float32),
                jnp.zeros(query_BTHK.shape, jnp.float32),
            )

            def add_keys(carry: tuple, keys: tuple) -> tuple[tuple, None]:
                n, key, value, key_segments, key_prefix = keys
                mask = _visible(settings, arrays, m, n, query_segments, key_segments, key_prefix)

                def add(carry: tuple) -> tuple:
                    max_BHT1, sum_BHT1, y_BTHK = carry
                    logits_BHTS = _logits(settings, bias, query_BTHK, key, mask, m, n, arrays.offset)
                    new_BHT1 = jnp.maximum(max_BHT1, jnp.max(logits_BHTS, axis=-1, keepdims=True))
                    rescale_BHT1 = jnp.exp(max_BHT1 - new_BHT1)
                    exp_BHTS = jnp.exp(logits_BHTS - new_BHT1)
                    sum_BHT1 = sum_BHT1 * rescale_BHT1 + jnp.sum(exp_BHTS, axis=-1, keepdims=True)
                    more_BTHK = _dot("BHTS,BSHK->BTHK", exp_BHTS.astype(value.dtype), value)
                    return new_BHT1, sum_BHT1, y_BTHK * rescale_BHT1.swapaxes(1, 2) + more_BTHK

                return _unless_hidden(mask, group, add, carry), None

            (max_BHT1, sum_BHT1, y_BTHK), _ = jax.lax.scan(add_keys, start, _key_blocks(group))
            # Of a query that sees no key all weights are 0 in the backward pass.
            hidden_BHT1 = max_BHT1 <= settings.masked / 2
            sum_BHT1 = jnp.where(hidden_BHT1, 1.0, sum_BHT1)
            y_BTHK = (y_BTHK / sum_BHT1.swapaxes(1, 2)).astype(group.value.dtype)
            return y_BTHK, jnp.where(hidden_BHT1, 0.0, max_BHT1 + jnp.log(sum_BHT1))

        return jax.lax.map(of_queries, (jnp.arange(len(group.query)), group.query, group.query_segments))

    y, log_sum = map(remat.keep, jax.lax.map(of_rows, _in_rows(arrays)))
    return y, (bias, arrays, y, log_sum)


def _attend_backward(settings: _Settings, saved: tuple, d_y: Float[Array, "G M B T H K"]) -> tuple:
    bias, arrays, y, log_sum = saved

    def of_rows(d_bias: Array | None, group_of: tuple) -> tuple[Array | None, tuple]:
        group, *of_group = group_of

        def of_queries(carry: tuple, block: tuple) -> tuple[tuple, Array]:
            d_bias, d_key, d_value = carry
            m, query_BTHK, query_segments, y_BTHK, log_sum_BHT1, d_y_BTHK = block
            # The backward pass of the softmax needs sum_S(d_weights * weights): the smaller sum_K(d_y * y).
            inner_BHT1 = jnp.sum(d_y_BTHK.astype(jnp.float32) * y_BTHK, axis=-1, keepdims=True).swapaxes(1, 2)

            def of_keys(carry: tuple, keys: tuple) -> tuple[tuple, tuple]:
                n, key, value, key_segments, key_prefix = keys
                mask = _visible(settings, arrays, m, n, query_segments, key_segments, key_prefix)

                def add(carry: tuple) -> tuple:
                    d_bias, d_query, *_ = carry
                    logits_BHTS = _logits(settings, bias, query_BTHK, key, mask, m, n, arrays.offset)
                    weights_BHTS = jnp.exp(logits_BHTS - log_sum_BHT1)
                    d_weights_BHTS = _dot("BTHK,BSHK->BHTS", d_y_BTHK, value)
                    d_logits_BHTS = weights_BHTS * (d_weights_BHTS - inner_BHT1)
                    if settings.softcap is not None:  # the derivative of tanh is 1 - tanh^2
                        d_logits_BHTS *= 1 - jnp.square(logits_BHTS / settings.softcap)
                    if d_bias is not None:
                        tile = functools.partial(_tile_bias, settings, m=m, n=n, offset=arrays.offset)
                        d_bias += jax.vjp(tile, bias)[1](jnp.sum(d_logits_BHTS, axis=0))[0]
                    d_logits_BHTS = d_logits_BHTS.astype(query_BTHK.dtype)
                    return (
                        d_bias,
                        d_query + _dot("BHTS,BSHK->BTHK", d_logits_BHTS, key),
                        _dot("BHTS,BTHK->BSHK", d_logits_BHTS, query_BTHK),
                        _dot("BHTS,BTHK->BSHK", weights_BHTS.astype(d_y_BTHK.dtype), d_y_BTHK),
                    )

                nothing = jnp.zeros(key.shape, jnp.float32)
                d_bias, d_query, *d_keys = _unless_hidden(mask, group, add, (*carry, nothing, nothing))
                return (d_bias, d_query), tuple(d_keys)

            start = d_bias, jnp.zeros(query_BTHK.shape, jnp.float32)
            (d_bias, d_query), (more_key, more_value) = jax.lax.scan(of_keys, start, _key_blocks(group))
            return (d_bias, d_key + more_key, d_value + more_value), d_query.astype(query_BTHK.dtype)

        start = d_bias, *(jnp.zeros(x.shape, jnp.float32) for x in (group.key, group.value))
        blocks = (jnp.arange(len(group.query)), group.query, group.query_segments, *of_group)
        (d_bias, d_key, d_value), d_query = jax.lax.scan(of_queries, start, blocks)
        return d_bias, (d_query, d_key.astype(group.key.dtype), d_value.astype(group.value.dtype))

    start: Any = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    d_bias, (d_query, d_key, d_value) = jax.lax.scan(of_rows, start, (_in_rows(arrays), y, log_sum, d_y))
    masks: Any = (None,) * 5
    return None if d_bias is None or bias is None else d_bias.astype(bias.dtype), _Arrays(
        d_query, d_key, d_value, *masks
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _in_rows(arrays: _Arrays) -> _Arrays:
    no_rows: Any = None
    return arrays._replace(offset=no_rows, window=no_rows)


def _key_blocks(group: _Arrays) -> tuple:
    return jnp.arange(len(group.key)), group.key, group.value, group.key_segments, group.key_prefix


def _unless_hidden(mask: Array | None, group: _Arrays, add: Any, carry: tuple) -> tuple:
    """Return add(carry), or `carry` if no query of the block sees any of its keys."""
    if mask is None or len(group.query) * len(group.key) == 1:
        return add(carry)
    return jax.lax.cond(jnp.any(mask), add, lambda carry: carry, carry)


def _tile_bias(settings: _Settings, bias: Any, m: Any, n: Any, offset: Any) -> Float[Array, "H T S"]:
    if bias.ndim == 3:
        return bias
    _, queries, keys = settings.blocks
    return materialize_bias(bias.astype(jnp.float32), queries, keys, offset + m * queries - n * keys)


def _visible(
    settings: _Settings, arrays: _Arrays, m: Any, n: Any, query_segments: Any, key_segments: Any, key_prefix: Any
) -> Array | None:
    _, queries, keys = settings.blocks
    key_positions = n * keys + jnp.arange(keys)
    positions = arrays.offset + m * queries + jnp.arange(queries), key_positions
    mask = visible(query_segments, key_segments, key_prefix, *positions, arrays.window, settings.causal)
    if settings.keys % keys:
        padding = (key_positions < settings.keys)[None, None, None]
        mask = padding if mask is None else mask & padding
    return mask


def _logits(
    settings: _Settings,
    bias: Array | None,
    query: Array,
    key: Array,
    mask: Array | None,
    m: Any,
    n: Any,
    offset: Any,
) -> Float[Array, "B H T S"]:
    logits = _dot("BTHK,BSHK->BHTS", query, key)
    if settings.softcap is not None:
        logits = capped(logits, settings.softcap)
    if bias is not None:
        logits += _tile_bias(settings, bias, m, n, offset)
    return logits if mask is None else jnp.where(mask, logits, settings.masked)


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    if a.shape[0] == 1:  # one row: XLA's CPU products with two batch axes are slower
        return jnp.einsum(subscripts.replace("B", ""), a[0], b[0], preferred_element_type=jnp.float32)[None]
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
