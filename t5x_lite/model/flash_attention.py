"""A Pallas attention kernel for TPUs with T5's bias and its gradient, for inputs of any length.

JAX's splash attention takes no bias. JAX's flash attention takes one as [H, T, S], and returns its gradient for each
row of the batch as [B, H, T, S]. Here logits, weights and bias stay on the chip, a tile of queries and keys at a time
(online softmax: Milakov and Gimelshein 2018; Dao et al. 2022), so memory is linear in the length. The bias depends on
the distance of key and query alone, so that the diagonals of a tile are constant: a tile comes from one row of
numbers, and its gradient is reduced to such a row. Tiles that no query sees are skipped.

Tiles are transposed, [keys, queries]: what belongs to a query is then a row of lanes. This module handles the arrays
of one device; meshes and the other implementations are in attention.py.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_lite.model import remat

LANES, SUBLANES = 128, 8
# Logits of all heads of a tile (at least two heads): 2 MiB in float32, an eighth of the smallest VMEM.
TILE_LOGITS = 2**19


class Masking(NamedTuple):
    """`attention.AttentionMask` as kernel arguments. Segments are given for queries and keys, or for neither.

    limits: the offset; and the window, if there is one.
    """

    limits: Int[Array, " N"]
    query_segments: Int[Array, "B 1 T"] | None
    key_segments: Int[Array, "B S 1"] | None
    key_prefix: Int[Array, "B S 1"] | None


class Settings(NamedTuple):
    """Static settings.

    blocks_T, blocks_S: number of blocks of queries and of keys. keys: their number without padding. limit: the bias is
    constant from this distance on. masked: logit of a masked key. interpret: run without a TPU.
    """

    heads: int
    blocks_T: int
    blocks_S: int
    keys: int
    limit: int
    causal: bool
    windowed: bool
    softcap: float | None
    masked: float
    interpret: bool


def flash_attention(
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
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Compute softmax(qk + bias) v. See `attention.dot_product_attention` for the arguments."""
    _, queries, heads, width = query_BTHK.shape
    keys = key_BSHK.shape[1]
    most = math.isqrt(TILE_LOGITS // max(_group(heads, width), 2)) // LANES * LANES or LANES
    (blocks_T, T), (blocks_S, S) = _blocks(queries, most), _blocks(keys, most)
    if blocks_T > 1 and blocks_S > 1:  # tiles at the same distance from the diagonal share their bias
        T = S = max(T, S)
        blocks_T, blocks_S = math.ceil(queries / T), math.ceil(keys / S)

    def pad(x: Array, length: int) -> Array:
        """Pad axis 1 to whole blocks. Padded keys are masked; padded outputs are cut off and have no gradient."""
        return jnp.pad(x, [(0, length - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)])

    def join(x: Array, length: int) -> Array:
        """Merge heads into the last axis: a single head of 64 would be padded to 128 lanes."""
        return pad(x.reshape(*x.shape[:2], -1), length)

    def column(x_BS: Array | None) -> Any:
        return None if x_BS is None else pad(x_BS, blocks_S * S)[:, :, None]

    limits = jnp.asarray(offset, jnp.int32).reshape(1)
    limits = limits if window is None else jnp.concatenate([limits, window.astype(jnp.int32)])
    query_segments = None if query_segments_BT is None else pad(query_segments_BT, blocks_T * T)[:, None, :]
    masking = Masking(limits, query_segments, column(key_segments_BS), column(key_prefix_BS))
    diagonals_HN1L = None if bias_HR is None else _diagonals(bias_HR, limits[0], (blocks_T, T), (blocks_S, S))
    limit = 0 if bias_HR is None else bias_HR.shape[1] // 2
    masks = causal, window is not None, softcap, masked
    settings = Settings(heads, blocks_T, blocks_S, keys, limit, *masks, interpret)
    arrays = (join(query_BTHK, blocks_T * T), *(join(x, blocks_S * S) for x in (key_BSHK, value_BSHK)))
    y_BTX: Any = _attend(settings, *arrays, diagonals_HN1L, masking)
    return y_BTX[:, :queries].reshape(query_BTHK.shape)


def _blocks(length: int, most: int) -> tuple[int, int]:
    """Return the number of blocks, as equal as tiles allow, and the length of a block."""
    count = math.ceil(length / most)
    return (1, length) if count == 1 else (count, math.ceil(length / count / LANES) * LANES)


def _group(heads: int, width: int) -> int:
    """Return the number of heads per block: the fewest that fill the lanes, or all."""
    return min((n for n in range(1, heads + 1) if heads % n == 0 and n * width % LANES == 0), default=heads)


def _diagonals(
    bias_HR: Float[Array, "H R"], offset: Int[Array, ""], queries: tuple[int, int], keys: tuple[int, int]
) -> Float[Array, "H N 1 L"]:
    """Return the biases of the diagonals of each tile. Tile n has key block minus query block = n - (blocks_T - 1).

    Element x belongs to the logits whose query index minus key index, both counted in the tile, is x modulo L.
    """
    (blocks_T, T), (blocks_S, S) = queries, keys
    length = math.ceil((T + S) / LANES) * LANES
    first_N1 = (jnp.arange(1 - blocks_T, blocks_S) * (S if blocks_S > 1 else T))[:, None] - offset
    diagonal_L = jnp.arange(length)
    distance_NL = first_N1 - jnp.where(diagonal_L < T, diagonal_L, diagonal_L - length)
    limit = bias_HR.shape[1] // 2
    return bias_HR.astype(jnp.float32)[:, jnp.clip(distance_NL, -limit, limit) + limit][:, :, None]


# Axis X below is heads * head_dim. Axis G holds the groups of heads, of P heads each.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings,
    query_BTX: Float[Array, "B T X"],
    key_BSX: Float[Array, "B S X"],
    value_BSX: Float[Array, "B S X"],
    diagonals_HN1L: Float[Array, "H N 1 L"] | None,
    masking: Masking,
) -> Float[Array, "B T X"]:
    return _attend_forward(settings, query_BTX, key_BSX, value_BSX, diagonals_HN1L, masking)[0]


def _attend_forward(
    settings: Settings, query: Array, key: Array, value: Array, diagonals: Any, masking: Masking
) -> Any:
    rows, queries, joined = query.shape
    group = _group(settings.heads, joined // settings.heads)
    block_X = group * joined // settings.heads
    block_T = queries // settings.blocks_T
    y, log_sum = _call(
        _forward,
        settings,
        "bts",
        {"query": query, "key": key, "value": value, "diagonals": diagonals, "masking": masking},
        {
            "query": jax.ShapeDtypeStruct(query.shape, value.dtype),
            "row": jax.ShapeDtypeStruct((rows, settings.heads // group, group, queries), jnp.float32),
        },
        [pltpu.VMEM((group, block_T), jnp.float32)] * 2 + [pltpu.VMEM((block_X, block_T), jnp.float32)],
    )
    y, log_sum = remat.keep(y), remat.keep(log_sum)
    return y, (query, key, value, diagonals, masking, y, log_sum)


def _attend_backward(settings: Settings, saved: tuple, d_y_BTX: Array) -> tuple:
    query, key, value, diagonals, masking, y, log_sum_BGPT = saved
    rows, queries, joined = query.shape
    # The backward pass of the softmax needs sum_S(d_weights * weights), which equals the smaller sum_K(d_y * y).
    inner_BTH = jnp.sum((d_y_BTX.astype(jnp.float32) * y).reshape(rows, queries, settings.heads, -1), axis=-1)
    arrays = {"query": query, "key": key, "value": value, "diagonals": diagonals, "masking": masking}
    arrays |= {"d_y": d_y_BTX, "log_sum": log_sum_BGPT, "inner": inner_BTH.swapaxes(1, 2).reshape(log_sum_BGPT.shape)}

    def like(x: Array | None) -> Any:
        return None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)

    block_X = _group(settings.heads, joined // settings.heads) * joined // settings.heads
    sum_XT = [pltpu.VMEM((block_X, queries // settings.blocks_T), jnp.float32)]
    sums_SX = [pltpu.VMEM((key.shape[1] // settings.blocks_S, block_X), jnp.float32)] * 2
    of_queries = {"query": like(query), "diagonals": like(diagonals)}
    of_keys = {"key": like(key), "value": like(value)}
    if 1 in (settings.blocks_T, settings.blocks_S):
        results = _call(_backward, settings, "bts", arrays, of_queries | of_keys, sum_XT + sums_SX)
        d_query, d_diagonals, d_key, d_value = results
    else:
        # A sum stays on the chip only while consecutive grid steps add to the same block. The gradients of queries are
        # sums over blocks of keys, and those of keys sums over blocks of queries: this takes two passes.
        d_query, d_diagonals = _call(_backward, settings, "bts", arrays, of_queries, sum_XT)
        d_key, d_value = _call(_backward, settings, "bst", arrays, of_keys, sums_SX)
    return d_query, d_key, d_value, d_diagonals, None


_attend.defvjp(_attend_forward, _attend_backward)


def _call(
    kernel: Any, settings: Settings, order: str, arrays: dict[str, Any], out: dict[str, Any], scratch: Sequence[Any]
) -> Any:
    """Run a kernel on a grid of groups of heads and then, in the order given, rows (b), queries (t) and keys (s).

    Returns an array for each shape in `out`, and None for None. A kernel's arguments are settings, head_dim, the grid's
    axes by letter, the references of `arrays` and `out` by name, and those of `scratch`.
    """
    query, key, diagonals = (arrays[name] for name in ("query", "key", "diagonals"))
    width = query.shape[2] // settings.heads
    group = _group(settings.heads, width)
    block_T, block_S = query.shape[1] // settings.blocks_T, key.shape[1] // settings.blocks_S

    def spec(shape: tuple[int, ...], index: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda g, *steps: index(g=g, **dict(zip(order, steps, strict=True))))

    of_queries = spec((1, block_T, group * width), lambda b, t, s, g: (b, t, g))
    of_keys = spec((1, block_S, group * width), lambda b, t, s, g: (b, s, g))
    row = spec((1, 1, group, block_T), lambda b, t, s, g: (b, g, 0, t))
    column = spec((1, block_S, 1), lambda b, t, s, g: (b, s, 0))
    specs: dict[str, Any] = {"query": of_queries, "d_y": of_queries, "key": of_keys, "value": of_keys}
    specs |= {"row": row, "log_sum": row, "inner": row}
    if diagonals is not None:
        specs["diagonals"] = spec((group, *diagonals.shape[1:]), lambda b, t, s, g: (g, 0, 0, 0))
    query_segments = spec((1, 1, block_T), lambda b, t, s, g: (b, 0, t))
    masking_specs = (pl.BlockSpec(memory_space=pltpu.SMEM), query_segments, column, column)
    masking = arrays["masking"]
    specs["masking"] = Masking._make(None if x is None else s for s, x in zip(masking_specs, masking, strict=True))
    names = list(arrays)

    def run(*refs: Any) -> None:
        axes = {letter: 1 + n for n, letter in enumerate(order)}
        inputs, others = dict(zip(names, refs, strict=False)), refs[len(names) :]
        kernel(settings, width, axes, inputs, dict(zip(out, others, strict=False)), *others[len(out) :])

    sums_bias = out.get("diagonals") is not None
    sizes = {"b": query.shape[0], "t": settings.blocks_T, "s": settings.blocks_S}
    parallel = "arbitrary" if sums_bias or ("query" in out and "key" in out) else "parallel"
    return pl.pallas_call(
        run,
        grid=(settings.heads // group, *(sizes[letter] for letter in order)),
        in_specs=[specs.get(name) for name in names],
        out_specs=[None if shape is None else specs[name] for name, shape in out.items()],
        out_shape=list(out.values()),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", parallel, parallel, "arbitrary")),
        interpret=settings.interpret,
    )(*arrays.values())


def _forward(settings, width, axes, refs, out, max_ref, sum_ref, y_ref_XT):
    tile = _Tile(settings, width, axes, refs)

    @pl.when(tile.step("s") == 0)
    def _():
        max_ref[...] = jnp.full(max_ref.shape, settings.masked, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        y_ref_XT[...] = jnp.zeros(y_ref_XT.shape, jnp.float32)

    @tile.when_visible
    def _():
        for head, columns in tile.heads():
            logits_ST = tile.logits(head, columns)
            max_1T = jnp.maximum(max_ref[head : head + 1], jnp.max(logits_ST, axis=0, keepdims=True))
            rescale_1T = jnp.exp(max_ref[head : head + 1] - max_1T)
            exp_ST = jnp.exp(logits_ST - max_1T)
            max_ref[head : head + 1] = max_1T
            sum_ref[head : head + 1] = sum_ref[head : head + 1] * rescale_1T + jnp.sum(exp_ST, axis=0, keepdims=True)
            value_SK = refs["value"][0, :, columns]
            y_ref_XT[columns] = y_ref_XT[columns] * rescale_1T + _dot(value_SK, exp_ST.astype(value_SK.dtype), 0, 0)

    @pl.when(tile.step("s") == settings.blocks_S - 1)
    def _():
        for head, columns in tile.heads():
            # Of a query that sees no key all weights are 0 in the backward pass.
            max_1T = max_ref[head : head + 1]
            hidden_1T = max_1T <= settings.masked / 2
            sum_1T = jnp.where(hidden_1T, 1.0, sum_ref[head : head + 1])
            out["row"][0, 0, head : head + 1] = jnp.where(hidden_1T, 0.0, max_1T + jnp.log(sum_1T))
            y_ref_XT[columns] = y_ref_XT[columns] / sum_1T
        out["query"][0] = y_ref_XT[...].T.astype(out["query"].dtype)


def _backward(settings, width, axes, refs, out, *sums):
    """Write the gradients that `out` names: of queries and diagonals, of keys and values, or all."""
    tile = _Tile(settings, width, axes, refs)
    d_diagonals_ref = out.get("diagonals")
    query_sum_XT: Any = sums[0] if "query" in out else None
    key_sums_SX = sums[-2:] if "key" in out else ()
    grid_is_at_start = (tile.step("b") == 0) & (tile.step("t") == 0) & (tile.step("s") == 0)

    def zero(ref):
        ref[...] = jnp.zeros(ref.shape, ref.dtype)

    if d_diagonals_ref is not None:
        pl.when(grid_is_at_start)(lambda: zero(d_diagonals_ref))
    if query_sum_XT is not None:
        pl.when(tile.step("s") == 0)(lambda: zero(query_sum_XT))
    for ref in key_sums_SX:
        pl.when(tile.step("t") == 0)(lambda ref=ref: zero(ref))

    @tile.when_visible
    def _():
        for head, columns in tile.heads():
            query_TK, key_SK, value_SK, d_y_TK = (
                refs[name][0, :, columns] for name in ("query", "key", "value", "d_y")
            )
            logits_ST = tile.logits(head, columns)
            weights_ST = jnp.exp(logits_ST - refs["log_sum"][0, 0, head : head + 1])
            d_logits_ST = weights_ST * (_dot(value_SK, d_y_TK, 1, 1) - refs["inner"][0, 0, head : head + 1])
            if settings.softcap is not None:  # the derivative of tanh is 1 - tanh^2
                d_logits_ST *= 1 - jnp.square(logits_ST / settings.softcap)
            if d_diagonals_ref is not None:
                d_diagonals_ref[head, tile.diagonal] += tile.sum_diagonals(d_logits_ST)
            d_logits_ST = d_logits_ST.astype(query_TK.dtype)
            if query_sum_XT is not None:
                query_sum_XT[columns] += _dot(key_SK, d_logits_ST, 0, 0)
            if key_sums_SX:
                key_sums_SX[0][:, columns] += _dot(d_logits_ST, query_TK, 1, 0)
                key_sums_SX[1][:, columns] += _dot(weights_ST.astype(d_y_TK.dtype), d_y_TK, 1, 0)

    if query_sum_XT is not None:

        @pl.when(tile.step("s") == settings.blocks_S - 1)
        def _():
            out["query"][0] = query_sum_XT[...].T.astype(out["query"].dtype)

    if key_sums_SX:

        @pl.when(tile.step("t") == settings.blocks_T - 1)
        def _():
            for name, sum_SX in zip(("key", "value"), key_sums_SX, strict=True):
                out[name][0] = sum_SX[...].astype(out[name].dtype)


class _Tile:
    """A block of queries and a block of keys, within a kernel."""

    def __init__(self, settings, width, axes, refs):
        self.settings, self.width, self.refs = settings, width, refs
        self.step = lambda letter: pl.program_id(axes[letter])
        self.queries, self.keys = refs["query"].shape[1], refs["key"].shape[1]
        self.first_query = refs["masking"].limits[0] + self.step("t") * self.queries
        self.first_key = self.step("s") * self.keys
        self.diagonal = self.step("s") - self.step("t") + settings.blocks_T - 1
        self.visible_ST = self._visible()

    def heads(self):
        """Return index and columns of each head of the group."""
        count = self.refs["query"].shape[2] // self.width
        return [(head, slice(head * self.width, (head + 1) * self.width)) for head in range(count)]

    def when_visible(self, compute):
        """Run `compute`, unless no query sees any key."""
        if self.visible_ST is None:
            compute()
        else:
            pl.when(jnp.max(self.visible_ST.astype(jnp.float32)) > 0.0)(compute)

    def _visible(self):
        """Return the mask of the keys that each query sees; None if all."""
        shape, masking, terms = (self.keys, self.queries), self.refs["masking"], []
        key_ST = self.first_key + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        if self.keys * self.settings.blocks_S > self.settings.keys:
            terms.append(key_ST < self.settings.keys)
        near = []
        distance_ST = key_ST - (self.first_query + jax.lax.broadcasted_iota(jnp.int32, shape, 1))
        if self.settings.causal:
            near.append(distance_ST <= 0)
        if self.settings.windowed:
            near += [-distance_ST <= masking.limits[1], distance_ST <= masking.limits[2]]
        if near:
            near_ST = functools.reduce(jnp.logical_and, near)
            terms.append(near_ST if masking.key_prefix is None else near_ST | (masking.key_prefix[0] != 0))
        if masking.key_segments is not None:
            segments_S1 = masking.key_segments[0]
            terms.append((segments_S1 == masking.query_segments[0]) & (segments_S1 != 0))
        return functools.reduce(jnp.logical_and, terms) if terms else None

    def logits(self, head, columns):
        logits_ST = _dot(self.refs["key"][0, :, columns], self.refs["query"][0, :, columns], 1, 1)
        if self.settings.softcap is not None:
            logits_ST = self.settings.softcap * jnp.tanh(logits_ST / self.settings.softcap)
        if self.refs["diagonals"] is not None:
            diagonals_1L = self.refs["diagonals"][head, self.diagonal]
            logits_ST += jax.lax.cond(
                self._is_far(),
                lambda: jnp.broadcast_to(diagonals_1L[:, :1], logits_ST.shape),
                lambda: self._toeplitz(diagonals_1L),
            )
        return logits_ST if self.visible_ST is None else jnp.where(self.visible_ST, logits_ST, self.settings.masked)

    def _is_far(self):
        """Return whether all distances are beyond the limit, so that the bias is constant."""
        first = self.first_key - self.first_query
        limit = self.settings.limit
        return (first - (self.queries - 1) >= limit) | (first + (self.keys - 1) <= -limit)

    def _toeplitz(self, diagonals_1L):
        """Return the tile [S, T] whose element [s, t] is diagonals[(t - s) mod L]: row s is rolled right by s.

        The rolls are static, which every TPU supports; rolls with a stride need a v5e or later.
        """
        first_8L = jnp.concatenate([_roll(diagonals_1L, n) for n in range(min(SUBLANES, self.keys))])
        rows_SL = [_roll(first_8L, n) for n in range(0, self.keys, SUBLANES)]
        return jnp.concatenate([rows[:, : self.queries] for rows in rows_SL])[: self.keys]

    def sum_diagonals(self, x_ST):
        """Return the sums of x over each diagonal, [1, L]: the transpose of `_toeplitz`."""
        length = self.refs["diagonals"].shape[-1]

        def over_rows():
            padding = [(0, -self.keys % SUBLANES), (0, length - self.queries)]
            x_SL = jnp.pad(x_ST, padding)
            rows_8L = None  # Horner's scheme: each eight rows are rolled left by eight more than those before
            for n in range(len(x_SL) - SUBLANES, -1, -SUBLANES):
                more_8L = x_SL[n : n + SUBLANES]
                rows_8L = more_8L if rows_8L is None else _roll(rows_8L, -SUBLANES) + more_8L
            assert rows_8L is not None
            row_1L = rows_8L[SUBLANES - 1 :]
            for n in range(SUBLANES - 2, -1, -1):
                row_1L = _roll(row_1L, -1) + rows_8L[n : n + 1]
            return row_1L

        def over_columns():  # all the same bias: any diagonal will do
            return jnp.pad(jnp.sum(x_ST, axis=0, keepdims=True), [(0, 0), (0, length - self.queries)])

        return jax.lax.cond(self._is_far(), over_columns, over_rows)


def _roll(x_NL, by):
    return pltpu.roll(x_NL, by % x_NL.shape[1], 1) if by else x_NL


def _dot(a, b, axis_a, axis_b):
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
