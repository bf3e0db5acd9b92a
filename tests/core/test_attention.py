"""The implementations of attention against one another: outputs and every gradient."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from repeats import fast

from t5x_lite import sharding
from t5x_lite.model import attention, flash_attention
from t5x_lite.model.attention import AttentionMask, dot_product_attention

B, T, S, H, K = 3, 5, 7, 2, 4
LIMIT = 3  # from this distance on, the bias is constant


def arrays(dtype=jnp.float32, rows=B, queries=T, keys=S, heads=H, width=K) -> tuple[jax.Array, ...]:
    random = jax.random.split(jax.random.key(0), 4)
    shapes = (rows, queries, heads, width), *[(rows, keys, heads, width)] * 2, (heads, 2 * LIMIT + 1)
    made = [jax.random.normal(key, shape) for key, shape in zip(random, shapes, strict=True)]
    made[0] *= width**-0.5
    return *(x.astype(dtype) for x in made[:3]), made[3]


OF_QUERIES = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1], [1, 2, 3, 0, 0]])
OF_KEYS = jnp.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0], [1, 2, 2, 3, 3, 0, 0]])
SEGMENTS = AttentionMask(OF_QUERIES, OF_KEYS)
PREFIX = jnp.array([[1, 1, 0, 1, 0, 0, 0], [0] * 7, [1, 1, 1, 1, 0, 0, 0]])
CASES = {
    "everything visible": (AttentionMask(), True, 0.0),
    "causal": (AttentionMask(causal=True), True, 0.0),
    "causal, later queries": (AttentionMask(offset=2, causal=True), True, 0.0),
    "prefix": (dataclasses.replace(SEGMENTS, key_prefix=PREFIX, causal=True), True, 0.0),
    "segments": (SEGMENTS, True, 0.0),
    "padding": (AttentionMask(None, OF_KEYS), True, 0.0),
    "no bias": (SEGMENTS, False, 0.0),
    "dropout": (SEGMENTS, True, 0.4),
    "window": (dataclasses.replace(SEGMENTS, window=jnp.array([2, 1])), True, 0.0),
    "window and prefix": (
        dataclasses.replace(SEGMENTS, key_prefix=PREFIX, window=jnp.array([2, 0]), causal=True),
        False,
        0.0,
        0.5,
    ),
    "softcap": (AttentionMask(causal=True), False, 0.0, 0.5),
}


def program(case, implementation, inputs, mesh=None):
    """(outputs and gradients of query, key, value and bias) of them. Queries that are padding are read by nothing."""
    attention_mask, with_bias, rate, *softcap = case
    segments = attention_mask.query_segments
    real = 1.0 if segments is None else (segments != 0)[:, :, None, None]

    def loss(query, key, value, bias):
        out = dot_product_attention(
            *(query, key, value, bias if with_bias else None, attention_mask),
            dropout_rate=rate,
            dropout_key=jax.random.key(1) if rate else None,
            softcap=softcap[0] if softcap else None,
            implementation=implementation,
        ).astype(jnp.float32)
        return jnp.sum((out * real) ** 2), out * real

    with sharding.use_mesh(mesh) if mesh else contextlib.nullcontext():
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)).lower(*inputs)


def assert_equal(a, b, inputs, atol):
    for x, y in zip(*(jax.tree.leaves(p.compile()(*inputs)) for p in (a, b)), strict=True):
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), atol=atol, rtol=atol)


@pytest.mark.parametrize("case", fast(CASES.keys(), "prefix", "causal, later queries"))
@pytest.mark.parametrize("implementation", ["blocks", "flash"])
def test_outputs_and_gradients_are_those_of_batch(case, implementation):
    inputs = arrays()
    batch, other = (program(CASES[case], i, inputs) for i in ("batch", implementation))
    assert other.as_text().count("stablehlo.while") > batch.as_text().count("stablehlo.while")  # it is another program
    assert_equal(batch, other, inputs, 1e-5)


def packed(queries: int, keys: int, causal: bool, prefix: bool) -> AttentionMask:
    """Rows of three segments; the last is padding in the second row."""
    query_segments, key_segments = (
        jnp.stack([jnp.arange(n) * 3 // n + 1, (jnp.arange(n) * 3 // n + 1) % 3]) for n in (queries, keys)
    )
    key_prefix = jax.random.randint(jax.random.key(2), (2, keys), 0, 2) if prefix else None
    return AttentionMask(query_segments, key_segments, key_prefix, causal=causal)


# Tiles of 128: several and an incomplete one of queries, of keys, and of both, whose backward pass goes over the logits
# twice; the bias within LIMIT of the diagonal and the constants beyond; tiles that are hidden as a whole.
TILED = {
    "one tile": (100, 120, packed(100, 120, False, False), True),
    "queries": (300, 100, packed(300, 100, False, False), True),
    "keys": (100, 300, packed(100, 300, True, True), True),
    "both": (300, 390, AttentionMask(), True),
    "packed": (300, 300, packed(300, 300, False, False), True),
    "causal": (300, 300, AttentionMask(causal=True), True),
    "prefix": (300, 300, packed(300, 300, True, True), True),
    "no bias": (300, 200, packed(300, 200, False, False), False),
    "later queries": (200, 300, AttentionMask(offset=100, causal=True), True),
    "window": (390, 390, AttentionMask(window=jnp.array([100, 20])), True),
    "softcap": (300, 390, AttentionMask(window=jnp.array([40, 0]), offset=90, causal=True), False, 2.0),
}


@pytest.mark.parametrize("implementation", ["blocks", "flash"])
@pytest.mark.parametrize("case", fast(TILED.keys(), "prefix"))
def test_in_tiles_of_queries_and_keys_and_groups_of_heads(case, implementation, monkeypatch):
    queries, keys, attention_mask, with_bias, *softcap = TILED[case]
    monkeypatch.setattr(flash_attention, "TILE_LOGITS", 2 * 128**2)
    monkeypatch.setattr(attention, "CPU_BLOCK", 128)
    inputs = arrays(rows=2, queries=queries, keys=keys, heads=4, width=64)  # two groups of two heads: 128 lanes each
    batch, tiled = (program((attention_mask, with_bias, 0.0, *softcap), i, inputs) for i in ("batch", implementation))
    assert_equal(batch, tiled, inputs, 2e-4)


@pytest.mark.slow
def test_flash_in_bfloat16_is_as_near_to_float32_as_batch_is():
    case = SEGMENTS, True, 0.0
    exact = jax.tree.leaves(program(case, "batch", arrays()).compile()(*arrays()))
    inputs = arrays(jnp.bfloat16)
    error = {}
    for implementation in ("batch", "flash"):
        found = jax.tree.leaves(program(case, implementation, inputs).compile()(*inputs))
        error[implementation] = [np.linalg.norm(a - b.astype(np.float32)) for a, b in zip(exact, found, strict=True)]
    assert max(error["batch"]) > 1e-3
    np.testing.assert_array_less(error["flash"], np.multiply(error["batch"], 1.5))


def on_xla(monkeypatch):
    """cuDNN's place is taken by XLA's implementation of the same JAX function, at the same arguments."""
    function = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **options):
        assert implementation == "cudnn"
        return function(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(attention, "choose", lambda wanted, *_: wanted)


@pytest.mark.parametrize(
    "case",
    fast(
        [c for c in CASES if c not in ("prefix", "causal, later queries", "window", "window and prefix", "softcap")],
        *("segments", "causal", "dropout"),
    ),
)
def test_what_cudnn_is_asked_for_is_what_batch_gives(case, monkeypatch):
    inputs = arrays(width=8)
    batch = program(CASES[case], "batch", inputs)
    on_xla(monkeypatch)
    assert_equal(batch, program(CASES[case], "cudnn", inputs), inputs, 1e-4)


def test_cudnn_tells_as_many_segments_apart_as_there_are_keys(monkeypatch):
    # Each token is a segment of its own, so each query sees its own key alone, and gives its value.
    on_xla(monkeypatch)
    segments = jnp.arange(1, 17)[None]
    query, key, value, _ = arrays(jnp.bfloat16, rows=1, queries=16, keys=16, width=8)
    found = dot_product_attention(query, key, value, None, AttentionMask(segments, segments), implementation="cudnn")
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("implementation", fast(["flash", "cudnn"], "cudnn"))
def test_on_a_mesh_each_device_has_its_rows_and_heads_and_the_bias_gradient_is_summed(implementation, monkeypatch):
    rows, heads = 4, 6
    inputs = arrays(rows=rows, heads=heads, width=8)
    segments = [jnp.concatenate([s, s[:1]]) for s in (OF_QUERIES, OF_KEYS)]
    case = AttentionMask(segments[0], segments[1]), True, 0.0
    batch = program(case, "batch", inputs)
    if implementation == "cudnn":
        on_xla(monkeypatch)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])
    spread = program(case, implementation, inputs, mesh)
    assert (
        "manual_computation" in spread.as_text() and "tensor<1x5x3x8xf32>" in spread.as_text()
    )  # rows, heads a device
    assert_equal(batch, spread, inputs, 1e-4)


def device(platform, **fields):
    return types.SimpleNamespace(platform=platform, **fields)


A100, TPU = device("gpu", compute_capability="8.0"), device("tpu")
LONG = {"queries": 512, "keys": 512, "width": 64}


@pytest.mark.parametrize(
    "on, shape, options, attention_mask, expected",
    [
        (TPU, LONG, {}, AttentionMask(), "flash"),
        (TPU, {**LONG, "queries": 114}, {}, AttentionMask(), "flash"),
        (TPU, {"queries": 114, "keys": 114, "width": 64}, {}, AttentionMask(causal=True), "batch"),  # little to gain
        (TPU, {**LONG, "queries": 1}, {}, AttentionMask(offset=5, causal=True), "batch"),  # decoding
        (TPU, {"queries": 16384, "keys": 16384, "width": 64}, {}, AttentionMask(), "flash"),
        (TPU, LONG, {"wanted": "batch"}, AttentionMask(), "batch"),
        (TPU, LONG, {"wanted": "cudnn"}, AttentionMask(), "batch"),
        (A100, LONG, {}, SEGMENTS, "cudnn"),
        (A100, LONG, {}, AttentionMask(causal=True), "cudnn"),
        (A100, LONG, {"dtype": jnp.float32}, SEGMENTS, "batch"),
        (A100, {**LONG, "queries": 1}, {}, AttentionMask(offset=5, causal=True), "batch"),
        (A100, LONG, {}, AttentionMask(offset=5, causal=True), "batch"),
        (A100, LONG, {}, dataclasses.replace(SEGMENTS, key_prefix=PREFIX, causal=True), "batch"),
        (A100, {**LONG, "keys": 511}, {}, SEGMENTS, "batch"),  # odd, with a bias
        (A100, {**LONG, "width": 128}, {}, SEGMENTS, "batch"),  # no room for the segments
        (A100, {**LONG, "width": 128}, {}, AttentionMask(), "cudnn"),
        (A100, {"queries": 16384, "keys": 16384, "width": 64}, {}, SEGMENTS, "blocks"),  # a bias of 1 GiB
        (A100, {"queries": 16384, "keys": 16384, "width": 64}, {"bias": False}, SEGMENTS, "cudnn"),
        (device("gpu", compute_capability="7.0"), LONG, {}, SEGMENTS, "batch"),
        (device("gpu", compute_capability="gfx942"), LONG, {}, SEGMENTS, "batch"),
        (device("cpu"), LONG, {}, AttentionMask(), "batch"),
        (device("cpu"), LONG, {"wanted": "flash"}, AttentionMask(), "flash"),
    ],
)
def test_implementation_is_chosen_by_platform_and_shape(on, shape, options, attention_mask, expected, monkeypatch):
    monkeypatch.setattr(sharding, "device", lambda: on)
    chosen = []

    def trace():
        query, key, _, bias = arrays(options.get("dtype", jnp.bfloat16), **shape)
        bias = bias if options.get("bias", True) else None
        chosen.append(attention.choose(options.get("wanted"), query, key, bias, attention_mask))

    jax.eval_shape(trace)
    assert chosen == [expected]


def test_heads_that_do_not_divide_over_the_mesh_fall_to_batch():
    mesh = sharding.make_mesh(data=1, tensor=4, devices=jax.devices()[:4])
    query, key, _, bias = arrays(heads=6)
    assert attention.choose("flash", query, key, bias, AttentionMask()) == "flash"
    with sharding.use_mesh(mesh):
        assert attention.choose("flash", query, key, bias, AttentionMask()) == "batch"


COMPILED = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from t5x_lite import sharding
from t5x_lite.plan import topologies
from t5x_lite.model.attention import AttentionMask, choose, dot_product_attention

topology = topologies.find(sys.argv[1])
mesh = sharding.make_mesh(data=1, devices=topology.devices[:1])
heads, width = 12, 64

def compiled(implementation, rows, queries, keys, causal, segments, with_bias):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(topology.devices[0]))

    def loss(query, key, value, bias, query_segments, key_segments):
        attention_mask = AttentionMask(query_segments, key_segments, causal=causal)
        with sharding.use_mesh(mesh):
            chosen.append(choose(implementation, query, key, bias, attention_mask))
            y = dot_product_attention(query, key, value, bias, attention_mask, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    arrays = [
        array(rows, queries, heads, width), *[array(rows, keys, heads, width)] * 2,
        array(heads, 257, dtype=jnp.float32) if with_bias else None,
        *([array(rows, n, dtype=jnp.int32) for n in (queries, keys)] if segments else (None, None)),
    ]
    chosen = []
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3) if with_bias else (0, 1, 2)))
    program = gradient.lower(*arrays).compile(compiler_options=topology.compiler_options)
    logits = program.as_text().count(f"{rows},{heads},{queries},{keys}]")
    return chosen[0], program.memory_analysis().temp_size_in_bytes, logits

of_shape = {
    str(shape): [compiled(implementation, *shape) for implementation in (None, "batch")]
    for shape in (
        (32, 512, 512, False, True, True), (32, 512, 512, True, True, True), (32, 114, 512, False, True, False),
        (32, 600, 1000, True, False, True), (4, 2048, 2048, True, True, True),
    )
}
long = [compiled(sys.argv[2], 2, 16384, 16384, causal, True, True) for causal in (False, True)]
print(json.dumps([of_shape, long]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, fused, for_long, module",
    [
        ("v4:2x2x1", "flash", "flash", "libtpu"),
        ("v5e:1x1", "flash", "flash", "libtpu"),
        ("v6e:1x1", "flash", "flash", "libtpu"),
        ("h100:1", "cudnn", "blocks", "jax_plugins.xla_cuda13"),
    ],
)
def test_compiled_for_a_chip_the_fused_form_has_no_array_of_the_logits(topology, fused, for_long, module):
    """Compiled, not run: none of the chips is here."""
    if importlib.util.find_spec(module.partition(".")[0]) is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module} to compile for {topology}")
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")}
    command = [sys.executable, "-c", COMPILED, topology, for_long]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    of_shape, long = json.loads(done.stdout.splitlines()[-1])
    assert len(of_shape) == 5
    for shape, ((chosen, temporaries, logits), (_, in_batch, logits_in_batch)) in of_shape.items():
        assert chosen == fused and not logits and logits_in_batch, shape
        assert temporaries < 0.6 * in_batch, shape
    for name, temporaries, logits in long:  # queries, keys and values take 0.14 GiB, logits would take 24
        assert name == for_long and not logits and temporaries < 2**30


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("case", ["everything visible", "causal", "segments", "padding", "no bias", "dropout"])
def test_on_a_gpu_cudnn_is_as_near_to_float32_as_batch_is(case):
    query_segments, key_segments = (jnp.pad(s, ((0, 0), (0, 1)), mode="edge") for s in (OF_QUERIES, OF_KEYS))
    attention_mask, with_bias, rate = CASES[case]
    if attention_mask.key_segments is not None:
        attention_mask = AttentionMask(
            query_segments if attention_mask.query_segments is not None else None, key_segments
        )
    shape = {"queries": 6, "keys": 8, "width": 64}
    in_float32, inputs = arrays(**shape), arrays(jnp.bfloat16, **shape)
    fused = program((attention_mask, with_bias, rate), "cudnn", inputs)
    assert "cudnn$fmha" in fused.as_text()
    exact, found, of_batch = (
        jax.tree.leaves(p.compile()(*x))
        for p, x in (
            (program((attention_mask, with_bias, rate), "batch", in_float32), in_float32),
            (fused, inputs),
            (program((attention_mask, with_bias, rate), "batch", inputs), inputs),
        )
    )
    for a, b, c in zip(exact, found, of_batch, strict=True):
        error = np.abs(np.asarray(a) - np.asarray(c, np.float32)).max()
        np.testing.assert_allclose(a, np.asarray(b, np.float32), atol=4 * error + 1e-2)


def test_attention_is_softmax_of_unscaled_products_and_bias():
    query, key, value, by_distance = (np.asarray(x, np.float64) for x in arrays())
    distance = np.arange(S) - np.arange(T)[:, None]
    bias = by_distance[:, np.clip(distance, -LIMIT, LIMIT) + LIMIT]
    logits = np.einsum("bthk,bshk->bhts", query, key) + bias
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshk->bthk", weights, value)
    np.testing.assert_allclose(
        dot_product_attention(*arrays()[:4], attention_mask=AttentionMask()), expected, atol=1e-5
    )
