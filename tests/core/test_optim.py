"""optim.py against T5X's numbers, against the formulas in NumPy float64, and layer stacks against single layers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite.training import optim


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def run(transform: optax.GradientTransformation, params, grads, rates):
    """Parameters after each gradient, the transform being told the learning rate as the training step tells it."""
    transform = optax.with_extra_args_support(transform)

    @jax.jit
    def step(params, state, grad, rate):
        updates, state = transform.update(grad, state, params, learning_rate=rate)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state

    state, history = jax.jit(transform.init)(params), []
    for grad, rate in zip(grads, rates, strict=True):
        params, state = step(params, state, grad, rate)
        history.append(params)
    return history, state


# Adafactor


def test_golden_adafactor_five_steps(golden):
    arrays = np.load(golden("adafactor.npz"))
    notes = json.loads(golden("adafactor.json").read_text())
    rates = notes["learning_rates"]
    names = ("matrix_factored", "vector")
    transform = optim.adafactor(**{k: v for k, v in notes["settings"].items() if k in optim.adafactor.__annotations__})
    init = {name: jnp.asarray(arrays[f"init/{name}"]) for name in names}
    grads = [{name: jnp.asarray(arrays[f"grad{i}/{name}"]) for name in names} for i in range(5)]
    history, _ = run(transform, init, grads, rates)
    for step, params in enumerate(history, start=1):
        for name in names:
            expected = arrays[f"t5x_step{step}/{name}"]
            np.testing.assert_allclose(params[name], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    (*_, unfactored), _ = run(optim.adafactor(min_dim_size_to_factor=131), init, grads, rates)
    assert not np.allclose(unfactored["matrix_factored"], arrays["t5x_step5/matrix_factored"], rtol=1e-3, atol=1e-5)


def adafactor_by_definition(param, grads, rates, *, factored, beta1=None, clip=1.0):
    """T5X's formulas in float64, without its code's arrangement."""
    param = np.asarray(param, np.float64)
    v_row = v_col = v = m = 0.0
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        grad = np.asarray(grad, np.float64)
        beta2 = 1 - t**-0.8
        squared = grad**2 + 1e-30
        if factored:
            v_row = beta2 * v_row + (1 - beta2) * squared.mean(1)
            v_col = beta2 * v_col + (1 - beta2) * squared.mean(0)
            step = grad / np.sqrt(np.outer(v_row, v_col) / v_row.mean())
        else:
            v = beta2 * v + (1 - beta2) * squared
            step = grad / np.sqrt(v)
        step /= max(1, np.sqrt((step**2).mean()) / clip)
        step *= rate * max(1e-3, np.sqrt((param**2).mean()))
        if beta1 is not None:
            step = m = beta1 * m + (1 - beta1) * step
        param = param - step
    return param


@pytest.mark.parametrize("beta1", [None, 0.7])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (3, 9), (6,)])
def test_adafactor_by_definition(shape, beta1):
    param, rates = normal(0, *shape), [0.1, 0.03, 0.2]
    grads = [normal(i, *shape) * 10**i for i in (1, 2, 3)]
    factored = len(shape) == 2 and min(shape) >= 4
    options = {"factored": factored, "beta1": beta1, "clip": 0.9}
    transform = optim.adafactor(min_dim_size_to_factor=4, beta1=beta1, clipping_threshold=0.9)
    (*_, got), state = run(transform, param, grads, rates)
    expected = adafactor_by_definition(param, grads, rates, **options)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    assert state.v.shape == ((1,) if factored else shape)
    for other in ({"beta1": 0.5}, {"clip": 0.5}, {"factored": not factored} if len(shape) == 2 else {"clip": 0.7}):
        assert np.abs(adafactor_by_definition(param, grads, rates, **options | other) - expected).max() > 1e-4


def test_adafactor_first_step_by_hand():
    """At t = 1 beta2 is 0: a vector moves by the sign of its gradient times its RMS, or 1e-3 if that is larger."""
    params = {"large": jnp.asarray([3.0, -4.0]), "small": jnp.asarray([1e-4, 0.0, 0.0])}
    grads = {"large": jnp.asarray([0.5, 20.0]), "small": jnp.asarray([-1.0, 2.0, 3.0])}
    transform = optim.adafactor()
    steps, state = transform.update(grads, transform.init(params), params)
    np.testing.assert_allclose(steps["large"], np.sqrt(12.5) * np.asarray([-1, -1]), rtol=1e-6)
    np.testing.assert_allclose(steps["small"], 1e-3 * np.asarray([1, -1, -1]), rtol=1e-6)
    assert state.count == 1
    unscaled = optim.adafactor(multiply_by_parameter_scale=False)
    np.testing.assert_allclose(unscaled.update(grads, unscaled.init(params), params)[0]["large"], [-1, -1], rtol=1e-6)


def test_adafactor_step_offset_restarts_the_decay():
    param, grads = normal(0, 3), [normal(1, 3), normal(2, 3)]
    late = optim.adafactor(step_offset=5)
    state = late.init(param)._replace(count=jnp.int32(5))
    early = optim.adafactor()
    reference = early.init(param)
    plain = state
    for grad in grads:
        got, state = late.update(grad, state, param)
        expected, reference = early.update(grad, reference, param)
        without, plain = early.update(grad, plain, param)
        np.testing.assert_array_equal(got, expected)
    assert not np.allclose(without, got)


@pytest.mark.parametrize(
    "transform",
    [optim.adafactor(min_dim_size_to_factor=4), optim.adafactor(beta1=0.6), optim.adamw(weight_decay=0.1)],
    ids=["adafactor_factored", "adafactor_momentum", "adamw"],
)
def test_stack_equals_separate_layers(transform):
    """Two layers, the second 100 times the first: stacked under `layers`, apart, and stacked under another name."""

    def tree(seed: int):
        size = np.asarray([1.0, 100.0], np.float32)
        stack = {"kernel": normal(seed, 2, 5, 7) * size[:, None, None], "scale": normal(seed + 1, 2, 3) * size[:, None]}
        apart = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(2)]
        return {"encoder": {"layers": {"mlp": stack}}, "apart": apart, "naive": stack}

    (*_, after), _ = run(transform, tree(0), [tree(10), tree(20), tree(30)], [0.1, 0.2, 0.05])
    for name in ("kernel", "scale"):
        for i, layer in enumerate(after["apart"]):
            np.testing.assert_array_equal(after["encoder"]["layers"]["mlp"][name][i], layer[name])
            assert not np.allclose(after["naive"][name][i], layer[name], rtol=1e-3)


def test_adafactor_state_shapes_and_paths():
    """Shapes of real kernels without making them; what has a parameter's shape ends in the parameter's path."""
    params = {
        "token_embedder": {"embedding": jax.ShapeDtypeStruct((32128, 512), jnp.float32)},
        "encoder": {
            "layers": {
                "query": {"kernel": jax.ShapeDtypeStruct((8, 512, 384), jnp.float32)},
                "norm": {"scale": jax.ShapeDtypeStruct((8, 512), jnp.float32)},
            },
            "relpos_bias": {"rel_embedding": jax.ShapeDtypeStruct((6, 32), jnp.float32)},
        },
    }
    state = jax.eval_shape(optim.adafactor().init, params)
    layers = "encoder", "layers"

    def shapes(*path: str):
        out = []
        for tree in (state.v_row, state.v_col, state.v, state.m):
            for key in path:
                tree = tree[key]
            out.append(tree.shape)
        return out

    assert shapes("token_embedder", "embedding") == [(512,), (32128,), (1,), (1,)]
    assert shapes(*layers, "query", "kernel") == [(8, 384), (8, 512), (1,), (1,)]
    assert shapes(*layers, "norm", "scale") == [(1,), (1,), (8, 512), (1,)]
    assert shapes("encoder", "relpos_bias", "rel_embedding") == [(1,), (1,), (6, 32), (1,)]

    clipped = optim.make_optimizer(optim.adafactor(beta1=0.9), optim.constant(1.0), clip_norm=1.0)
    with_momentum = jax.eval_shape(clipped.transform.init, params)
    found = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(with_momentum)}
    for path, param in jax.tree.leaves_with_path(params):
        suffix = jax.tree_util.keystr(path)
        assert param.shape in [shape for name, shape in found.items() if name.endswith(suffix)]


def test_init_under_jit_with_shardings():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = {"layers": {"kernel": jnp.ones((2, 5, 7))}}
    transform = optim.adafactor(min_dim_size_to_factor=4)
    shardings = jax.tree.map(lambda _: replicated, jax.eval_shape(transform.init, params))
    state = jax.jit(transform.init, out_shardings=shardings)(params)
    assert all(leaf.sharding == replicated for leaf in jax.tree.leaves(state))


def test_adafactor_accepts_bfloat16_gradients_and_keeps_float32_state():
    param, grad = normal(0, 5, 7), normal(1, 5, 7).astype(jnp.bfloat16)
    transform = optim.adafactor(min_dim_size_to_factor=4)
    steps, state = transform.update(grad, transform.init(param), param)
    expected, _ = transform.update(grad.astype(jnp.float32), transform.init(param), param)
    np.testing.assert_array_equal(steps, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_adafactor_refuses_missing_arguments():
    param = jnp.ones(3)
    plain, momentum = optim.adafactor(), optim.adafactor(beta1=0.9)
    with pytest.raises(ValueError, match="needs the parameters"):
        plain.update(param, plain.init(param))
    with pytest.raises(ValueError, match="needs the learning rate"):
        momentum.update(param, momentum.init(param), param)


# AdamW and clipping


def test_adamw_by_hand():
    """After one step of Adam every entry has moved by its gradient's sign: times the RMS, plus decay of matrices."""
    params = {"kernel": jnp.asarray([[3.0, -4.0], [0.0, 5.0]]), "scale": jnp.asarray([2.0, 2.0, 2.0])}
    grads = {"kernel": jnp.asarray([[1.0, -2.0], [3.0, 4.0]]), "scale": jnp.asarray([-1.0, 5.0, 6.0])}
    transform = optim.adamw(weight_decay=0.1)
    steps, _ = transform.update(grads, transform.init(params), params)
    sign = np.asarray([[1, -1], [1, 1]])
    np.testing.assert_allclose(steps["kernel"], -np.sqrt(12.5) * sign - 0.1 * params["kernel"], rtol=1e-4)
    np.testing.assert_allclose(steps["scale"], 2.0 * np.asarray([1, -1, -1]), rtol=1e-4)
    plain = optim.adamw(rms_scaling=False)
    np.testing.assert_allclose(plain.update(grads, plain.init(params), params)[0]["kernel"], -sign, rtol=1e-4)


def test_adamw_small_parameters_still_move():
    params, grads = jnp.zeros(3), jnp.ones(3)
    transform = optim.adamw()
    np.testing.assert_allclose(transform.update(grads, transform.init(params), params)[0], -1e-3, rtol=1e-4)


def test_muon_orthogonalises_each_matrix_in_layers_and_leaves_the_rest_to_adamw():
    params = {
        "layers": {"kernel": normal(0, 2, 5, 7) * np.asarray([1.0, 100.0])[:, None, None], "scale": normal(1, 2, 5)},
        "embedding": normal(2, 9, 5),
    }
    grads = {"layers": {"kernel": normal(3, 2, 5, 7), "scale": normal(4, 2, 5)}, "embedding": normal(5, 9, 5)}
    transform, plain = optim.muon(), optim.adamw()
    steps, _ = transform.update(grads, transform.init(params), params)
    expected, _ = plain.update(grads, plain.init(params), params)
    for layer in range(2):
        step, param = np.asarray(steps["layers"]["kernel"][layer]), np.asarray(params["layers"]["kernel"][layer])
        left, _, right = np.linalg.svd(np.asarray(grads["layers"]["kernel"][layer]), full_matrices=False)
        along = left.T @ -step @ right.T / (np.sqrt(7) * np.sqrt(np.mean(param**2)))
        assert np.all((np.diag(along) > 0.6) & (np.diag(along) < 1.3))  # Newton-Schulz stops there
        np.testing.assert_allclose(along, np.diag(np.diag(along)), atol=1e-4)
    np.testing.assert_array_equal(steps["layers"]["scale"], expected["layers"]["scale"])
    np.testing.assert_array_equal(steps["embedding"], expected["embedding"])
    assert not np.allclose(steps["layers"]["kernel"], expected["layers"]["kernel"], rtol=0.1)


def test_clipping_by_global_norm():
    params = {"a": jnp.asarray([1.0]), "b": jnp.asarray([1.0, 1.0])}
    grads = {"a": jnp.asarray([3.0]), "b": jnp.asarray([0.0, 4.0])}  # norm 5
    for clip_norm, factor in ((1.0, 0.2), (10.0, 1.0), (None, 1.0)):
        transform = optim.make_optimizer(optax.scale(-1.0), optim.constant(1.0), clip_norm).transform
        steps, _ = transform.update(grads, transform.init(params), params)
        np.testing.assert_allclose(steps["b"], [0.0, -4.0 * factor], rtol=1e-6)


# Schedules


@pytest.mark.parametrize(
    ("key", "schedule"),
    [
        ("pretrain (constant*rsqrt_decay, base 1.0, warmup 10000)", optim.rsqrt_decay()),
        ("finetune (constant 0.001)", optim.constant(0.001)),
        ("t5x default (constant*linear_warmup*rsqrt_decay, 0.5, 1000)", optim.warmup_rsqrt_decay()),
    ],
)
def test_golden_schedules(golden, key, schedule):
    data = json.loads(golden("training.json").read_text())["learning_rate"]
    got = [schedule(step) for step in data["steps"]]
    np.testing.assert_allclose(got, data[key], rtol=2e-7)


def test_schedules_by_hand():
    half = 0.5
    for schedule, expected in (
        (optim.rsqrt_decay(2.0, 4), {0: 1.0, 4: 1.0, 16: half}),
        (optim.warmup_rsqrt_decay(2.0, 4), {0: 1e-8, 2: half, 4: 1.0, 16: half}),
        (optim.constant(half, warmup_steps=4), {0: 1e-8, 1: 0.125, 4: half, 99: half}),
        (optim.linear(1.0, 2, 10), {0: 1e-8, 1: half, 2: 1.0, 6: half, 10: 1e-8, 99: 1e-8}),
        (optim.linear(1.0, 0, 10, final=0.2), {0: 1.0, 5: 0.6, 10: 0.2, 99: 0.2}),
        (optim.cosine(1.0, 2, 10), {1: half, 2: 1.0, 4: (1 + np.sqrt(half)) / 2, 6: half, 10: 1e-8}),
        (optim.cosine(1.0, 0, 8, final=0.2), {0: 1.0, 4: 0.6, 8: 0.2, 99: 0.2}),
    ):
        for step, value in expected.items():
            for n in (step, jnp.int32(step)):
                rate = jax.jit(schedule)(n)
                assert rate.dtype == jnp.float32
                assert rate.shape == ()
                np.testing.assert_allclose(rate, value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: optim.adafactor(decay_rate=0.0), r"adafactor\.decay_rate .* 0\.0"),
        (lambda: optim.adafactor(clipping_threshold=-1.0), r"adafactor\.clipping_threshold .* -1\.0"),
        (lambda: optim.adafactor(min_dim_size_to_factor=0), r"adafactor\.min_dim_size_to_factor .* 0"),
        (lambda: optim.adafactor(beta1=1.0), r"adafactor\.beta1 .* 1\.0"),
        (lambda: optim.adafactor(step_offset=-2), r"adafactor\.step_offset .* -2"),
        (lambda: optim.adamw(b2=1.5), r"adamw\.b2 .* 1\.5"),
        (lambda: optim.muon(momentum=1.0), r"muon\.momentum .* 1\.0"),
        (lambda: optim.adamw(weight_decay=-0.1), r"adamw\.weight_decay .* -0\.1"),
        (lambda: optim.make_optimizer(optim.adamw(), optim.constant(1.0), 0.0), r"clip_norm .* 0\.0"),
        (lambda: optim.rsqrt_decay(warmup_steps=0), r"rsqrt_decay\.warmup_steps .* 0"),
        (lambda: optim.constant(0.0), r"constant\.value .* 0\.0"),
        (lambda: optim.linear(1.0, 10, 10), r"linear\.total_steps .* warmup_steps = 10, got 10"),
        (lambda: optim.cosine(1.0, 1, 10, final=2.0), r"cosine\.final .* base = 1\.0, got 2\.0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
