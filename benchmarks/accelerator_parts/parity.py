"""Part 2: every attention implementation against XLA's in float32, and three optimizer steps against a CPU's.

An error is |a - b| / |b|, norms over a whole array, of the output and of the gradients of query, key, value and bias.
bfloat16 is compared with float32 at the same, rounded arguments.
"""

import dataclasses
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator_parts import three_steps
from benchmarks.accelerator_parts.child import Item, Settings, describe
from t5x_lite.model import attention, kernel_checks
from t5x_lite.model.attention import AttentionMask, Implementation, dot_product_attention

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
ARRAYS = ("output", "query", "key", "value", "bias")
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


@dataclasses.dataclass(frozen=True)
class Case:
    """The features of one attention call: bias, masks and dropout."""

    bias: bool = True
    segments: bool = True
    causal: bool = False
    prefix: bool = False
    dropout: float = 0.0


CASES = {
    "bias": Case(segments=False),
    "segments": Case(),
    "no bias": Case(bias=False),
    "causal": Case(causal=True),
    "prefix": Case(causal=True, prefix=True),
    "dropout": Case(dropout=0.3),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """lengths: of queries and keys. cases: names of CASES."""

    lengths: tuple[tuple[int, int], ...]
    cases: tuple[str, ...] = tuple(CASES)
    batch: int = 4
    heads: int = 8
    head_dim: int = 64


SIZES = (
    Sizes(((512, 512), (114, 114), (114, 512), (113, 113), (113, 511))),
    Sizes(((2048, 2048), (8192, 8192)), ("segments", "prefix"), batch=1),
)
TOY = (Sizes(((17, 17),), ("prefix",), batch=2, heads=2, head_dim=8),)


def items(settings: Settings) -> list[Item]:
    return three_steps.items(settings.toy) + [
        Item(f"{queries} x {keys}, {name}", functools.partial(compare, sizes, queries, keys, case))
        for sizes in (TOY if settings.toy else SIZES)
        for queries, keys in sizes.lengths
        for name, case in ((name, CASES[name]) for name in sizes.cases)
        if queries == keys or not case.causal  # T5's causal attention is within one sequence
    ]


def compare(sizes: Sizes, queries: int, keys: int, case: Case) -> dict[str, Any]:
    """Returns the errors of each implementation and dtype; `ok` is false if one is above its tolerance."""
    inputs = {dtype: random_inputs(sizes, queries, keys, case, dtype) for dtype in TOLERANCE}
    programs = [(name, dtype) for dtype in TOLERANCE for name in IMPLEMENTATIONS]
    references = [("batch", f"reference of {dtype}") for dtype in TOLERANCE]

    def run(program: tuple[Implementation, str]) -> list[np.ndarray] | str:
        name, dtype = program
        args, attention_mask, cotangent = inputs[dtype.removeprefix("reference of ")]
        if dtype.startswith("reference"):
            args = [None if x is None else x.astype(jnp.float32) for x in args]
        try:
            return outputs_and_gradients(name, args, attention_mask, cotangent, case.dropout)
        except Exception as error:
            return describe(error)

    with ThreadPoolExecutor(min(len(programs), os.cpu_count() or 1)) as threads:  # most of the time is compiling
        arrays = dict(zip([*references, *programs], threads.map(run, [*references, *programs]), strict=True))
    results: dict[str, Any] = {}
    for name, dtype in programs:
        values, expected = arrays[name, dtype], arrays["batch", f"reference of {dtype}"]
        if isinstance(expected, str):
            raise RuntimeError(f"the reference: {expected}")
        if isinstance(values, str):
            results[f"{name}, {dtype}"] = values if values == NOT_AVAILABLE else {"error": values, "ok": False}
            continue
        errors = {
            array: relative_error(x, y) for array, x, y in zip(ARRAYS[: len(values)], values, expected, strict=True)
        }
        ok = all(error <= TOLERANCE[dtype] for error in errors.values())  # false where one is NaN
        results[f"{name}, {dtype}"] = errors | {"ok": ok}
    verdicts = [result["ok"] for result in results.values() if isinstance(result, dict)]
    return {"tolerance": TOLERANCE, "errors": results, "ok": all(verdicts)}


NOT_AVAILABLE = "not available"


def random_inputs(
    sizes: Sizes, queries: int, keys: int, case: Case, dtype: str
) -> tuple[list[Any], AttentionMask, Any]:
    """Returns [query, key, value, bias], what is visible, and the cotangent, which is 0 where a query is padding."""
    random = np.random.default_rng(queries * 1000 + keys)
    B, H, K = sizes.batch, sizes.heads, sizes.head_dim
    shapes = ((B, queries, H, K), (B, keys, H, K), (B, keys, H, K), (H, 257), (B, queries, H, K))
    query, key, value, bias, cotangent = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    args = [jnp.asarray(x, dtype) for x in (query * K**-0.5, key, value)] + [jnp.asarray(bias) if case.bias else None]
    if not case.segments:
        return args, AttentionMask(causal=case.causal), jnp.asarray(cotangent)
    query_segments = segments(random, B, queries)
    # Within a sequence both sides are the same; across, each side has every segment: so every query sees a key, for
    # what one gets that sees none is not defined.
    key_segments = query_segments if queries == keys else segments(random, B, keys)
    prefix = None
    if case.prefix:
        prefix = jnp.tile((jnp.arange(keys) < keys // 4).astype(jnp.int32), (B, 1))
    attention_mask = AttentionMask(jnp.asarray(query_segments), jnp.asarray(key_segments), prefix, causal=case.causal)
    return args, attention_mask, jnp.asarray(cotangent * (query_segments != 0)[:, :, None, None])


def segments(random: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Three segments of random lengths, of which each row has all, and then padding."""
    ends = np.stack([np.sort(random.choice(np.arange(1, length), 3, replace=False)) for _ in range(rows)])
    position = np.arange(length)
    numbers = 1 + (position >= ends[:, :1]).astype(np.int32) + (position >= ends[:, 1:2])
    return np.where(position >= ends[:, 2:], 0, numbers).astype(np.int32)


def outputs_and_gradients(
    name: Implementation, args: list[Any], attention_mask: AttentionMask, cotangent: jax.Array, dropout: float
) -> list[np.ndarray] | str:
    """Returns the output and all gradients; NOT_AVAILABLE where another implementation would take its place."""
    on_cpu = jax.default_backend() == "cpu"  # where the TPU's kernel is interpreted, slowly: at toy sizes only
    if name == "flash" and jax.default_backend() != "tpu" and not on_cpu:
        return NOT_AVAILABLE
    if attention.choose(name, args[0], args[1], args[3], attention_mask) != name:
        return NOT_AVAILABLE

    def loss(args: list[Any], attention_mask: AttentionMask, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        query, key, value, bias = args
        y = dot_product_attention(
            *(query, key, value, bias, attention_mask),
            dropout_rate=dropout,
            dropout_key=jax.random.key(0) if dropout else None,
            implementation=name,
        )
        return jnp.sum(y.astype(jnp.float32) * cotangent), y * (cotangent != 0)

    with jax.default_matmul_precision("highest"):
        gradient = jax.jit(jax.grad(loss, has_aux=True)).lower(args, attention_mask, cotangent)
    gradients, y = gradient.compile(compiler_options=kernel_checks.UNTUNED)(args, attention_mask, cotangent)
    return [np.asarray(x, np.float32) for x in (y, *gradients) if x is not None]


def relative_error(x: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm((x - expected).ravel()) / max(np.linalg.norm(expected.ravel()), 1e-30))
