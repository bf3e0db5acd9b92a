"""Dot-product attention with T5's relative-position bias.

One signature for every implementation: queries, keys, values, an additive bias, and *who may see whom* said by its
meaning (`AttentionMask`) rather than as a dense mask, so that a fused kernel never has to build one. This module knows
arrays only: no parameters, no layers, no config.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from t5x_lite import sharding
from t5x_lite.model import flash_attention, kernel_checks, remat

# Large enough to vanish in a float32 softmax, small enough that a bias added to it does not overflow.
NEG_INF = -1e10

Implementation = Literal["batch", "rows", "flash", "cudnn"]

CACHED_LOGITS = 2**21  # so many of them, in float32, are 8 MiB
# Below so many logits of a row and head, a step of the TPU kernel's grid costs more to start (some 0.35 us) than to
# run, while XLA's form moves little memory: an estimate, between T5's 114 x 114 and 114 x 512.
FLASH_LOGITS = 2**15
CHECKED_LOGITS = 2**26  # fused kernels are checked with at most so many: the reference's are 256 MiB
CUDNN_HEAD_DIM = 128  # the largest on every card


@flax.struct.dataclass
class AttentionMask:
    """Which keys each query may attend to.

    A query sees a key when their segments are equal and the key's segment is not 0 (padding), and, if `causal`, when
    the key's position is not after the query's or the key is of its segment's `key_prefix` (1 there, else 0). `None`
    for the segments means that nothing is hidden by them. Segments are at most S. The first query stands at position
    `offset` of the keys: None, the first one, in training; the number of tokens so far in cached decoding.
    """

    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    key_prefix: Int[Array, "B S"] | None = None
    offset: Int[Array, ""] | int | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def materialize(self, query_length: int, key_length: int) -> Bool[Array, "_ 1 _ S"] | None:
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
            seen = (jnp.arange(key_length)[None, :] <= self.query_positions(query_length)[:, None])[None, None]
            if self.key_prefix is not None:
                seen = seen | (self.key_prefix != 0)[:, None, None, :]
            mask = seen if mask is None else mask & seen
        return mask

    def query_positions(self, query_length: int) -> Int[Array, " T"]:
        """Where the queries stand among the keys."""
        positions_T = jnp.arange(query_length)
        return positions_T if self.offset is None else self.offset + positions_T

    def segments(self, query_length: int) -> tuple[Int[Array, "B T"] | None, Int[Array, "B S"] | None]:
        """Those of queries and keys, for both or for none."""
        if self.key_segments is None or self.query_segments is not None:
            return (None, None) if self.key_segments is None else (self.query_segments, self.key_segments)
        return jnp.ones((len(self.key_segments), query_length), jnp.int32), (self.key_segments != 0).astype(jnp.int32)

    def most_segments(self, key_length: int) -> int:
        """An upper bound of the ids in `segments`."""
        if self.key_segments is None:
            return 0
        return 1 if self.query_segments is None else key_length


def dot_product_attention(
    query_BTHK: Float[Array, "B T H K"],
    key_BSHK: Float[Array, "B S H K"],
    value_BSHK: Float[Array, "B S H K"],
    bias_HTS: Float[Array, "H T S"] | None,
    attention_mask: AttentionMask,
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
        chosen = choose(implementation, query_BTHK, key_BSHK, bias_HTS, attention_mask)
        if chosen in FUSED:
            arrays = _arrays(query_BTHK, key_BSHK, value_BSHK, bias_HTS, attention_mask)
            y_BTHK = sharding.on_parts(_kernel(chosen, key_BSHK.shape[1], attention_mask), arrays, AXES, SPREAD)
            return y_BTHK if chosen == "cudnn" else remat.keep(y_BTHK)  # cuDNN's are kept as its backward pass has them
        mask_B1TS = attention_mask.materialize(query_BTHK.shape[1], key_BSHK.shape[1])
        arrays = (query_BTHK, key_BSHK, value_BSHK, mask_B1TS)
        if chosen == "batch":
            return remat.keep(_attend(bias_HTS, *arrays))
        return _attend_rows(bias_HTS, jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), arrays))


def choose(
    wanted: Implementation | None,
    query_BTHK: Float[Array, "B T H K"],
    key_BSHK: Float[Array, "B S H K"],
    bias_HTS: Float[Array, "H T S"] | None,
    attention_mask: AttentionMask,
) -> Implementation:
    """`wanted` if it can do what is asked, else "batch".

    None wants "rows" on a lone CPU device where the logits are larger than its caches. On a TPU or GPU it wants the
    platform's fused kernel, which is used where a check on the device found it right and no slower than "batch" (see
    `kernels.fastest`). Hardware that a program is only compiled for is taken to pass that check.
    """
    rows, queries, heads, _ = query_BTHK.shape
    keys, device = key_BSHK.shape[1], sharding.device()
    if not isinstance(rows, int):  # an export, for batches of any size on any platform
        return "batch"
    if wanted is not None:
        able = wanted in ("batch", "rows") or _able(wanted, device, query_BTHK, key_BSHK, bias_HTS, attention_mask)
        return wanted if able else "batch"
    fused = PLATFORM_KERNELS.get(device.platform)
    if fused is None:
        large = rows * heads * queries * keys > CACHED_LOGITS
        return "rows" if device.platform == "cpu" and jax.device_count() == 1 and large else "batch"
    if not _able(fused, device, query_BTHK, key_BSHK, bias_HTS, attention_mask):
        return "batch"
    if fused == "flash" and queries * keys < FLASH_LOGITS:
        return "batch"
    return _checked(fused, query_BTHK, key_BSHK, bias_HTS, attention_mask) if device in jax.devices() else fused


def _able(
    fused: str, device: Any, query_BTHK: Array, key_BSHK: Array, bias_HTS: Array | None, attention_mask: AttentionMask
) -> bool:
    """Whether a fused kernel can do what is asked, by its own rules."""
    _, queries, _, width = query_BTHK.shape
    keys, part = key_BSHK.shape[1], sharding.part_shape(query_BTHK.shape, SPREAD)
    if queries == 1 or part is None:
        return False
    if fused == "flash":
        return flash_attention.fits(part[2], keys, width, key_BSHK.dtype)
    causal_only = attention_mask.key_prefix is None and attention_mask.offset is None
    capability = str(getattr(device, "compute_capability", ""))  # of AMD's, a name
    able = device.platform == "gpu" and capability.replace(".", "").isdecimal() and float(capability) >= 8.0
    able &= query_BTHK.dtype in (jnp.bfloat16, jnp.float16)
    able &= width % 8 == 0 and width + 2 * _segment_bits(attention_mask.most_segments(keys)) <= CUDNN_HEAD_DIM
    able &= bias_HTS is None or queries % 2 == keys % 2 == 0
    return able and (causal_only or not attention_mask.causal)


def _checked(
    fused: Implementation, query_BTHK: Array, key_BSHK: Array, bias_HTS: Array | None, attention_mask: AttentionMask
) -> Implementation:
    """`fused` or "batch", whichever a check on this device chose at the shape of each device's part."""
    rows, queries, heads, width = sharding.part_shape(query_BTHK.shape, SPREAD) or query_BTHK.shape
    keys = key_BSHK.shape[1]
    # No more rows, and then heads, than the reference has memory for.
    rows = max(1, min(rows, CHECKED_LOGITS // (heads * queries * keys)))
    heads = max(1, min(heads, CHECKED_LOGITS // (rows * queries * keys)))
    padding, packed = attention_mask.key_segments is not None, attention_mask.query_segments is not None

    def make_arguments() -> kernel_checks.Arguments:
        random = np.random.default_rng(0)

        def normal(*shape: int) -> np.ndarray:
            return random.standard_normal(shape, np.float32)

        def in_every_row(x: np.ndarray) -> np.ndarray:
            return np.tile(x.astype(np.int32), (rows, 1))

        # Two segments where rows are packed, else padding behind one. Each query must see a key, wherever it stands,
        # since the results of one that sees none are not defined.
        offset = 0 if attention_mask.offset is None else max(keys - queries, 0)
        at_queries, at_keys, middle = np.arange(queries), np.arange(keys), queries // 2
        key_middle = min(offset + middle, keys - 1) if attention_mask.causal else keys // 2
        query_segments = in_every_row(1 + (at_queries >= middle) if packed else at_queries >= 0)
        key_segments = in_every_row(1 + (at_keys >= key_middle) if packed else at_keys < keys - keys // 8)
        return (
            (normal(rows, queries, heads, width) * width**-0.5).astype(query_BTHK.dtype),
            *(normal(rows, keys, heads, width).astype(key_BSHK.dtype) for _ in range(2)),
            None if bias_HTS is None else normal(heads, queries, keys).astype(bias_HTS.dtype),
            *((query_segments, key_segments) if padding else (None, None)),
            None if attention_mask.key_prefix is None else in_every_row(at_keys % 3 == 0),
            np.asarray(offset, np.int32),
        )

    what = {
        "attention": [rows, queries, heads, width],
        "keys": keys,
        "dtype": jnp.dtype(query_BTHK.dtype).name,
        "bias": bias_HTS is not None,
        "segments": "packed" if packed else "padding" if padding else None,
        "causal": attention_mask.causal,
        "prefix": attention_mask.key_prefix is not None,
    }
    functions = {name: _kernel(name, keys, attention_mask) for name in ("batch", fused)}
    choice = kernel_checks.fastest(what, functions, make_arguments, version=_source_hash())
    return fused if choice == fused else "batch"


@functools.cache
def _source_hash() -> str:
    """Of the kernels' own code: another version of it is checked again."""
    return hashlib.sha256(
        b"".join(Path(file).read_bytes() for file in (__file__, flash_attention.__file__))
    ).hexdigest()[:8]


# Kernels have one signature, of arrays that may be on one device alone: `_arrays`, whose logical axes are `AXES`.
SPREAD = ("batch", None, "heads", None)  # how queries, keys and values lie on the mesh
AXES = (SPREAD, SPREAD, SPREAD, ("heads", None, None), ("batch",), ("batch",), ("batch",), ())


def _arrays(
    query: Array, key: Array, value: Array, bias: Array | None, attention_mask: AttentionMask
) -> tuple[Array | None, ...]:
    prefix = attention_mask.key_prefix if attention_mask.causal else None
    offset = jnp.asarray(0 if attention_mask.offset is None else attention_mask.offset, jnp.int32)
    return query, key, value, bias, *attention_mask.segments(query.shape[1]), prefix, offset


def _kernel(name: str, key_length: int, attention_mask: AttentionMask) -> Callable[..., Array]:
    options = {"causal": attention_mask.causal, "most_segments": attention_mask.most_segments(key_length)}
    return functools.partial({"batch": _batch, **FUSED}[name], **options)


def _batch(
    query: Array, key: Array, value: Array, bias: Array | None, *masks: Any, causal: bool, most_segments: int
) -> Array:
    del most_segments
    attention_mask = AttentionMask(*masks, causal=causal)
    return _attend(bias, query, key, value, attention_mask.materialize(query.shape[1], key.shape[1]))


def _flash(*arrays: Any, causal: bool, most_segments: int) -> Array:
    del most_segments
    interpret = sharding.device().platform != "tpu"
    return flash_attention.flash_attention(*arrays, causal=causal, masked=NEG_INF, interpret=interpret)


def _cudnn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    query_segments: Array | None,
    key_segments: Array | None,
    *_: Array | None,  # a prefix and an offset, which `_able` rules out
    causal: bool,
    most_segments: int,
) -> Array:
    """cuDNN's flash attention. The bias is rounded to the queries' dtype; its gradient comes summed over the batch.

    Beside a causal mask it takes dense ones only, which with a bias would be [B, H, T, S], and so would the gradient.
    So segments are said by the product of queries and keys: both get the bits of their segment as more of head_dim.
    Each bit that differs adds -2^14, each that agrees exactly 0.
    """
    width, dtype = query.shape[-1], query.dtype
    if query_segments is not None and key_segments is not None:
        bits = jnp.arange(_segment_bits(most_segments))
        query_bits, key_bits = ((s[..., None, None] >> bits) & 1 for s in (query_segments, key_segments))
        query = _widen(query, -(2.0**14) * jnp.concatenate([query_bits, 1 - query_bits], -1))
        key = _widen(key, jnp.concatenate([1 - key_bits, key_bits], -1))
        value = _widen(value, jnp.zeros((1, 1, 1, 2 * len(bits))))
    bias = None if bias is None else bias[None].astype(dtype)
    y = jax.nn.dot_product_attention(query, key, value, bias, scale=1.0, is_causal=causal, implementation="cudnn")
    return y[..., :width]


FUSED: Mapping[str, Callable[..., Array]] = {"flash": _flash, "cudnn": _cudnn}
PLATFORM_KERNELS: Mapping[str, Implementation] = {"tpu": "flash", "gpu": "cudnn"}


def _segment_bits(most_segments: int) -> int:
    """Enough for every segment and for padding, and a multiple of four, as twice as many must be one of eight."""
    return math.ceil(most_segments.bit_length() / 4) * 4


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
    return logits if mask is None else jnp.where(mask, logits, NEG_INF)


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

    y_BTHK, *normalizers = map(remat.keep, jax.lax.map(attend, arrays))
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
