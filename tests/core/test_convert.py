"""Conversion: the golden T5 as Hugging Face and as T5X saved it is one tree, and comes out as it went in."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from typing import Any

import flax.serialization
import gcs_emulator
import gin
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import tiny
from core.conftest import stack_layers
from core.test_model import DECODER_INPUT, ENCODER_INPUT, init, logits
from flax import traverse_util
from repeats import fast
from safetensors.numpy import load_file, save_file

import t5x_lite
from t5x_lite import checkpoint, convert, sharding, storage
from t5x_lite.checkpoint import saving
from t5x_lite.cli import main as run
from t5x_lite.convert import __main__ as convert_command
from t5x_lite.convert import huggingface_t5, t5x, tensors
from t5x_lite.errors import UserError
from t5x_lite.model.t5 import T5Config


def flatten(tree) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(dict(tree), sep="/"))


def assert_same(got, expected):
    got, expected = (flatten(tree) for tree in (got, expected))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.fixture
def hub(golden, tmp_path):
    """A copy of the golden directory that a test may spoil."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden("hf_t5_v11") / name, folder / name)
    return folder


def change(hub, tensors_=(), **config):
    """Sets values of config.json, and tensors; None takes one away."""
    file = hub / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    found = load_file(hub / "model.safetensors") | dict(tensors_)
    save_file({name: value for name, value in found.items() if value is not None}, hub / "model.safetensors")


def test_hugging_face_in_is_t5x_in_and_out_again_is_the_same_file(hub, golden_t5, tmp_path):
    config, params = convert.read(hub)
    assert_same(params, golden_t5.params)
    assert isinstance(config, T5Config)
    assert config.num_encoder_layers == 3 and config.num_decoder_layers == 2 and not config.tie_embeddings
    convert.convert(hub, tmp_path / "ours", "t5x_lite")
    (tmp_path / "ours" / "spiece.model").write_bytes(b"pieces")
    convert.convert(tmp_path / "ours", tmp_path / "back", "huggingface")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), load_file(hub / "model.safetensors"))
    before, after = (json.loads((d / "config.json").read_text()) for d in (hub, tmp_path / "back"))
    assert {k: after[k] for k in before} == before
    assert (tmp_path / "back" / "spiece.model").read_bytes() == b"pieces"
    with pytest.raises(FileExistsError, match="not empty"):
        convert.convert(hub, tmp_path / "back", "huggingface")


def test_what_is_converted_can_begin_a_run_but_is_not_resumed(hub, tmp_path):
    convert.convert(hub, tmp_path / "ours", "t5x_lite")
    assert checkpoint.choose_start(tmp_path / "run", tmp_path / "ours").kind == "initial"
    assert checkpoint.choose_start(tmp_path / "ours").kind == "fresh"


def test_what_is_converted_comes_with_its_sizes_as_a_gin_file(hub, tmp_path):
    config = convert.convert(hub, tmp_path / "ours", "t5x_lite")
    gin.clear_config()
    found = run.configure([str(tmp_path / "ours" / "model.gin")], ["DTYPE='float32'", "DROPOUT_RATE=0.25"]).model
    assert dataclasses.replace(found, dropout_rate=config.dropout_rate) == config
    assert found.dropout_rate == 0.25  # which is a run's to say


def test_shards_and_a_mesh_give_the_same_parameters(hub, golden_t5):
    found = load_file(hub / "model.safetensors")
    names = sorted(found)
    weight_map = {}
    for number in range(3):
        file = f"model-{number}.safetensors"
        save_file({name: found[name] for name in names[number::3]}, hub / file)
        weight_map |= dict.fromkeys(names[number::3], file)
    (hub / "model.safetensors").unlink()
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _, params = convert.read(hub, sharding.make_mesh(2, 4, 1))
    assert_same(params, golden_t5.params)
    kernel = params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] * 4 == kernel.shape[1]
    (hub / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors"):
        convert.read(hub)


WI = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"


def test_the_step_of_a_checkpoint_is_kept(tmp_path):
    """TOTAL_TRAIN_STEPS counts on from it."""
    params = {"token_embedder": {"embedding": np.zeros((2, 3), np.float32)}}
    saving.save_params(tmp_path / "run" / "checkpoints" / "70", params, info={"step": 70})
    saving.save_params(tmp_path / "converted", params, info={"step": 60})
    (tmp_path / "checkpoint_1000000").mkdir()
    names = ("run", "run/checkpoints/70", "converted", "checkpoint_1000000", "checkpoint_1000000/checkpoint", "t5")
    assert [convert.step_of(tmp_path / name) for name in names] == [70, 70, 60, 1_000_000, 1_000_000, None]


@pytest.mark.parametrize(
    ("tensors_", "config", "said"),
    [
        ({WI: None}, {}, f"missing: 1\n    {WI}"),
        ({"encoder.block.3.layer.0.layer_norm.weight": np.ones(32, "f4")}, {}, r"unknown: 1\n    encoder.block.3"),
        ({WI: np.ones((32, 64), "f4")}, {}, f"of another shape: 1\n    {WI}"),
        ({"lm_head.weight": None}, {}, "missing: 1\n    lm_head.weight"),
        ({"decoder.embed_tokens.weight": np.ones((128, 32), "f4")}, {}, "decoder.embed_tokens.weight differs"),
        ({}, {"tie_word_embeddings": True}, "lm_head.weight differs"),
        ({}, {"model_type": "umt5"}, r"missing: 3\n    decoder.block.1.layer.0.SelfAttention.relative_attention_bias"),
        ({}, {"model_type": "bart"}, "bart"),
        ({}, {"feed_forward_proj": "gelu"}, "feed_forward_proj is 'gelu'"),
        ({}, {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon"),
        ({}, {"is_gated_act": False}, "is_gated_act is False; only True"),
        ({}, {"quantization_config": {"bits": 4}}, "quantization_config"),
        ({}, {"rope_theta": 10000.0}, "the key 'rope_theta' .* is not known"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(hub, tensors_, config, said):
    change(hub, tensors_, **config)
    with pytest.raises(ValueError, match=said):
        convert.read(hub)


def test_tied_models_are_scaled_only_where_the_directory_says_so(hub):
    shared = load_file(hub / "model.safetensors")["shared.weight"]
    copies = {"lm_head.weight": shared, "decoder.embed_tokens.weight": shared, huggingface_t5._UNUSED: shared[:, :3]}
    change(hub, copies, tie_word_embeddings=True)
    config, params = convert.read(hub)
    assert isinstance(config, T5Config) and config.tie_embeddings and "logits_dense" not in params["decoder"]
    change(hub, {"lm_head.weight": None}, scale_decoder_outputs=False)  # as transformers 5 may write T5 1.1
    config, params = convert.read(hub)
    assert isinstance(config, T5Config) and not config.tie_embeddings
    np.testing.assert_array_equal(params["decoder"]["logits_dense"]["kernel"], shared.T)


def test_a_cut_file_is_refused(hub):
    file = hub / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="download it again"):
        convert.read(hub)


def test_pytorchs_own_format_needs_pytorch(hub, monkeypatch):
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    monkeypatch.setattr(tensors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"pytorch_model\.bin .* pip install torch, or download .*safetensors"
    ):
        convert.read(hub)


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorchs_own_format_of_today_and_before_2020(hub, golden_t5, zipped):
    torch = pytest.importorskip("torch", reason="needs PyTorch, which is no dependency")
    file = hub / "pytorch_model.bin"
    found = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in load_file(hub / "model.safetensors").items()}
    (hub / "model.safetensors").unlink()
    torch.save(found, file, _use_new_zipfile_serialization=zipped)
    assert_same(convert.read(hub)[1], golden_t5.params)
    torch.save(found | {"more": slice(3)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="more than tensors"):
        convert.read(hub)


def test_the_legacy_msgpack_of_t5x(data_dir):
    file = data_dir / "t5x_test_t5_tiny.checkpoint_0"
    saved = flax.serialization.msgpack_restore(file.read_bytes())["optimizer"]["target"]
    config, params = convert.read(file)
    assert config == T5Config(8, 16, 4, 3, 2, 2)
    assert_same(params, stack_layers(flatten(saved)))


def t5x_names(config, params):
    """T5X's unscanned tree, flat."""
    flat = {}
    for name, value in flatten(params).items():
        for i in range(len(value) if "/layers/" in name else 1):
            key = t5x.name_of(config, name).format(i)
            flat[key] = np.asarray(value[i] if "/layers/" in name else value)
    return flat


def write_t5x(folder, params, form):
    flat = t5x_names(tiny.CONFIG, params)
    if form == "scanned":
        flat = {
            name.replace("encoder/layers/", "encoder/encoder/"): np.moveaxis(v, 0, 1) if "/layers/" in name else v
            for name, v in flatten(params).items()
        }
    tree = {"target": traverse_util.unflatten_dict(flat, sep="/"), "state": {"step": np.int32(7)}}
    if form in ("orbax", "ocdbt", "scanned"):
        writer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=form != "orbax"))
        writer.save(folder, args=ocp.args.PyTreeSave(tree))
    else:
        folder.mkdir(parents=True)
        stands_for = {}
        for name, value in flat.items():
            key = f"target.{name.replace('/', '.')}"
            store = {"driver": "file", "path": str(folder / key)}
            spec = {"driver": "zarr", "kvstore": store, "create": True, "dtype": "float32", "metadata": {}}
            tensorstore.open(spec | {"metadata": {"shape": list(value.shape)}}).result().write(value).result()
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": key}, "dtype": "float32"}
            stands_for[name] = spec if form == "specs" else f"PLACEHOLDER://{key}"
        tree["target"] = traverse_util.unflatten_dict(stands_for, sep="/")
        (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize({"version": 3, "optimizer": tree}))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["specs", pytest.param("orbax", marks=pytest.mark.exhaustive), "ocdbt"])
def test_t5x_folders_in_a_bucket(form, tmp_path):
    """A process of its own, for TensorStore reads the address once."""
    params, folder = init(tiny.CONFIG), tmp_path / "checkpoint_7"
    write_t5x(folder, params, form)
    with gcs_emulator.running(tmp_path) as gcs:
        for file in folder.rglob("*"):
            if file.is_file():
                gcs.write(file.relative_to(tmp_path).as_posix(), file.read_bytes())
        command = [sys.executable, "-m", "t5x_lite.convert", "gs://bucket/checkpoint_7", str(tmp_path / "own")]
        environment = os.environ | {"TENSORSTORE_GCS_HTTP_URL": gcs.environment["TENSORSTORE_GCS_HTTP_URL"]}
        done = subprocess.run([*command, "--to=t5x_lite"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert checkpoint.read_info(tmp_path / "own")["step"] == 7
    assert_same(convert.read(tmp_path / "own")[1], params)


@pytest.mark.parametrize("form", fast(["specs", "placeholders", "orbax", "ocdbt", "scanned"], "ocdbt"))
def test_t5x_folders(form, tmp_path):
    params, folder = init(tiny.CONFIG), tmp_path / "checkpoint_7"
    write_t5x(folder, params, form)
    config, got = convert.read(folder)
    assert_same(got, params)
    np.testing.assert_array_equal(
        logits(config, got, ENCODER_INPUT, DECODER_INPUT), logits(tiny.CONFIG, params, ENCODER_INPUT, DECODER_INPUT)
    )
    if form == "specs":
        shutil.rmtree(folder / "target.encoder.encoder_norm.scale")
        with pytest.raises(FileNotFoundError, match=r"encoder_norm\.scale"):
            convert.read(folder)


@pytest.mark.parametrize(("text", "expected"), [("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), (None, "gelu")])
def test_t5x_activations_are_those_of_its_config_gin(tmp_path, caplog, text, expected):
    flat = t5x_names(tiny.CONFIG, init(tiny.CONFIG))
    file = tmp_path / "checkpoint_3" / "checkpoint"
    file.parent.mkdir()
    file.write_bytes(flax.serialization.msgpack_serialize({"target": traverse_util.unflatten_dict(flat, sep="/")}))
    if text is not None:
        (tmp_path / "config.gin").write_text(f"network.T5Config:\n  mlp_activations = ('{text}', 'linear')\n")
    config, _ = convert.read(file.parent)
    assert config.mlp_activations == (expected, "linear")
    assert ("does not say which activation" in caplog.text) == (text is None)
    (tmp_path / "config.gin").write_text("T5Config.mlp_activations = ('mish', 'linear')\n")
    with pytest.raises(UserError, match="mlp_activations has mish; known: relu"):
        convert.read(file.parent)


@pytest.mark.parametrize("beside", [None, "pytorch_model.bin"])
def test_weights_of_flax_alone_or_beside_a_file_that_cannot_be_read(hub, golden_t5, caplog, beside):
    tree: dict[tuple[str, ...], np.ndarray] = {}
    for name, x in load_file(hub / "model.safetensors").items():
        *path, last = name.split(".")
        is_table = path[-1] in ("shared", "relative_attention_bias")
        is_norm = path[-1].endswith("layer_norm")
        kind = "embedding" if is_table else last if is_norm else "kernel"
        tree[*path, kind] = x if is_table or is_norm else np.ascontiguousarray(x.T)
    (hub / "model.safetensors").unlink()
    (hub / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(traverse_util.unflatten_dict(tree)))
    if beside is not None:
        (hub / beside).write_bytes(b"not a tensor")
    _, params = convert.read(hub)
    assert_same(params, golden_t5.params)
    assert ("Reading flax_model.msgpack instead" in caplog.text) == (beside is not None)


def umt5(hub, seed=None):
    """Makes the golden T5 a UMT5: its relative biases in every layer, or random ones."""
    found = load_file(hub / "model.safetensors")
    biases = {}
    for stack, layers in (("encoder", 3), ("decoder", 2)):
        name = f"{stack}.block.{{}}.layer.0.SelfAttention.relative_attention_bias.weight"
        for layer in range(layers):
            biases[name.format(layer)] = found[name.format(0)]
    if seed is not None:
        rng = np.random.default_rng(seed)
        biases = {name: rng.normal(size=bias.shape).astype("f4") for name, bias in biases.items()}
    change(hub, biases, model_type="umt5")


@pytest.mark.slow
def test_umt5_has_a_relative_bias_in_every_layer(hub, golden_t5):
    inputs = golden_t5.batch["encoder_input_tokens"], golden_t5.batch["decoder_input_tokens"]
    expected = logits(*convert.read(hub), *inputs)
    umt5(hub)
    config, params = convert.read(hub)
    assert (
        isinstance(config, T5Config) and config.relative_bias == "per_layer" and "relpos_bias" not in params["encoder"]
    )
    np.testing.assert_allclose(logits(config, params, *inputs), expected, atol=1e-6)
    for changed in ("encoder", "decoder"):  # the last layer's own
        stack = params[changed] | {"layers": dict(params[changed]["layers"])}
        bias = stack["layers"]["relpos_bias"]["rel_embedding"]
        stack["layers"]["relpos_bias"] = {"rel_embedding": bias.at[-1].multiply(-1)}
        assert np.abs(logits(config, params | {changed: stack}, *inputs) - expected).max() > 1e-3


@pytest.mark.slow
def test_umt5_comes_out_as_it_went_in_and_decodes_as_it_scores(hub, golden_t5, tmp_path):
    umt5(hub, seed=0)
    convert.convert(hub, tmp_path / "ours", "t5x_lite")
    convert.convert(tmp_path / "ours", tmp_path / "back", "huggingface")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), load_file(hub / "model.safetensors"))
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    assert said["model_type"] == "umt5" and said["architectures"] == ["UMT5ForConditionalGeneration"]
    model = t5x_lite.load(tmp_path / "back")
    inputs = golden_t5.batch["encoder_input_tokens"]
    tokens, scores = model.generate(inputs, max_length=20)
    np.testing.assert_allclose(model.score(inputs, tokens[:, 0]), scores[:, 0], rtol=1e-4)


def test_t5x_with_a_relative_bias_in_every_layer(tmp_path):
    wanted = dataclasses.replace(tiny.CONFIG, relative_bias="per_layer")
    params = init(wanted)
    flat = t5x_names(wanted, params)
    assert "encoder/layers_1/relpos_bias/rel_embedding" in flat
    file = tmp_path / "msgpack"
    file.write_bytes(flax.serialization.msgpack_serialize({"target": traverse_util.unflatten_dict(flat, sep="/")}))
    config, got = convert.read(file)
    assert config == wanted
    assert_same(got, params)
    del flat["decoder/layers_2/relpos_bias/rel_embedding"]
    file.write_bytes(flax.serialization.msgpack_serialize({"target": traverse_util.unflatten_dict(flat, sep="/")}))
    with pytest.raises(ValueError, match="missing: 1\n    decoder/layers_2/relpos_bias"):
        convert.read(file)


@pytest.mark.parametrize("tied", [True, False])
def test_t5x_decoder_alone(tied, tmp_path):
    wanted = dataclasses.replace(tiny.CONFIG, num_encoder_layers=0, prefix_lm=True, tie_embeddings=tied)
    rng = np.random.default_rng(0)
    abstract = convert.abstract_params(wanted)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), abstract)
    flat = t5x_names(wanted, params)
    assert "decoder/token_embedder/embedding" in flat and "decoder/layers_0/self_attention/query/kernel" in flat
    tree = {"target": traverse_util.unflatten_dict(flat, sep="/")}
    (tmp_path / "msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    config, got = convert.read(tmp_path / "msgpack")
    assert config == wanted
    assert_same(got, params)
    with pytest.raises(ValueError, match="decoder-only"):
        convert.convert(tmp_path / "msgpack", tmp_path / "hub", "huggingface")
    assert not (tmp_path / "hub").exists()


def test_our_safetensors_are_those_of_the_library(tmp_path):
    arrays = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.ones(5, "f4")}
    tensors.write_safetensors(tmp_path / "f", {name: tensors.in_memory(a) for name, a in arrays.items()})
    assert_same(load_file(tmp_path / "f"), arrays)
    again = tensors.read_safetensors(tmp_path / "f")["a"]
    np.testing.assert_array_equal(again.transposed.read((slice(1, 3), slice(None))), arrays["a"].T[1:3])
    np.testing.assert_array_equal(again.at(1, 1).read((slice(0, 1),)), arrays["a"][0:1, 1])


def test_the_command_says_what_it_cannot_find(tmp_path, capsys):
    assert convert_command.main([str(tmp_path), str(tmp_path / "to"), "--to=t5x_lite"]) == 2
    assert "is not a model" in capsys.readouterr().err


@pytest.mark.parametrize(("to", "is_there"), [("huggingface", False), ("t5x_lite", True)])
def test_a_conversion_that_ends_early_leaves_no_model(hub, tmp_path, monkeypatch, to, is_there):
    dest = tmp_path / "there"
    if is_there:
        dest.mkdir()
    before, partial = dest.exists() and dest.stat().st_ino, (dest if is_there else tmp_path) / ".there.partial"
    with monkeypatch.context() as ended:
        ended.setattr(convert, "copy_tokenizer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert.convert(hub, dest, to)
        assert dest.exists() == is_there and not partial.exists()
        ended.setattr(storage.shutil, "rmtree", lambda *_, **__: None)  # as if it had been killed
        with pytest.raises(ZeroDivisionError):
            convert.convert(hub, dest, to)
    assert partial.exists()
    with pytest.raises(FileNotFoundError):
        convert.read(dest)
    convert.convert(hub, dest, to)
    assert not partial.exists() and convert.read(dest)[0] == convert.read(hub)[0]
    assert not is_there or dest.stat().st_ino == before, "it is the folder that was there"
    with pytest.raises(FileExistsError, match="not empty"):
        convert.convert(hub, dest, "huggingface")
