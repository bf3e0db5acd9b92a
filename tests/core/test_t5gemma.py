"""T5Gemma and T5Gemma 2: what transformers computes, and against themselves in other arrangements."""

import dataclasses
import json
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from models import T5GEMMA, T5GEMMA_2
from repeats import fast
from safetensors.numpy import load_file

import t5x_lite
from t5x_lite import convert, export, sharding
from t5x_lite.convert import peft, tensors
from t5x_lite.errors import UserError
from t5x_lite.inference import decode
from t5x_lite.model.families import model_of
from t5x_lite.t5gemma import T5GemmaConfig, huggingface
from t5x_lite.training import optim
from t5x_lite.training.partitioner import Partitioner

FAMILIES = ("small", "2b", "9b_2b", "2b_it", "2_270m", "2_4b")
GENERATIONS = {"T5Gemma": T5GEMMA, "T5Gemma 2": T5GEMMA_2}
OPTIMIZER = optim.make_optimizer(optim.adafactor(min_dim_size_to_factor=16), optim.constant(0.02))

each_generation = pytest.mark.parametrize("config", GENERATIONS.values(), ids=GENERATIONS.keys())


@pytest.fixture
def family(request, golden):
    return golden("t5gemma") / request.param


@pytest.fixture
def values(family):
    return dict(np.load(family / "values.npz"))


# Against transformers.


@pytest.mark.parametrize("family", fast(FAMILIES, "9b_2b", "2_4b"), indirect=True)
def test_logits_and_gradients_agree_with_transformers(family, values):
    model = t5x_lite.load(family)
    tokens = values["encoder_input_tokens"], values["decoder_input_tokens"]
    assert (tokens[1][:, 0] == 0).all()  # which stands for <bos>
    logits = model.logits(*tokens)
    assert np.std(values["logits"]) > 0.5
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=1e-4)

    labels = values["labels"]  # -100 at padding

    def loss(params):
        log_probs = jax.nn.log_softmax(model.config.network().apply({"params": params}, *map(jnp.asarray, tokens)))
        of_labels = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.mean(of_labels, where=labels >= 0)

    value, gradients = jax.jit(jax.value_and_grad(loss))(model.params)
    np.testing.assert_allclose(value, values["loss"], rtol=1e-5)
    names = values["gradient_names"].tolist()
    for name, gradient in tensors.flat(gradients).items():
        for layer in range(len(gradient) if "/layers/" in name else 1):
            theirs = huggingface.module_of(model.config, huggingface.name_of(model.config, name).format(layer))
            of_layer = np.asarray(gradient[layer] if "/layers/" in name else gradient)
            of_layer = of_layer.T if huggingface.is_transposed(name) else of_layer
            *expected, norm = values["gradients"][names.index(theirs)]
            vectors = np.random.default_rng(zlib.crc32(theirs.encode())).standard_normal((4, of_layer.size))
            np.testing.assert_allclose(vectors @ of_layer.reshape(-1), expected, atol=1e-3 * norm, err_msg=theirs)
            np.testing.assert_allclose(np.linalg.norm(of_layer), norm, rtol=1e-3, err_msg=theirs)
            names[names.index(theirs)] = ""
    assert not any(names)


@pytest.mark.parametrize("family", fast(FAMILIES, "9b_2b", "2_4b"), indirect=True)
def test_greedy_tokens_agree_with_transformers(family, values):
    tokens, _ = t5x_lite.load(family).generate(values["encoder_input_tokens"], max_length=12)
    np.testing.assert_array_equal(tokens[:, 0], values["greedy"])


@pytest.mark.parametrize("family", fast(FAMILIES, "2b_it", "2_270m"), indirect=True)
def test_best_beams_agree_with_transformers(family, values):
    model = t5x_lite.load(family)
    tokens, scores = model.generate(values["encoder_input_tokens"], "beam", max_length=12, beam_size=3, alpha=0.0)
    np.testing.assert_array_equal(tokens[:, 0], values["beam"])
    np.testing.assert_allclose(scores[:, 0], values["beam_scores"], rtol=1e-4)
    assert not np.array_equal(values["beam"], values["greedy"])


@pytest.mark.parametrize("family", fast(FAMILIES, "2b_it", "2_4b"), indirect=True)
def test_all_tensors_of_transformers_come_back(family, values, tmp_path):
    config = convert.convert(family, tmp_path / "back", "huggingface")
    again, _ = convert.read(tmp_path / "back")
    assert again == config and isinstance(config, T5GemmaConfig)
    back = load_file(tmp_path / "back" / "model.safetensors")
    named = {name.replace(".text_model.", "."): tensor for name, tensor in tensors.read_hub(family).items()}
    for name, tensor in named.items():
        if "vision_tower" not in name and "multi_modal" not in name:
            np.testing.assert_array_equal(back.pop(name), np.asarray(tensor).astype("f4"), err_msg=name)
    assert all("vision_tower" in name or "multi_modal" in name for name in back) and bool(back) == (
        config.generation == 2
    )
    state = {line.partition(" ")[0].replace(".text_model.", ".") for line in values["state"].tolist()}
    missing = state - {*named, *back}
    assert all("embed_tokens" in name or "lm_head" in name for name in missing)  # copies of the table


def edited(golden, tmp_path, name, side, **changes):
    """Return a copy of a model's folder with other values in its config.json or a part of it."""
    folder = shutil.copytree(golden("t5gemma") / name, tmp_path / "edited")
    hub = json.loads((folder / "config.json").read_text())
    part = hub if side is None else hub[side]
    part.update(changes)
    (folder / "config.json").write_text(json.dumps(hub))
    return folder


@pytest.mark.parametrize(
    ("side", "changes", "message"),
    [
        ("decoder", {"hidden_activation": "silu"}, "decoder: hidden_activation is 'silu'; only 'gelu_pytorch_tanh'"),
        ("encoder", {"attention_bias": True}, "encoder: attention_bias is True; only False"),
        ("encoder", {"sliding_window": 5}, "sliding_window is 5 in the encoder, 3 in the decoder"),
        ("encoder", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "do not begin alike"),
        ("decoder", {"layer_types": ["chunked"] * 3}, "layer_types has chunked; known: sliding_attention"),
        ("decoder", {"rope_parameters": {"rope_type": "yarn"}}, r"rope_type is \['yarn', 'yarn'\]"),
        ("decoder", {"num_hidden_layers": 4, "layer_types": None}, r"missing: \d+\n    model.decoder.layers.3"),
        ("decoder", {"novelty": 7}, "decoder: the key 'novelty'"),
        (None, {"decoder": None}, "lacks decoder"),
        (None, {"pad_token_id": 4}, "pad_token_id is 4; only 0"),
        (None, {"eos_token_id": 9}, r"config.json: T5GemmaConfig.end_tokens=\(9,\) must have 1"),
        (None, {"architectures": ["T5GemmaForSequenceClassification"]}, "T5GemmaForSequenceClassification is not"),
        ("encoder", {"layer_types": ["full_attention"]}, "encoder: layer_types is .*num_hidden_layers=3 names"),
        ("decoder", {"sliding_window": None}, "decoder: sliding_window is None, but layer_types has sliding"),
        ("decoder", {"num_key_value_heads": None}, "decoder: num_key_value_heads is None; it must be a whole number"),
        ("encoder", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, r"rope_type is \['linear', 'lin"),
    ],
)
def test_other_configurations_are_errors_that_name_the_key(golden, tmp_path, side, changes, message):
    with pytest.raises(UserError, match=message):
        convert.read(edited(golden, tmp_path, "2b", side, **changes))


def test_configs_of_earlier_versions_are_read_alike(golden, tmp_path):
    first, _ = convert.read(golden("t5gemma") / "2b")
    folder = edited(golden, tmp_path, "2b", "encoder", rope_parameters=None, rope_theta=10000.0, layer_types=None)
    assert convert.read(folder)[0] == first


def test_ends_are_those_of_generation_config(golden, tmp_path):
    folder = shutil.copytree(golden("t5gemma") / "2b", tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    config, _ = convert.read(folder)
    assert isinstance(config, T5GemmaConfig) and config.end_tokens == (1, 9)


def test_a_base_of_rotary_positions_beside_their_parameters_is_read(golden, tmp_path):
    folder = edited(golden, tmp_path, "2b", "encoder", rope_theta=99.0, rope_parameters={"rope_type": "default"})
    hub = json.loads((folder / "config.json").read_text())
    hub["decoder"] |= {"rope_theta": 99.0, "rope_parameters": {"rope_type": "default"}}
    (folder / "config.json").write_text(json.dumps(hub))
    config, _ = convert.read(folder)
    assert isinstance(config, T5GemmaConfig) and config.rope_theta == 99.0


def test_tokens_beyond_the_table_are_an_error(golden):
    model = t5x_lite.load(golden("t5gemma") / "small")
    with pytest.raises(UserError, match="token 700 is not in the model's vocab_size=96"):
        model.score([[5, 700]], [[5, 1]])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["9b_2b", "2_270m"])
@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_an_exported_program_decodes_alike(golden, name, method, unchecked_types):
    model = t5x_lite.load(golden("t5gemma") / name)
    tokens = np.load(golden("t5gemma") / name / "values.npz")["encoder_input_tokens"]
    program = export.program(model, 6, decode.Decoding(method))
    got, _ = program.call(tensors.flat(model.params), tokens)
    np.testing.assert_array_equal(got, model.generate(tokens, method, max_length=6)[0])


def test_a_run_with_another_window_or_end_says_so(caplog):
    convert.warn_of_another_model("there", dataclasses.asdict(T5GEMMA), T5GEMMA)
    assert not caplog.messages
    other = dataclasses.replace(T5GEMMA, sliding_window=4, end_tokens=(1, 7))
    convert.warn_of_another_model("there", dataclasses.asdict(T5GEMMA), other)
    assert "end_tokens = [1] there, [1, 7] in this run; sliding_window = 3 there, 4 in this run" in caplog.text


# Against themselves.


def logits(config, params, batch):
    return np.asarray(jax.jit(lambda params, batch: model_of(config).logits(params, batch)[""])(params, batch))


@each_generation
def test_packed_examples_have_the_logits_of_rows_of_their_own(config):
    params = tiny.random_params(config)
    alone, packed = tiny.batch(0), tiny.batch(0, packed=True)
    apart, together = (logits(config, params, batch) for batch in (alone, packed))
    at = [np.argwhere(batch["decoder_loss_weights"] != 0) for batch in (alone, packed)]
    np.testing.assert_allclose(together[tuple(at[1].T)], apart[tuple(at[0].T)], atol=1e-4)
    assert (packed["decoder_segment_ids"] == 2).any()


@pytest.mark.parametrize("config", fast(GENERATIONS, "T5Gemma 2"))
def test_windows_and_positions_matter(config):
    params, batch = tiny.random_params(config), tiny.batch(0)
    plain = logits(config, params, batch)
    changes = [{"sliding_window": 4}, {"layer_pattern": ("sliding",)}, {"rope_theta": 100.0}]
    changes += [{"global_rope_theta": 100.0}, {"global_rope_factor": 2.0}, {"logits_softcap": 4.0}]
    for change in changes:
        other = logits(dataclasses.replace(config, **change), params, batch)
        assert np.abs(other - plain)[batch["decoder_loss_weights"] != 0].max() > 1e-3, change


@each_generation
@pytest.mark.parametrize("chunk", fast([1, 3], "3"))
def test_cached_decoding_equals_the_full_forward(config, chunk):
    params, network = tiny.random_params(config), config.network()
    random = np.random.default_rng(0)
    inputs, targets = random.integers(2, 264, (3, 9)), random.integers(2, 264, (6, 7))
    inputs[1, 6:] = 0
    targets[:, 0] = 0
    inputs, targets = (jnp.asarray(tokens, jnp.int32) for tokens in (inputs, targets))
    full = jnp.stack(
        [network.apply({"params": params}, inputs, targets[copy::2]) for copy in range(2)], axis=1
    ).reshape(6, 7, -1)

    def cached(params):
        apply = lambda *args, method: network.apply({"params": params}, *args, method=method)  # noqa: E731
        cache = apply(apply(inputs, method="encode"), 6, 7, method="start_cache")
        parts = []
        for start in range(0, 7, chunk):
            out, cache = apply(targets[:, start : start + chunk], start, cache, inputs, method="decode_step")
            parts.append(out)
        return jnp.concatenate(parts, axis=1)

    np.testing.assert_allclose(jax.jit(cached)(params), full, atol=1e-4)


def losses(config, steps=3, mesh=None, **options):
    of = Partitioner(config, OPTIMIZER, mesh=mesh or {"data": 8}, batch_rows={"BATCH_SIZE": 16})
    state = tiny.random_state(OPTIMIZER, of.abstract)
    run = of.train_step(config=config, optimizer=OPTIMIZER, **options)
    values = []
    for number in range(steps):
        batch = sharding.shard_batch(tiny.batch(number), of.batch_sharding)
        state, metrics = run(state, batch, jax.random.key(number))
        values.append(float(metrics["loss"]))
    return values


VARIANTS = {
    "mesh": ({}, {"data": 2, "fsdp": 2, "tensor": 2}),
    "unrolled": ({"scan_layers": False}, None),
    "blocks": ({"attention": "blocks"}, None),
    "remat": ({"remat": "full"}, None),
}


ARRANGEMENTS = {f"{variant}-T5Gemma 2": (T5GEMMA_2, *of) for variant, of in VARIANTS.items()}
ARRANGEMENTS["mesh-T5Gemma"] = (T5GEMMA, *VARIANTS["mesh"])


@pytest.mark.parametrize("arrangement", fast(ARRANGEMENTS, "mesh-T5Gemma 2"))
def test_training_is_the_same_on_other_meshes_and_in_other_programs(arrangement):
    config, change, mesh = arrangement
    plain = losses(config)
    np.testing.assert_allclose(losses(dataclasses.replace(config, **change), mesh=mesh), plain, rtol=2e-5)
    assert len(set(plain)) == 3


@pytest.mark.slow
@each_generation
def test_it_learns(config):
    curve = losses(config, steps=60)
    assert np.mean(curve[-5:]) < 0.7 * np.mean(curve[:5])


@pytest.mark.slow
@each_generation
def test_lora_is_merged_for_hugging_face(config):
    config = dataclasses.replace(config, lora_rank=2, lora_targets=("query", "key", "value", "out", "wi", "wo"))
    params = tiny.random_params(config)
    merged_config, merged = convert._lora_merged(config, jax.device_get(params))
    batch = tiny.batch(0)
    np.testing.assert_allclose(logits(merged_config, merged, batch), logits(config, params, batch), atol=1e-3)


@pytest.mark.parametrize("family", ["2b", "2_270m"], indirect=True)
def test_lora_goes_to_peft_and_comes_back(family, tmp_path):
    config, params = convert.read(family)
    config = dataclasses.replace(config, lora_rank=2, lora_targets=("query", "wi"))
    params = tiny.random_params(config)
    peft.write(tmp_path / "peft", config, params, str(family.resolve()))
    modules = {name.split(".layers.")[0] for name in load_file(tmp_path / "peft" / peft.TENSORS)}
    inside = ".text_model" if config.generation == 2 else ""
    assert modules == {f"base_model.model.model.{side}" for side in (f"encoder{inside}", "decoder")}
    again, restored = convert.read(tmp_path / "peft", keep_lora=True)
    assert again == config
    ours, back = tensors.flat(params), tensors.flat(restored)
    for name in (name for name in ours if "_lora/" in name):
        np.testing.assert_allclose(back[name], ours[name], rtol=1e-6, err_msg=name)


PARAMETERS = {  # of the second generation without the vision tower; announced were 370 M, 1.7 B and 7 B
    "t5gemma/small": 312_517_632,
    "t5gemma/base": 591_490_560,
    "t5gemma/large": 1_241_761_792,
    "t5gemma/ml": 2_200_345_344,
    "t5gemma/xl": 3_766_980_608,
    "t5gemma/2b_2b": 5_596_853_760,
    "t5gemma/9b_2b": 12_292_375_296,
    "t5gemma/9b_9b": 20_333_401_088,
    "t5gemma_2/270m_270m": 368_424_832,
    "t5gemma_2/1b_1b": 1_697_783_168,
    "t5gemma_2/4b_4b": 7_089_112_576,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "encoder's num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"encoder_head_dim": 5}, "encoder's.*head_dim=5 even"),
        ({"d_ff": 0}, "of the decoder, d_ff is 0"),
        ({"generation": 2}, "generation=2 has one width, and attention_softcap=0.0"),
        ({"layer_pattern": ("near",)}, "layer_pattern=.*one or more of"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"start_token": 300}, "start_token=300 is not in vocab_size=264"),
        ({"end_tokens": (5,)}, "must have 1"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0"),
        ({"lora_rank": -1}, "lora_rank must be at least 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\)"),
    ],
)
def test_bad_configs_are_refused_with_name_and_value(change, message, unchecked_types):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(T5GEMMA, **change)
