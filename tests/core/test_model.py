"""The model against Hugging Face and T5X (goldens), against published sizes, and against itself."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from repeats import fast

from benchmarks.train_step import model_config
from t5x_lite.model.attention import AttentionMask
from t5x_lite.model.layers import project, relative_position_bucket
from t5x_lite.model.t5 import T5
from t5x_lite.t5_model import T5Model

# Of the released checkpoints. T5: formula, transformers and T5X agree; others: transformers 5.23, with the output layer
# that its config ties from version 5 on counted for those whose checkpoints have one.
PARAMETERS = {
    "t5_1_0/small": 60_506_624,
    "t5_1_0/base": 222_903_552,
    "t5_1_0/large": 737_668_096,
    "t5_1_0/3B": 2_851_598_336,
    "t5_1_0/11B": 11_307_321_344,
    "t5_1_1/small": 76_961_152,
    "t5_1_1/base": 247_577_856,
    "t5_1_1/large": 783_150_080,
    "t5_1_1/xl": 2_849_757_184,
    "t5_1_1/xxl": 11_135_332_352,
    "byt5/base": 581_653_248,
    "byt5/large": 1_228_183_552,
    "byt5/small": 299_637_760,
    "byt5/xl": 3_737_801_728,
    "byt5/xxl": 12_906_899_328,
    "codet5p/220M": 222_882_048,
    "codet5p/770M": 737_639_424,
    "mt5/base": 582_401_280,
    "mt5/large": 1_229_581_312,
    "mt5/small": 300_176_768,
    "mt5/xl": 3_742_619_648,
    "mt5/xxl": 12_921_057_280,
    "t5_efficient/mini": 31_220_480,
    "t5_efficient/tiny": 15_570_688,
    "ul2/20B": 19_591_209_984,
    "umt5/base": 592_043_520,
    "umt5/small": 306_601_984,
    "umt5/xl": 3_768_356_864,
    "umt5/xxl": 12_972_531_712,
}

ENCODER_INPUT = jnp.array([[7, 8, 9, 10, 11, 12, 1], [5, 6, 1, 0, 0, 0, 0]])
DECODER_INPUT = jnp.array([[0, 21, 22, 23, 24], [0, 25, 26, 0, 0]])


init = functools.cache(tiny.random_params)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, *inputs):
    return T5(config).apply({"params": params}, *inputs)


def logits(config, params, *inputs):
    return np.asarray(_logits(config, params, *inputs))


@pytest.mark.parametrize("size", fast(PARAMETERS.keys(), "t5_1_0/3B", "umt5/xxl"))
def test_published_sizes_have_their_exact_parameter_counts(size):
    token = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: T5(model_config(size)).init(jax.random.key(0), token, token))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS[size]


def test_logits_agree_with_hugging_face(golden_t5):
    io, params, config = golden_t5.io, golden_t5.params, golden_t5.config
    got = logits(config, params, io["input_ids"] * io["attention_mask"], io["decoder_input_ids"])
    real = io["targets"] != 0
    np.testing.assert_allclose(got[real], io["logits"][real], atol=1e-4)
    assert np.abs(io["logits"][real]).max() > 1  # an all-zero model would not pass


def test_packed_logits_agree_with_t5x(golden_t5):
    io = {name.removeprefix("packed_"): value for name, value in golden_t5.io.items() if name.startswith("packed_")}
    tokens = io["encoder_input_tokens"], io["decoder_input_tokens"]
    segments = io["encoder_segment_ids"], io["decoder_segment_ids"]
    real = io["decoder_target_tokens"] != 0
    got = logits(golden_t5.config, golden_t5.params, *tokens, *segments)
    np.testing.assert_allclose(got[real], io["t5x_logits"][real], atol=1e-4)
    unpacked = logits(golden_t5.config, golden_t5.params, *tokens)
    assert np.abs(unpacked - got)[real].max() > 1e-2  # the segment ids matter


@pytest.mark.slow
def test_packed_examples_do_not_see_each_other():
    params = init(tiny.CONFIG)
    separate = logits(tiny.CONFIG, params, ENCODER_INPUT, DECODER_INPUT)
    row = lambda a, b, fill: jnp.array([[*np.asarray(a), *np.asarray(b), fill]])  # noqa: E731
    got = logits(
        tiny.CONFIG,
        params,
        row(ENCODER_INPUT[1, :3], ENCODER_INPUT[0], 0),
        row(DECODER_INPUT[1, :3], DECODER_INPUT[0], 0),
        row([1] * 3, [2] * 7, 0),
        row([1] * 3, [2] * 5, 0),
    )
    np.testing.assert_allclose(got[0, :3], separate[1, :3], atol=1e-4)
    np.testing.assert_allclose(got[0, 3:8], separate[0], atol=1e-4)


def test_gradients_show_that_a_target_sees_all_inputs_and_no_later_target():
    params = init(tiny.CONFIG)
    model = T5(tiny.CONFIG)

    def one_logit(embedded):
        table = params["token_embedder"] | {"embedding": embedded}
        tokens = jnp.array([[2, 3, 4, 0]]), jnp.array([[5, 6, 7]])
        return model.apply({"params": params | {"token_embedder": table}}, *tokens)[0, 1].sum()

    seen = np.abs(jax.jit(jax.grad(one_logit))(params["token_embedder"]["embedding"])).sum(axis=-1) > 0
    assert seen[[2, 3, 4, 5, 6]].all()
    assert not seen[[0, 7]].any()  # padding of the inputs, and the target after it


@pytest.mark.parametrize(
    "change",
    [
        {"scan_layers": False},
        *(pytest.param({"remat": remat}, marks=pytest.mark.slow) for remat in ("full", "none")),
    ],
)
def test_scan_and_remat_change_the_program_but_not_the_gradients(change):
    params = init(tiny.SMALL)
    other = dataclasses.replace(tiny.SMALL, **change)

    def program(config):
        def loss(params):
            return jnp.mean(jnp.square(T5(config).apply({"params": params}, None, DECODER_INPUT)))

        return jax.jit(jax.grad(loss)).lower(params)

    plain, changed = program(tiny.SMALL), program(other)
    assert plain.as_text() != changed.as_text()
    if "scan_layers" in change:
        assert "stablehlo.while" in plain.as_text() and "stablehlo.while" not in changed.as_text()
    for a, b in zip(jax.tree.leaves(plain.compile()(params)), jax.tree.leaves(changed.compile()(params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_logits():
    config = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    params = init(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    exact, rounded = (
        logits(tiny.CONFIG, params, ENCODER_INPUT, DECODER_INPUT),
        logits(config, params, ENCODER_INPUT, DECODER_INPUT),
    )
    assert rounded.dtype == np.float32
    assert 1e-5 < np.abs(exact - rounded).max() / np.abs(exact).max() < 5e-2
    encoded = jax.eval_shape(lambda: T5(config).apply({"params": params}, ENCODER_INPUT, method=T5.encode))
    assert encoded.dtype == jnp.bfloat16


def test_a_kernels_gradient_is_summed_in_float32_and_rounded_to_the_dtype_of_activations():
    random = np.random.default_rng(0)
    x, d_y = (jnp.asarray(random.standard_normal((40, 13)), jnp.bfloat16) for _ in range(2))
    kernel = jnp.asarray(random.standard_normal((13, 13)), jnp.float32)
    _, backward = jax.vjp(lambda kernel: project(x, kernel, jnp.dtype("bfloat16")), kernel)
    (gradient,) = backward(d_y)
    exact = np.asarray(x, np.float64).T @ np.asarray(d_y, np.float64)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, jnp.asarray(exact, jnp.bfloat16).astype(jnp.float32))


def test_tied_output_is_the_embedding_scaled_by_the_root_of_d_model():
    config = dataclasses.replace(tiny.CONFIG, tie_embeddings=True, mlp_activations=("relu",))
    params = init(config)
    assert "logits_dense" not in params["decoder"] and "wi" in params["encoder"]["layers"]["mlp"]
    kernel = params["token_embedder"]["embedding"].T / np.sqrt(config.d_model)
    untied = dataclasses.replace(config, tie_embeddings=False)
    params_untied = params | {"decoder": params["decoder"] | {"logits_dense": {"kernel": kernel}}}
    np.testing.assert_allclose(
        logits(config, params, ENCODER_INPUT, DECODER_INPUT),
        logits(untied, params_untied, ENCODER_INPUT, DECODER_INPUT),
        atol=1e-5,
    )


def test_dropout_needs_train_and_depends_on_its_key():
    config = dataclasses.replace(tiny.SMALL, dropout_rate=0.5)
    params = init(config)

    @jax.jit
    def dropped(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return T5(config, train=True).apply({"params": params}, None, DECODER_INPUT, rngs=rngs)

    assert np.array_equal(dropped(0), dropped(0))
    assert not np.allclose(dropped(0), dropped(1))
    evaluated = logits(config, params, None, DECODER_INPUT)
    assert np.array_equal(evaluated, logits(tiny.SMALL, params, None, DECODER_INPUT))


def test_initialisation_has_t5x_scales():
    config = dataclasses.replace(tiny.CONFIG, d_model=64, head_dim=16, num_heads=4, d_ff=96, vocab_size=512)
    params = nn.unbox(jax.jit(T5Model(config).init)(jax.random.key(0)))
    attention = params["encoder"]["layers"]["attention"]
    np.testing.assert_allclose(np.std(params["token_embedder"]["embedding"]), 1.0, rtol=0.05)
    np.testing.assert_allclose(np.std(attention["key"]["kernel"]), 64**-0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(attention["query"]["kernel"]), (64 * 16) ** -0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(params["encoder"]["layers"]["mlp"]["wo"]["kernel"]), 96**-0.5, rtol=0.05)
    first, second = attention["key"]["kernel"]
    assert not np.allclose(first, second)  # each layer of a stack has numbers of its own


@pytest.mark.parametrize(
    "bidirectional, first_distances",
    [
        (True, {8: 8, 9: 12, 10: 16, 11: 23, 12: 32, 13: 46, 14: 64, 15: 91}),
        (False, {16: 16, 17: 19, 18: 21, 19: 24, 20: 27, 25: 52, 30: 99, 31: 113}),
    ],
)
def test_relative_position_buckets_begin_where_t5_has_them(bidirectional, first_distances):
    back = np.asarray(relative_position_bucket(-jnp.arange(600), bidirectional=bidirectional))
    for bucket, distance in first_distances.items():
        assert back[distance] == bucket and back[distance - 1] == bucket - 1
    ahead = np.asarray(relative_position_bucket(jnp.arange(1, 600), bidirectional=bidirectional))
    assert ahead.min() == (17 if bidirectional else 0) and ahead.max() == (31 if bidirectional else 0)


def test_relative_position_buckets_agree_with_t5x_on_every_integer(golden_dir):
    golden = np.load(golden_dir / "relative_position_buckets.npz")
    settings = [name for name in golden if name.startswith("t5x_")]
    assert len(settings) >= 8
    for name in settings:
        buckets, distance, direction = name.removeprefix("t5x_").split("_")
        got = relative_position_bucket(
            jnp.asarray(golden["relative_position"]),
            bidirectional=direction == "bidirectional",
            num_buckets=int(buckets[1:]),
            max_distance=int(distance[1:]),
        )
        np.testing.assert_array_equal(got, golden[name], err_msg=name)


def test_masks_agree_with_t5x(golden_json):
    masks = golden_json("training")["masks"]
    target_segments = jnp.asarray(masks["decoder_segment_ids"])
    input_segments = jnp.asarray(masks["encoder_segment_ids"])
    cases = {
        "causal_packed": AttentionMask(target_segments, target_segments, causal=True),
        "encoder_packed": AttentionMask(input_segments, input_segments),
        "cross_packed": AttentionMask(target_segments, input_segments),
    }
    for name, attention_mask in cases.items():
        expected = np.asarray(masks[name])
        np.testing.assert_array_equal(attention_mask.materialize(*expected.shape[-2:]), expected, err_msg=name)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"mlp_activations": ("swish",)}, "mlp_activations has .*swish"),
        ({"dropout_rate": 1.0}, "dropout_rate must be in"),
        ({"dtype": "float16"}, "dtype must be one of .*float16"),
        ({"remat": "all"}, "remat must be one of .*'all'"),
        ({"relative_buckets": 6}, "relative_buckets=6"),
    ],
)
def test_bad_configs_are_refused_with_name_and_value(change, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.CONFIG, **change)
