"""A Pallas attention kernel for TPUs with T5's bias and its gradient. Logits and weights stay on the chip.

JAX's splash attention takes no bias. JAX's flash attention takes the bias, and returns its gradient, for each row of
the batch as [B, H, T, S], which a fused kernel should avoid. All keys of a T5 row fit into VMEM together with a block
of queries, so the softmax sees a whole row. Only the arguments are saved for the backward pass, which recomputes the
weights. The bias gradient is summed over the batch on the chip: rows are the innermost axis of the grid and accumulate
into the same block.

This module handles the arrays of one device; meshes and the other implementations are in attention.py.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES, SUBLANES = 128, 16  # a tile of bfloat16
# Logits of all heads of a block (at least two heads): 2 MiB in float32, a sixth of the smallest VMEM.
BLOCK_LOGITS = 2**19
KEYS_BYTES = 2**19  # upper limit for a block of keys: keys, values and their gradients take twelve times as much


class Masking(NamedTuple):
    """`attention.AttentionMask` as kernel arguments. Segments are given for queries and keys, or for neither."""

    offset: Int[Array, "1"]
    query_segments: Int[Array, "B T 1"] | None
    key_segments: Int[Array, "B 1 S"] | None
    key_prefix: Int[Array, "B 1 S"] | None


class Settings(NamedTuple):
    """Static settings. blocks: number of query blocks. masked: logit of a masked key. interpret: run without a TPU."""

    heads: int
    blocks: int
    causal: bool
    masked: float
    interpret: bool


def flash_attention(
    query_BTHK: Float[Array, "B T H K"],
    key_BSHK: Float[Array, "B S H K"],
    value_BSHK: Float[Array, "B S H K"],
    bias_HTS: Float[Array, "H T S"] | None,
    query_segments_BT: Int[Array, "B T"] | None,
    key_segments_BS: Int[Array, "B S"] | None,
    key_prefix_BS: Int[Array, "B S"] | None,
    offset: Int[Array, ""] | int,
    *,
    causal: bool,
    masked: float,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Compute softmax(qk + bias) v. See `attention.AttentionMask` for the masks and `Settings` for the options."""
    _, length, heads, width = query_BTHK.shape
    most = BLOCK_LOGITS // max(_group(heads, width), 2) // key_BSHK.shape[1]
    block = length
    if length > most:  # make blocks as equal as tiles allow
        block = math.ceil(length / math.ceil(length / most) / SUBLANES) * SUBLANES
    missing = -length % block

    def pad(x: Array | None) -> Any:
        """Pad the queries to equal blocks. The padded outputs are cut off and add nothing to the gradients."""
        return (
            jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)]) if missing and x is not None else x
        )

    def join(x_BSHK: Array) -> Array:
        """Merge heads into the last axis: a single head of 64 would be padded to 128 lanes."""
        return x_BSHK.reshape(*x_BSHK.shape[:2], -1)

    masking = Masking(
        jnp.asarray(offset, jnp.int32).reshape(1),
        None if query_segments_BT is None else pad(query_segments_BT)[:, :, None],
        None if key_segments_BS is None else key_segments_BS[:, None, :],
        None if key_prefix_BS is None else key_prefix_BS[:, None, :],
    )
    settings = Settings(heads, (length + missing) // block, causal, masked, interpret)
    y_BTX: Any = _attend(settings, pad(join(query_BTHK)), join(key_BSHK), join(value_BSHK), pad(bias_HTS), masking)
    return y_BTX[:, :length].reshape(query_BTHK.shape)


def fits(heads: int, keys: int, width: int, dtype: jnp.dtype) -> bool:
    """Return whether all keys fit into VMEM."""
    lanes = math.ceil(_group(heads, width) * width / LANES) * LANES
    return keys * lanes * jnp.dtype(dtype).itemsize <= KEYS_BYTES


# Axis X below is heads * head_dim.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings,
    query_BTX: Float[Array, "B T X"],
    key_BSX: Float[Array, "B S X"],
    value_BSX: Float[Array, "B S X"],
    bias_HTS: Float[Array, "H T S"] | None,
    masking: Masking,
) -> Float[Array, "B T X"]:
    out = jax.ShapeDtypeStruct(query_BTX.shape, value_BSX.dtype)
    return _call(_forward, settings, "b", [out], query_BTX, key_BSX, value_BSX, bias_HTS, masking)[0]


def _attend_forward(settings: Settings, *arrays: Any) -> tuple[Array, tuple]:
    return _attend(settings, *arrays), arrays


def _attend_backward(settings: Settings, arrays: tuple, d_y_BTX: Array) -> tuple:
    query, key, value, bias, _ = arrays
    d_query, d_key, d_value = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value))
    d_bias = None if bias is None else jax.ShapeDtypeStruct(bias.shape, jnp.float32)
    if settings.blocks == 1:
        grads = _call(_backward, settings, "b", [d_query, d_key, d_value, d_bias], *arrays, d_y_BTX)
    else:
        # A sum stays on the chip only while consecutive grid steps add to the same block. The bias gradient is a sum
        # over rows, the gradients of keys and values are sums over blocks of queries: this takes two passes.
        d_key, d_value = (jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (key, value))
        d_query, *_, d_bias = _call(_backward, settings, "b", [d_query, None, None, d_bias], *arrays, d_y_BTX)
        _, *d_keys, _ = _call(_backward, settings, "t", [None, d_key, d_value, None], *arrays, d_y_BTX)
        grads = d_query, *(x.astype(key.dtype) for x in d_keys), d_bias
    return *grads[:3], None if bias is None else grads[3].astype(bias.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _group(heads: int, width: int) -> int:
    """Return the number of heads per block: the fewest that fill the lanes, or all."""
    return min((n for n in range(1, heads + 1) if heads % n == 0 and n * width % LANES == 0), default=heads)


def _call(
    kernel: Any,
    settings: Settings,
    innermost: str,
    out: list[jax.ShapeDtypeStruct | None],
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    masking: Masking,
    *d_y: Array,
) -> Any:
    """Run a kernel on a grid of head groups, rows (b) and blocks of queries (t); `innermost` is "b" or "t".

    Returns an array for each shape in `out`, and None for None.
    """
    rows, length, joined = query.shape
    keys, width, block = key.shape[1], joined // settings.heads, length // settings.blocks
    group = _group(settings.heads, width)

    def spec(shape: tuple[int, ...], index: Any) -> pl.BlockSpec:
        return pl.BlockSpec(
            shape, (lambda g, t, b: index(b, t, g)) if innermost == "b" else lambda g, b, t: index(b, t, g)
        )

    query_spec = spec((1, block, group * width), lambda b, t, g: (b, t, g))
    key_spec = spec((1, keys, group * width), lambda b, t, g: (b, 0, g))
    bias_spec = spec((group, block, keys), lambda b, t, g: (g, t, 0))
    column, row = spec((1, block, 1), lambda b, t, g: (b, t, 0)), spec((1, 1, keys), lambda b, t, g: (b, 0, 0))
    specs = [query_spec, key_spec, key_spec, bias_spec]
    masking_specs = [pl.BlockSpec(memory_space=pltpu.SMEM), column, row, row]

    def specs_of_present(specs: Any, arrays: Any) -> Any:
        return [None if x is None else s for s, x in zip(specs, arrays, strict=True)]

    axis = {"t": 1, "b": 2} if innermost == "b" else {"b": 1, "t": 2}
    return pl.pallas_call(
        functools.partial(kernel, settings, width, axis),
        grid=(settings.heads // group, *((settings.blocks, rows) if innermost == "b" else (rows, settings.blocks))),
        in_specs=[
            *specs_of_present(specs, (query, key, value, bias)),
            Masking(*specs_of_present(masking_specs, masking)),
            *(query_spec for _ in d_y),
        ],
        out_specs=specs_of_present(specs[: len(out)], out),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=settings.interpret,
    )(query, key, value, bias, masking, *d_y)


def _forward(settings, width, axis, q_ref, k_ref, v_ref, bias_ref, masking, y_ref):
    visible = _visible(settings, q_ref.shape[1], k_ref.shape[1], pl.program_id(axis["t"]), masking)
    for head in range(q_ref.shape[2] // width):
        head_slice = (0, slice(None), slice(head * width, (head + 1) * width))
        exp_TS, sum_T1 = _weights(settings, q_ref[head_slice], k_ref[head_slice], bias_ref, head, visible)
        y_ref[head_slice] = (_dot(exp_TS.astype(v_ref.dtype), v_ref[head_slice], 1, 0) / sum_T1).astype(y_ref.dtype)


def _backward(settings, width, axis, q_ref, k_ref, v_ref, bias_ref, masking, dy_ref, dq_ref, dk_ref, dv_ref, dbias_ref):
    """Write each gradient whose output reference is given."""
    visible = _visible(settings, q_ref.shape[1], k_ref.shape[1], pl.program_id(axis["t"]), masking)

    def add(ref, index, x, over):
        """Compute ref[index] += x, starting from zero in the first step along the grid axis `over`."""
        first = pl.program_id(axis[over]) == 0
        ref[index] = (x + jnp.where(first, 0.0, ref[index])).astype(ref.dtype)

    for head in range(q_ref.shape[2] // width):
        head_slice = (0, slice(None), slice(head * width, (head + 1) * width))
        q_TK, k_SK, dy_TK = q_ref[head_slice], k_ref[head_slice], dy_ref[head_slice]
        exp_TS, sum_T1 = _weights(settings, q_TK, k_SK, bias_ref, head, visible)
        p_TS = exp_TS / sum_T1
        dp_TS = _dot(dy_TK, v_ref[head_slice], 1, 1)
        ds_TS = p_TS * (dp_TS - jnp.sum(dp_TS * p_TS, axis=-1, keepdims=True))
        if visible is not None:
            ds_TS = jnp.where(visible, ds_TS, 0.0)
        if dbias_ref is not None:
            add(dbias_ref, head, ds_TS, "b")
        ds_TS = ds_TS.astype(q_TK.dtype)
        if dq_ref is not None:
            dq_ref[head_slice] = _dot(ds_TS, k_SK, 1, 0).astype(dq_ref.dtype)
        if dk_ref is not None:
            add(dk_ref, head_slice, _dot(ds_TS, q_TK, 0, 0), "t")
            add(dv_ref, head_slice, _dot(p_TS.astype(dy_TK.dtype), dy_TK, 0, 0), "t")


def _visible(settings, queries, keys, block, masking):
    """Return the mask [T, S] of the keys that each query of a block sees; None if all."""
    visible_TS = None
    if settings.causal:
        shape = (queries, keys)
        first = masking.offset[0] + block * queries
        visible_TS = jax.lax.broadcasted_iota(jnp.int32, shape, 1) <= first + jax.lax.broadcasted_iota(
            jnp.int32, shape, 0
        )
        if masking.key_prefix is not None:
            visible_TS |= masking.key_prefix[0] != 0
    if masking.key_segments is not None:
        segments_1S = masking.key_segments[0]
        same_TS = (masking.query_segments[0] == segments_1S) & (segments_1S != 0)
        visible_TS = same_TS if visible_TS is None else visible_TS & same_TS
    return visible_TS


def _weights(settings, q_TK, k_SK, bias_ref, head, visible_TS):
    """Return the softmax numerators and their sum; float32."""
    logits_TS = _dot(q_TK, k_SK, 1, 1)
    if bias_ref is not None:
        logits_TS += bias_ref[head].astype(jnp.float32)
    if visible_TS is not None:
        logits_TS = jnp.where(visible_TS, logits_TS, settings.masked)
    exp_TS = jnp.exp(logits_TS - jnp.max(logits_TS, axis=-1, keepdims=True))
    return exp_TS, jnp.sum(exp_TS, axis=-1, keepdims=True)


def _dot(a, b, axis_a, axis_b):
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
