"""Dot-product attention with T5's relative-position bias.

Every implementation takes queries, keys, values, a bias by distance and an `AttentionMask`. Both are symbolic (values
for each distance; segment ids and a causal flag), so a fused kernel never builds a dense [H, T, S] or [B, 1, T, S]
array. This module handles arrays only: no parameters, layers or configs.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from t5x_lite import sharding
from t5x_lite.model import block_attention, flash_attention, kernel_checks, remat
from t5x_lite.model.block_attention import materialize_bias
from t5x_lite.model.config import Implementation

# A logit of this size vanishes in a float32 softmax, and adding a bias to it does not overflow.
NEG_INF = -1e10

CACHED_LOGITS = 2**21  # 8 MiB in float32
# With fewer logits per row and head, a grid step of the TPU kernel takes longer to start (about 0.35 us) than to run,
# and XLA's attention moves little memory. An estimate, between T5's 114 x 114 and 114 x 512.
FLASH_LOGITS = 2**15
CHECKED_LOGITS = 2**26  # upper limit in a check of a fused kernel: 256 MiB for the reference
CUDNN_HEAD_DIM = 128  # the largest that cuDNN supports on every GPU
CUDNN_BIAS = 2**28  # elements of [H, T, S], which cuDNN reads and whose gradient it writes: 0.5 GiB each in bfloat16
STORED_LOGITS = 2**29  # logits of a device that plain JAX may write to memory: 2 GiB in float32
GPU_BLOCK, CPU_BLOCK = 512, 1024  # queries and keys of a block


@flax.struct.dataclass
class AttentionMask:
    """Which keys each query may attend to.

    A query attends to a key if their segment ids are equal and the key's id is not 0 (padding). If `causal`, the key
    must also be at or before the query's position; with a `window`, at most window[0] positions before the query and
    window[1] after it. Keys with `key_prefix` 1 are exempt from both. Segments of None hide nothing. Segment ids are at
    most S. `offset` is the position of the first query among the keys: None (0) in training, the number of tokens
    decoded so far in cached decoding.
    """

    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    key_prefix: Int[Array, "B S"] | None = None
    offset: Int[Array, ""] | int | None = None
    window: Int[Array, "2"] | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def materialize(self, query_length: int, key_length: int) -> Bool[Array, "_ 1 _ S"] | None:
        """Return the dense mask, True where visible (batch axis 1 if rows are equal); None if all keys are visible."""
        positions = self.query_positions(query_length), jnp.arange(key_length)
        segments = self.query_segments, self.key_segments
        return block_attention.visible(*segments, self.key_prefix, *positions, self.window, self.causal)

    def query_positions(self, query_length: int) -> Int[Array, " T"]:
        """Return the position of each query among the keys."""
        positions_T = jnp.arange(query_length)
        return positions_T if self.offset is None else self.offset + positions_T

    def segments(self, query_length: int) -> tuple[Int[Array, "B T"] | None, Int[Array, "B S"] | None]:
        """Segment ids of queries and keys, or (None, None)."""
        if self.key_segments is None or self.query_segments is not None:
            return (None, None) if self.key_segments is None else (self.query_segments, self.key_segments)
        ones_BT = jnp.ones((self.key_segments.shape[0], query_length), jnp.int32)
        return ones_BT, (self.key_segments != 0).astype(jnp.int32)

    def most_segments(self, key_length: int) -> int:
        """Return an upper bound of the ids in `segments`."""
        if self.key_segments is None:
            return 0
        return 1 if self.query_segments is None else key_length


def dot_product_attention(
    query_BTHK: Float[Array, "B T H K"],
    key_BSGK: Float[Array, "B S G K"],
    value_BSGK: Float[Array, "B S G K"],
    bias_HR: Float[Array, "H R"] | None,
    attention_mask: AttentionMask,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H K"]:
    """Compute softmax(qk + bias) v. There is no 1/sqrt(K): T5 folds it into the query's initialiser (T5X layers.py).

    Logits and softmax are float32 for every input dtype; the weights are cast to the values' dtype. Dropout on the
    weights is shared by all queries of a row (T5X broadcasts it along the query axis). A query that sees no key gets
    an average over some or all keys: it is padding, and its output is not used.

    Args:
      key_BSGK, value_BSGK: each head of them serves H / G consecutive heads of queries.
      bias_HR: added to the logits. Element r is for keys r - R // 2 positions after the query (R is odd), and the first
        and last also for all beyond.
      softcap: limit of the logits, softcap * tanh(qk / softcap) (Gemma 2); not together with a bias.
      implementation: "batch" materialises the weights of all rows at once. "blocks" computes block by block of rows,
        queries and keys, forward and backward (block_attention.py): memory is linear in the length, and a CPU, whose
        cache holds a block, is twice as fast at [8, 6, 512, 512]. "flash" is the TPU kernel (flash_attention.py),
        interpreted (slow) on other platforms. "cudnn" is cuDNN's kernel for NVIDIA GPUs. Neither fused kernel writes
        the weights to memory. If an implementation does not support the arguments (decoding one token, for example),
        "batch" is used. None selects by platform and shape, see `choose`.
    """
    rows, queries, heads, _ = query_BTHK.shape
    with jax.named_scope("attention"):
        # Decoding one token takes as long as reading the keys and values, so it reads each once.
        key_BSHK, value_BSHK = (x if queries == 1 else _of_each_head(x, heads) for x in (key_BSGK, value_BSGK))
        if dropout_rate > 0.0 and dropout_key is not None:
            # The dropout mask is shared by all queries, so it can be applied to the values.
            keep_mask_BSH1 = jnp.moveaxis(
                jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, (rows, heads, 1, key_BSHK.shape[1])), 3, 1
            )
            value_BSHK = value_BSHK * (keep_mask_BSH1 / (1.0 - dropout_rate)).astype(value_BSHK.dtype)
        assert softcap is None or bias_HR is None
        chosen = choose(implementation, query_BTHK, key_BSHK, bias_HR, attention_mask, softcap)
        arrays = _arrays(query_BTHK, key_BSHK, value_BSHK, bias_HR, attention_mask)
        kernel = _kernel(chosen, key_BSHK.shape[1], attention_mask, softcap)
        if chosen == "batch":
            return remat.keep(kernel(*arrays))
        return sharding.on_parts(kernel, arrays, AXES, SPREAD)  # each kernel marks itself what remat saves


def _of_each_head(x_BSGK: Float[Array, "B S G K"], heads: int) -> Float[Array, "B S H K"]:
    x_BSHK = x_BSGK if x_BSGK.shape[2] == heads else jnp.repeat(x_BSGK, heads // x_BSGK.shape[2], axis=2)
    return sharding.constrain(x_BSHK, "batch", "length", "heads", "kv")


def choose(
    wanted: Implementation | None,
    query_BTHK: Float[Array, "B T H K"],
    key_BSGK: Float[Array, "B S G K"],
    bias_HR: Float[Array, "H R"] | None,
    attention_mask: AttentionMask,
    softcap: float | None = None,
) -> Implementation:
    """Return `wanted` if it supports the arguments, else "batch".

    None selects the platform's fused kernel on a TPU or GPU if it supports the arguments, without a bias of quadratic
    size, and a check on the device finds it correct and not slower than plain JAX (see `kernel_checks.fastest`). If the
    program is only compiled for the hardware, the check counts as passed. Plain JAX is "batch", or "blocks" if the
    logits are too many to write to memory: on a single CPU device, for its caches.
    """
    queries, keys, device = query_BTHK.shape[1], key_BSGK.shape[1], sharding.device()
    part = sharding.part_shape(query_BTHK.shape, SPREAD)
    if not isinstance(query_BTHK.shape[0], int):  # an export with a symbolic batch size, for any platform
        return "batch"
    if queries == 1 or part is None:
        return "batch"
    cudnn_able = softcap is None and _cudnn_able(device, query_BTHK, keys, bias_HR, attention_mask)
    if wanted is not None:
        return "batch" if wanted == "cudnn" and not cudnn_able else wanted
    most = CACHED_LOGITS if device.platform == "cpu" and jax.device_count() == 1 else STORED_LOGITS
    plain: Implementation = "blocks" if part[0] * part[2] * queries * keys > most else "batch"
    small_bias = bias_HR is None or part[2] * queries * keys <= CUDNN_BIAS
    worthwhile = {"flash": queries * keys >= FLASH_LOGITS, "cudnn": cudnn_able and small_bias}
    fused = PLATFORM_KERNELS.get(device.platform)
    if fused is None or not worthwhile[fused]:
        return plain
    if device not in jax.devices():
        return fused
    return _checked(fused, plain, query_BTHK, key_BSGK, bias_HR, attention_mask, softcap)


def _cudnn_able(
    device: Any, query_BTHK: Array, keys: int, bias_HR: Array | None, attention_mask: AttentionMask
) -> bool:
    """Return whether cuDNN supports these shapes, dtypes and masks on this device."""
    _, queries, _, width = query_BTHK.shape
    causal_only = attention_mask.key_prefix is None and attention_mask.offset is None
    capability = str(getattr(device, "compute_capability", ""))  # a name on AMD GPUs
    able = device.platform == "gpu" and capability.replace(".", "").isdecimal() and float(capability) >= 8.0
    able &= query_BTHK.dtype in (jnp.bfloat16, jnp.float16)
    able &= width % 8 == 0 and width + 2 * _segment_bits(attention_mask.most_segments(keys)) <= CUDNN_HEAD_DIM
    able &= bias_HR is None or queries % 2 == keys % 2 == 0
    return able and (causal_only or not attention_mask.causal) and attention_mask.window is None


def _checked(
    fused: Implementation,
    plain: Implementation,
    query_BTHK: Array,
    key_BSHK: Array,
    bias_HR: Array | None,
    attention_mask: AttentionMask,
    softcap: float | None,
) -> Implementation:
    """Return `fused` or `plain`, as a check on this device at the shape of one device's shard decides."""
    rows, queries, heads, width = sharding.part_shape(query_BTHK.shape, SPREAD) or query_BTHK.shape
    keys = key_BSHK.shape[1]
    # Limit rows, and then heads, to what the reference has memory for.
    rows = max(1, min(rows, CHECKED_LOGITS // (heads * queries * keys)))
    heads = max(1, min(heads, CHECKED_LOGITS // (rows * queries * keys)))
    padding, packed = attention_mask.key_segments is not None, attention_mask.query_segments is not None

    def make_arguments() -> kernel_checks.Arguments:
        random = np.random.default_rng(0)

        def normal(*shape: int) -> np.ndarray:
            return random.standard_normal(shape, np.float32)

        def in_every_row(x: np.ndarray) -> np.ndarray:
            return np.tile(x.astype(np.int32), (rows, 1))

        # Use two segments if rows are packed, else one segment and padding. Every query must see a key: the output of
        # a query that sees none is undefined.
        offset = 0 if attention_mask.offset is None else max(keys - queries, 0)
        query_index, key_index, middle = np.arange(queries), np.arange(keys), queries // 2
        key_middle = min(offset + middle, keys - 1) if attention_mask.causal else keys // 2
        query_segments = in_every_row(1 + (query_index >= middle) if packed else query_index >= 0)
        key_segments = in_every_row(1 + (key_index >= key_middle) if packed else key_index < keys - keys // 8)
        return (
            (normal(rows, queries, heads, width) * width**-0.5).astype(query_BTHK.dtype),
            *(normal(rows, keys, heads, width).astype(key_BSHK.dtype) for _ in range(2)),
            None if bias_HR is None else normal(heads, bias_HR.shape[1]).astype(bias_HR.dtype),
            *((query_segments, key_segments) if padding else (None, None)),
            None if attention_mask.key_prefix is None else in_every_row(key_index % 3 == 0),
            np.asarray(offset, np.int32),
            None if attention_mask.window is None else np.asarray([keys // 4, keys // 8], np.int32),
        )

    description = {
        "attention": [rows, queries, heads, width],
        "keys": keys,
        "dtype": jnp.dtype(query_BTHK.dtype).name,
        "bias": bias_HR is not None,
        "segments": "packed" if packed else "padding" if padding else None,
        "causal": attention_mask.causal,
        "prefix": attention_mask.key_prefix is not None,
        "window": attention_mask.window is not None,
        "softcap": softcap,
    }
    functions = {name: _kernel(name, keys, attention_mask, softcap) for name in (plain, fused)}
    choice = kernel_checks.fastest(description, functions, make_arguments, version=_source_hash())
    return fused if choice == fused else plain


@functools.cache
def _source_hash() -> str:
    """Return a hash of the kernels' source code, so that a new version is checked again."""
    return hashlib.sha256(
        b"".join(Path(file).read_bytes() for file in (__file__, block_attention.__file__, flash_attention.__file__))
    ).hexdigest()[:8]


# Every kernel takes the arrays of `_arrays`, with the logical axes `AXES`, and runs on one device's shard of them.
SPREAD = ("batch", None, "heads", None)  # logical axes of queries, keys and values
AXES = (SPREAD, SPREAD, SPREAD, ("heads", None), ("batch",), ("batch",), ("batch",), (), ())


def _arrays(
    query: Array, key: Array, value: Array, bias: Array | None, attention_mask: AttentionMask
) -> tuple[Array | None, ...]:
    has_limit = attention_mask.causal or attention_mask.window is not None
    prefix = attention_mask.key_prefix if has_limit else None
    offset = jnp.asarray(0 if attention_mask.offset is None else attention_mask.offset, jnp.int32)
    return query, key, value, bias, *attention_mask.segments(query.shape[1]), prefix, offset, attention_mask.window


def _kernel(
    name: str, key_length: int, attention_mask: AttentionMask, softcap: float | None = None
) -> Callable[..., Array]:
    options = {"causal": attention_mask.causal, "softcap": softcap}
    options |= {"most_segments": attention_mask.most_segments(key_length)}
    return functools.partial(KERNELS[name], **options)


def _batch(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    *masks: Any,
    causal: bool,
    softcap: float | None,
    most_segments: int,
) -> Array:
    del most_segments
    attention_mask = AttentionMask(*masks, causal=causal)
    mask_B1TS = attention_mask.materialize(query.shape[1], key.shape[1])
    heads_per_key = query.shape[2] // key.shape[2]
    if heads_per_key > 1:  # there is one query then; its heads of one key become queries of one head
        query = jnp.swapaxes(query.reshape(query.shape[0], -1, heads_per_key, query.shape[3]), 1, 2)
    logits_BHTS = jnp.einsum("BTHK,BSHK->BHTS", query, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits_BHTS = block_attention.capped(logits_BHTS, softcap)
    if bias is not None:
        offset: Any = attention_mask.offset
        logits_BHTS += materialize_bias(bias, query.shape[1], key.shape[1], offset).astype(jnp.float32)
    if mask_B1TS is not None:
        logits_BHTS = jnp.where(mask_B1TS, logits_BHTS, NEG_INF)
    weights_BHTS = jax.nn.softmax(logits_BHTS, axis=-1).astype(value.dtype)
    y_BTHK = jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, value)
    if heads_per_key > 1:
        y_BTHK = jnp.swapaxes(y_BTHK, 1, 2).reshape(query.shape[0], 1, -1, query.shape[3])
    return y_BTHK


def _blocks(query: Array, *arrays: Any, causal: bool, softcap: float | None, most_segments: int) -> Array:
    del most_segments
    rows, _, heads, _ = query.shape
    blocks = block_attention.Blocks(1, CPU_BLOCK, CPU_BLOCK)
    if sharding.device().platform != "cpu":  # as many rows as fill it
        blocks = block_attention.Blocks(
            max(1, min(rows, CHECKED_LOGITS // (heads * GPU_BLOCK**2))), GPU_BLOCK, GPU_BLOCK
        )
    options = {"causal": causal, "softcap": softcap, "masked": NEG_INF}
    return block_attention.block_attention(query, *arrays, **options, blocks=blocks)


def _flash(*arrays: Any, causal: bool, softcap: float | None, most_segments: int) -> Array:
    del most_segments
    options = {"causal": causal, "softcap": softcap, "masked": NEG_INF}
    return flash_attention.flash_attention(*arrays, **options, interpret=sharding.device().platform != "tpu")


def _cudnn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    query_segments: Array | None,
    key_segments: Array | None,
    *_: Array | None,  # prefix, offset and window, which `_cudnn_able` excludes
    causal: bool,
    softcap: float | None,
    most_segments: int,
) -> Array:
    """Run cuDNN's flash attention. The bias is cast to the queries' dtype; its gradient is summed over the batch.

    Apart from a causal mask, cuDNN takes dense masks only. Together with a bias such a mask, and its gradient, would be
    [B, H, T, S]. So segments are encoded in the product of queries and keys: the bits of the segment id are appended
    along head_dim. Each bit that differs adds -2^14 to the logit, each equal bit exactly 0.
    """
    width, dtype = query.shape[-1], query.dtype
    if query_segments is not None and key_segments is not None:
        bits = jnp.arange(_segment_bits(most_segments))
        query_bits, key_bits = ((s[..., None, None] >> bits) & 1 for s in (query_segments, key_segments))
        query = _widen(query, -(2.0**14) * jnp.concatenate([query_bits, 1 - query_bits], -1))
        key = _widen(key, jnp.concatenate([1 - key_bits, key_bits], -1))
        value = _widen(value, jnp.zeros((1, 1, 1, 2 * len(bits))))
    bias = None if bias is None else materialize_bias(bias, query.shape[1], key.shape[1])[None].astype(dtype)
    y = jax.nn.dot_product_attention(query, key, value, bias, scale=1.0, is_causal=causal, implementation="cudnn")
    return y[..., :width]


PLATFORM_KERNELS: Mapping[str, Implementation] = {"tpu": "flash", "gpu": "cudnn"}
KERNELS: Mapping[str, Callable[..., Array]] = {"batch": _batch, "blocks": _blocks, "flash": _flash, "cudnn": _cudnn}


def _segment_bits(most_segments: int) -> int:
    """Return the bits for every segment id and padding: a multiple of 4, as twice that must be a multiple of 8."""
    return math.ceil(most_segments.bit_length() / 4) * 4


def _widen(x: Float[Array, "B S H K"], more: Array) -> Float[Array, "B S H _"]:
    return jnp.concatenate([x, jnp.broadcast_to(more, (*x.shape[:3], more.shape[-1])).astype(x.dtype)], -1)
