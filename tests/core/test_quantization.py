"""Parameters in int8 and bfloat16: how far they are off, and that they are read, sharded and used as such."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from models import BERT, CONFIGS, batch

import t5x_lite
from t5x_lite import checkpoint, convert, sharding
from t5x_lite.checkpoint import saving
from t5x_lite.errors import UserError
from t5x_lite.model import quantization
from t5x_lite.model.families import model_of
from t5x_lite.training import optim, step


def test_an_entry_is_off_by_half_of_a_step_at_most():
    kernel = np.random.default_rng(0).normal(size=(3, 40, 20)).astype(np.float32)
    kernel[1, :, 4] = 0
    got = jax.tree.map(np.asarray, quantization.quantized(jnp.asarray(kernel)))
    assert got["int8"].dtype == np.int8 and got["scale"].shape == (3, 20)
    np.testing.assert_allclose(got["scale"], np.abs(kernel).max(1) / 127, rtol=1e-6)
    error = np.abs(got["int8"] * got["scale"][:, None] - kernel)
    assert (error <= 0.501 * got["scale"][:, None]).all() and np.median(error) > 0
    np.testing.assert_array_equal(np.asarray(quantization.values({"kernel": got})["kernel"])[1, :, 4], 0)


def stored(params, dtype):
    return jax.jit(lambda params: quantization.stored(params, dtype))(params)


@pytest.mark.parametrize("name", ["encoder-decoder", "BERT", "encoder classifier"])
def test_a_product_in_int8_is_that_of_the_values(name):
    """Every layer multiplies by what is stored: as the model whose kernels are these values."""
    config = CONFIGS[name]
    rows, params = jax.tree.map(jnp.asarray, batch(config)), tiny.random_params(config)
    in_int8 = stored(params, "int8")
    names = checkpoint.flat(in_int8)
    assert {str(leaf.dtype) for leaf in names.values()} == {"int8", "float32", "bfloat16"}
    assert {k for k, leaf in names.items() if leaf.dtype == jnp.int8} == {
        f"{k}/int8" for k in checkpoint.flat(params) if k.endswith("/kernel")
    }
    logits = jax.jit(model_of(config).logits)
    got, values, exact = (logits(p, rows) for p in (in_int8, quantization.values(in_int8), params))
    for head in got:
        scale = float(jnp.std(exact[head]))
        np.testing.assert_allclose(got[head], values[head], atol=1e-3 * scale)
        assert 0 < float(jnp.max(jnp.abs(got[head] - exact[head]))) < scale


def test_int8_lies_on_the_mesh_as_float32_does():
    frozen = optim.make_optimizer(optim.adafactor(), optim.constant(1.0), frozen_dtype="int8").without_training()
    mesh = sharding.make_mesh(2, 2, 2)
    plain = checkpoint.flat(step.abstract_params(tiny.CONFIG, mesh))
    abstract = checkpoint.flat(step.abstract_state(tiny.CONFIG, frozen, mesh).params)
    assert quantization.plain(abstract).keys() == plain.keys()
    for name, leaf in abstract.items():
        whole = plain[quantization.plain_name(name)]
        spec = (*whole.sharding.spec, *(None,) * (whole.ndim - len(whole.sharding.spec)))
        expected = (*spec[:-2], spec[-1]) if name.endswith("kernel/scale") else spec
        got = (*leaf.sharding.spec, *(None,) * (leaf.ndim - len(leaf.sharding.spec)))
        assert got == expected, name


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_model_is_loaded_in_fewer_bits(golden, tmp_path, dtype):
    """From Hugging Face's folder and from our own checkpoint, on one device and on a mesh: the same numbers."""
    source = golden("families") / "flan_shards"
    convert.convert(source, tmp_path / "own", "t5x_lite")
    values = np.load(source / "values.npz")
    tokens = values["encoder_input_tokens"], values["decoder_input_tokens"]
    models = [t5x_lite.load(folder, params_dtype=dtype) for folder in (source, tmp_path / "own")]
    models.append(
        t5x_lite.load(source, params_dtype=dtype, mesh=sharding.make_mesh(1, 4, 1, devices=jax.devices()[:4]))
    )
    bytes_of = {sum(x.nbytes for x in jax.tree.leaves(model.params)) for model in models}
    exact = t5x_lite.load(source)
    least = {"bfloat16": 0.5, "int8": 0.3}[dtype]  # half of this tiny model is its embedding
    assert bytes_of.pop() <= (least + 0.1) * sum(x.nbytes for x in jax.tree.leaves(exact.params)) and not bytes_of
    logits = [np.asarray(model.logits(*(np.tile(x[:1], (4, 1)) for x in tokens))) for model in models]
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=1e-4)
    error = np.abs(models[0].logits(*tokens) - values["logits"])
    assert 0 < error.max() < 0.3 * values["logits"].std() < values["logits"].max()
    found, _ = models[0].generate(values["encoder_input_tokens"], max_length=12)
    assert found.shape == (3, 1, 12)


def test_other_dtypes_are_named(golden, unchecked_types):
    for option in ({"params_dtype": "int4"}, {"dtype": "float16"}):
        (name,) = option
        with pytest.raises(UserError, match=f"{name} = .* must be one of float32, bfloat16"):
            t5x_lite.load(golden("families") / "t5", **option)


def test_a_checkpoint_is_read_into_int8(tmp_path):
    params = tiny.random_params(BERT)
    saving.save_params(tmp_path / "bert", params, info=convert.info(BERT))
    abstract = quantization.stored(convert.abstract_params(BERT), "int8")
    restored = checkpoint.restore_params(tmp_path / "bert", abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, stored(params, "int8"))
