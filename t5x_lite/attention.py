"""Dot-product attention with T5's relative-position bias.

One signature for every implementation: queries, keys, values, an additive bias, and *who may see whom* said by its
meaning (`Visibility`) rather than as a dense mask, so that a fused kernel never has to build one. This module knows
arrays only: no parameters, no layers, no config.
"""

import functools
import math
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from t5x_lite import flash, sharding

# Large enough to vanish in a float32 softmax, small enough that a bias added to it does not overflow.
MASKED = -1e10

Implementation = Literal["batch", "rows", "flash", "cudnn"]

CACHED_LOGITS = 2**21  # so many of them, in float32, are 8 MiB
# Below so many logits of a row and head, a step of the TPU kernel's grid costs more to start (some 0.35 us) than to
# run, while XLA's form moves little memory: an estimate, between T5's 114 x 114 and 114 x 512.
FLASH_LOGITS = 2**15
CUDNN_HEAD_DIM = 128  # the largest on every card


@flax.struct.dataclass
class Visibility:
    """Which keys each query may attend to.

    A query sees a key when their segments are equal and the key's segment is not 0 (padding), and, if `causal`, when
    the key's position is not after the query's or the key is of its segment's `key_prefix` (1 there, else 0). `None`
    for the segments means that nothing is hidden by them. Segments are at most S. The first query stands at position
    `offset` of the keys: 0 in training, the number of tokens so far in cached decoding.
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

    def segments(self, query_length: int) -> tuple[Int[Array, "B T"] | None, Int[Array, "B S"] | None]:
        """Those of queries and keys, for both or for none."""
        if self.key_segments is None or self.query_segments is not None:
            return (None, None) if self.key_segments is None else (self.query_segments, self.key_segments)
        return jnp.ones((len(self.key_segments), query_length), jnp.int32), (self.key_segments != 0).astype(jnp.int32)


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
    over some keys or all: such rows are padding, and nothing reads them.

    Args:
      implementation: "batch" holds the weights of all rows at once. "rows" goes row by row, forward and backward, so
        that a row's weights stay in a CPU's cache: twice as fast there at [8, 6, 512, 512], in a fraction of the
        memory. "flash" is the TPU's kernel (flash.py), elsewhere interpreted, slowly; "cudnn" is cuDNN's, on NVIDIA's
        GPUs: neither has the weights in memory. What one cannot do, such as decoding one token, falls to "batch".
        None: by platform and shape, see `choose`.
    """
    rows, _, heads, _ = query_BTHK.shape
    with jax.named_scope("attention"):
        if dropout_rate > 0.0 and dropout_key is not None:
            # What all queries drop together can as well be dropped from the values.
            kept_BSH1 = jnp.moveaxis(
                jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, (rows, heads, 1, key_BSHK.shape[1])), 3, 1
            )
            value_BSHK = value_BSHK * (kept_BSH1 / (1.0 - dropout_rate)).astype(value_BSHK.dtype)
        chosen = choose(implementation, query_BTHK, key_BSHK, bias_HTS, visibility)
        if chosen in ("flash", "cudnn"):
            fused = _flash if chosen == "flash" else _cudnn
            return fused(query_BTHK, key_BSHK, value_BSHK, bias_HTS, visibility)
        mask_B1TS = visibility.dense(query_BTHK.shape[1], key_BSHK.shape[1])
        arrays = (query_BTHK, key_BSHK, value_BSHK, mask_B1TS)
        if chosen == "batch":
            return _attend(bias_HTS, *arrays)
        return _attend_rows(bias_HTS, jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), arrays))


def choose(
    wanted: Implementation | None,
    query_BTHK: Float[Array, "B T H K"],
    key_BSHK: Float[Array, "B S H K"],
    bias_HTS: Float[Array, "H T S"] | None,
    visibility: Visibility,
) -> Implementation:
    """`wanted` if it can do what is asked, else "batch".

    None wants "flash" on a TPU from `FLASH_LOGITS` on, "cudnn" on a GPU, and "rows" on a lone CPU device where the
    logits are larger than its caches.
    """
    rows, queries, heads, width = query_BTHK.shape
    keys, device = key_BSHK.shape[1], sharding.device()
    if not isinstance(rows, int):  # an export, for batches of any size on any platform
        return "batch"
    if wanted is None:
        large = device.platform == "cpu" and jax.device_count() == 1 and rows * heads * queries * keys > CACHED_LOGITS
        by_platform = {"tpu": queries * keys >= FLASH_LOGITS and "flash", "gpu": "cudnn", "cpu": large and "rows"}
        wanted = by_platform.get(device.platform) or "batch"
    if wanted in ("batch", "rows"):
        return wanted
    part = sharding.part_shape(query_BTHK.shape, SPREAD)
    if queries == 1 or part is None:
        return "batch"
    if wanted == "flash":
        return "flash" if flash.fits(part[2], keys, width, key_BSHK.dtype) else "batch"
    causal_only = visibility.key_prefix is None and isinstance(visibility.offset, int) and visibility.offset == 0
    capability = str(getattr(device, "compute_capability", ""))  # of AMD's, a name
    able = device.platform == "gpu" and capability.replace(".", "").isdecimal() and float(capability) >= 8.0
    able &= query_BTHK.dtype in (jnp.bfloat16, jnp.float16)
    able &= width % 8 == 0 and width + 2 * _segment_bits(visibility, keys) <= CUDNN_HEAD_DIM
    able &= bias_HTS is None or queries % 2 == keys % 2 == 0
    able &= causal_only or not visibility.causal
    return "cudnn" if able else "batch"


SPREAD = ("batch", None, "heads", None)  # how queries, keys and values lie on the mesh for a fused kernel


def _flash(query: Array, key: Array, value: Array, bias: Array | None, visibility: Visibility) -> Array:
    prefix = visibility.key_prefix if visibility.causal else None
    segments = visibility.segments(query.shape[1])
    attend = functools.partial(
        flash.flash_attention,
        causal=visibility.causal,
        masked=MASKED,
        interpret=sharding.device().platform != "tpu",
    )
    arrays = (query, key, value, bias, *segments, prefix, jnp.asarray(visibility.offset, jnp.int32))
    axes = (SPREAD, SPREAD, SPREAD, ("heads", None, None), ("batch",), ("batch",), ("batch",), ())
    return sharding.on_parts(attend, arrays, axes, SPREAD)


def _cudnn(query: Array, key: Array, value: Array, bias: Array | None, visibility: Visibility) -> Array:
    """cuDNN's flash attention. The bias is rounded to the queries' dtype; its gradient comes summed over the batch.

    Beside a causal mask it takes dense ones only, which with a bias would be [B, H, T, S], and so would the gradient.
    So segments are said by the product of queries and keys: both get the bits of their segment as more of head_dim.
    Each bit that differs adds -2^14, each that agrees exactly 0.
    """
    bits = _segment_bits(visibility, key.shape[1])

    def attend(query: Array, key: Array, value: Array, bias: Array | None, *segments: Array | None) -> Array:
        width, dtype = query.shape[-1], query.dtype
        if bits:
            ones_B_1N, other_B_1N = (((s[..., None, None] >> jnp.arange(bits)) & 1) for s in segments if s is not None)
            query = _widen(query, -(2.0**14) * jnp.concatenate([ones_B_1N, 1 - ones_B_1N], -1))
            key = _widen(key, jnp.concatenate([1 - other_B_1N, other_B_1N], -1))
            value = _widen(value, jnp.zeros((1, 1, 1, 2 * bits)))
        bias = None if bias is None else bias[None].astype(dtype)
        y = jax.nn.dot_product_attention(
            query, key, value, bias, scale=1.0, is_causal=visibility.causal, implementation="cudnn"
        )
        return y[..., :width]

    arrays = (query, key, value, bias, *visibility.segments(query.shape[1]))
    axes = (SPREAD, SPREAD, SPREAD, ("heads", None, None), ("batch",), ("batch",))
    return sharding.on_parts(attend, arrays, axes, SPREAD)


def _segment_bits(visibility: Visibility, keys: int) -> int:
    """Enough for every segment, and a multiple of four, as twice as many must be one of eight."""
    if visibility.key_segments is None:
        return 0
    return 4 if visibility.query_segments is None else math.ceil(keys.bit_length() / 4) * 4


def _widen(x: Float[Array, "B S H K"], more: Array) -> Float[Array, "B S H _"]:
    return jnp.concatenate([x, jnp.broadcast_to(more, (*x.shape[:3], more.shape[-1])).astype(x.dtype)], -1)


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
) -> Float[Array, "B T H K"]:
    weights_BHTS = jax.nn.softmax(_logits(bias_HTS, query_BTHK, key_BSHK, mask_B1TS), axis=-1).astype(value_BSHK.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, value_BSHK)


@jax.custom_vjp
def _attend_rows(bias_HTS: Float[Array, "H T S"] | None, arrays: tuple[Array | None, ...]) -> Float[Array, "B T H K"]:
    """`_attend` one row after another. The backward pass makes a row's weights again from their maxima and sums."""
    return _attend_rows_forward(bias_HTS, arrays)[0]


def _attend_rows_forward(bias_HTS: Array | None, arrays: tuple[Array | None, ...]) -> tuple[Array, tuple]:
    def attend(row: tuple) -> tuple[Array, Array, Array]:
        query_THK, key_SHK, value_SHK, mask_1TS = row
        logits_HTS = _logits(bias_HTS, query_THK, key_SHK, mask_1TS)
        max_HT1 = jnp.max(logits_HTS, axis=-1, keepdims=True)
        exp_HTS = jnp.exp(logits_HTS - max_HT1)
        sum_HT1 = jnp.sum(exp_HTS, axis=-1, keepdims=True)
        y_THK = jnp.einsum(
            "HTS,SHK->THK", exp_HTS.astype(value_SHK.dtype), value_SHK, preferred_element_type=jnp.float32
        )
        return (y_THK / jnp.swapaxes(sum_HT1, 0, 1)).astype(value_SHK.dtype), max_HT1, sum_HT1

    y_BTHK, *normalizers = jax.lax.map(attend, arrays)
    return y_BTHK, (bias_HTS, arrays, y_BTHK, normalizers)


def _attend_rows_backward(saved: tuple, d_y_BTHK: Array) -> tuple[Array | None, tuple[Array | None, ...]]:
    bias_HTS, arrays, y_BTHK, normalizers = saved

    def attend(d_bias_HTS: Array | None, row: tuple) -> tuple[Array | None, tuple[Array, Array, Array]]:
        (query_THK, key_SHK, value_SHK, mask_1TS), y_THK, (max_HT1, sum_HT1), d_y_THK = row
        dtype = value_SHK.dtype
        weights_HTS = jnp.exp(_logits(bias_HTS, query_THK, key_SHK, mask_1TS) - max_HT1) / sum_HT1
        d_weights_HTS = jnp.einsum("THK,SHK->HTS", d_y_THK, value_SHK, preferred_element_type=jnp.float32)
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
            jnp.einsum("HTS,THK->SHK", weights_HTS.astype(dtype), d_y_THK),
        )

    d_bias_HTS = None if bias_HTS is None else jnp.zeros_like(bias_HTS)
    d_bias_HTS, d_arrays = jax.lax.scan(attend, d_bias_HTS, (arrays, y_BTHK, normalizers, d_y_BTHK))
    return d_bias_HTS, (*d_arrays, None)


_attend_rows.defvjp(_attend_rows_forward, _attend_rows_backward)
