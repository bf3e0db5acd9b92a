"""LoRA folders of PEFT: read as PEFT computes them, written as it reads them; what is not supported is named."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core.test_model import init, logits
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from t5x_lite import convert
from t5x_lite.checkpoint import saving
from t5x_lite.convert import __main__ as convert_command
from t5x_lite.convert import peft, tensors
from t5x_lite.errors import MissingFileError, UserError
from t5x_lite.model.config import T5Config
from t5x_lite.model.t5 import forward


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of a golden LoRA folder that a test may spoil, and of its base."""
    shutil.copytree(golden("peft") / "all", tmp_path / "peft" / "all")
    shutil.copytree(golden("hf_t5_v11"), tmp_path / "hf_t5_v11")
    return tmp_path / "peft" / "all"


def change(folder, **config):
    file = folder / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


@pytest.mark.parametrize("name", ["all", "head"])
def test_logits_are_those_of_peft(golden, golden_t5, name):
    """ "all": every kernel, rslora, ranks and alphas by pattern; "head": an output layer saved as a whole."""
    config, params = convert.read(golden("peft") / name)
    io, expected = golden_t5.io, np.load(golden("peft") / "logits.npz")[name]
    got = logits(config, params, io["input_ids"] * io["attention_mask"], io["decoder_input_ids"])
    real = io["targets"] != 0
    np.testing.assert_allclose(got[real][:, ::8], expected[real], atol=1e-4)
    assert np.abs(expected - io["logits"][..., ::8])[real].max() > 0.1


@pytest.mark.parametrize("name", ["all", "head"])
def test_updates_kept_apart_compute_the_same_and_go_back(golden, golden_t5, tmp_path, name, capsys):
    """Of several ranks, as LoRA of the largest; and PEFT's folder of it is the same model again."""
    folder, io = golden("peft") / name, golden_t5.io
    arguments = [str(folder), str(tmp_path / "start"), "--to=t5x_lite", "--keep_lora"]
    assert convert_command.main(arguments) == 0, capsys.readouterr().err
    config, params = convert.read(tmp_path / "start")
    stored = json.loads((folder / peft.CONFIG).read_text())
    most = max([stored["r"], *(stored.get("rank_pattern") or {}).values()])
    kernels = ("query", "key", "value", "out", "wi", "wo") if name == "all" else ("query", "value")
    assert isinstance(config, T5Config) and (config.lora_rank, config.lora_targets) == (most, kernels)
    assert f"lora_rank = {most}" in (tmp_path / "start" / "model.gin").read_text()
    expected, real = np.load(golden("peft") / "logits.npz")[name], io["targets"] != 0
    got = logits(config, params, io["input_ids"] * io["attention_mask"], io["decoder_input_ids"])
    np.testing.assert_allclose(got[real][:, ::8], expected[real], atol=1e-4)
    _, base = convert.read(peft.base_of(folder))
    same = {k for k, leaf in tensors.flat(base).items() if np.array_equal(leaf, tensors.flat(params)[k])}
    assert tensors.flat(base).keys() - same == ({"decoder/logits_dense/kernel"} if name == "head" else set())

    peft.write(tmp_path / "back", config, params, str(peft.base_of(folder)))
    _, merged = convert.read(tmp_path / "back")
    _, first = convert.read(folder)
    for key in tensors.flat(first).keys() - {"decoder/logits_dense/kernel"}:
        np.testing.assert_allclose(tensors.flat(merged)[key], tensors.flat(first)[key], atol=1e-5, err_msg=key)


def test_what_has_no_update_stays_without(folder, tmp_path):
    """LoRA on a few layers alone: the others' is 0 and has no gradient."""
    file = folder / peft.TENSORS
    of = "base_model.model.decoder.block.1.layer.2.DenseReluDense.wi_0"
    save_file({name: value for name, value in load_file(file).items() if name.startswith(of)}, file)
    config, params = convert.read(folder, keep_lora=True)
    assert config.lora_targets == ("wi",)
    rows = {key: jnp.full((2, 4), 5, jnp.int32) for key in ("encoder_input_tokens", "decoder_input_tokens")}
    gradients = jax.grad(lambda params: jnp.sum(jnp.sin(forward(config, params, rows))))(params)
    for name, x in tensors.flat(gradients).items():
        if "_lora/" in name:
            is_there = name.startswith("decoder/layers/mlp/wi_0_lora/")
            assert bool(jnp.any(x)) == is_there and not jnp.any(x[0]), name
    with pytest.raises(UserError, match="--keep_lora is for --to=t5x_lite"):
        convert.convert(folder, tmp_path / "x", "huggingface", keep_lora=True)
    output = load_file(peft.base_of(folder) / "model.safetensors")["lm_head.weight"]
    save_file({"base_model.model.lm_head.weight": output}, file)
    with pytest.raises(UserError, match="no LoRA of a T5 to keep apart"):
        convert.read(folder, keep_lora=True)


def random_lora(hub, rank: int):
    config, params = convert.read(hub)
    config = dataclasses.replace(config, lora_rank=rank)
    leaves, base = tensors.flat(init(config)), tensors.flat(params)
    keys = iter(jax.random.split(jax.random.key(1), len(leaves)))
    leaves = {name: base.get(name, jax.random.normal(next(keys), leaf.shape)) for name, leaf in leaves.items()}
    return config, traverse_util.unflatten_dict(leaves, sep="/")


def test_what_is_written_is_read_as_the_same_model(golden, tmp_path, capsys):
    base = golden("hf_t5_v11")
    config, params = random_lora(base, 3)
    saving.save_params(tmp_path / "own", params, info=convert.info(config))
    with pytest.raises(UserError, match=r"trained parameters beside LoRA's .*--to=huggingface"):
        convert.convert(tmp_path / "own", tmp_path / "lost", "peft", str(base))
    peft.write(tmp_path / "lora", config, params, str(base))
    stored = load_file(tmp_path / "lora" / peft.TENSORS)
    a = stored["base_model.model.decoder.block.1.layer.1.EncDecAttention.v.lora_A.weight"]
    assert a.shape == (3, config.d_model) and len(stored) == 2 * 2 * (3 + 2 + 2)
    assert json.loads((tmp_path / "lora" / peft.CONFIG).read_text())["target_modules"] == ["q", "v"]
    assert convert_command.main([str(tmp_path / "lora"), str(tmp_path / "merged"), "--to=huggingface"]) == 0
    capsys.readouterr()
    _, merged = convert.read(tmp_path / "merged")
    _, expected = convert._lora_merged(config, params)
    for name, value in tensors.flat(expected).items():
        np.testing.assert_allclose(tensors.flat(merged)[name], value, atol=1e-5, err_msg=name)
    with pytest.raises(UserError, match="has no LoRA parameters"):
        peft.write(tmp_path / "none", dataclasses.replace(config, lora_rank=0), params, None)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"base_model_name_or_path": "google/flan-t5-small"},
            "'google/flan-t5-small' does not exist here",
        ),
        ({"base_model_name_or_path": None}, "base model '' is not a folder here"),
        ({"use_dora": True}, "the key 'use_dora'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
        ({"bias": "all"}, "bias is 'all'; only 'none'"),
        ({"init_lora_weights": "pissa_niter_4"}, r"'pissa_niter_4'.*merge_and_unload"),
        ({"r": 7}, r"has rank 2, but adapter_config\.json says otherwise"),
    ],
)
def test_configurations_that_are_not_supported_are_named(folder, config, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    change(folder, **config)
    with pytest.raises(UserError, match=says):
        convert.read(folder)


def test_damaged_folders_are_named(folder):
    file, module = folder / peft.TENSORS, "base_model.model.encoder.block.0.layer.0.SelfAttention.q"
    stored = load_file(file)
    for changes, says in (
        ({f"{module}.lora_A.weight": None}, "SelfAttention.q has lora_A None"),
        ({f"{module}.lora_B.weight": np.zeros((5, 2), np.float32)}, r"lora_B \[5, 2\], the base's weight is"),
        ({f"{module}.lora_magnitude_vector": np.zeros(5, np.float32)}, "lora_magnitude_vector .* is not a tensor of"),
        ({"base_model.model.lm_head.weight": np.zeros((5, 2), np.float32)}, r"lm_head.weight \[5, 2\] is not a tensor"),
    ):
        save_file({name: value for name, value in (stored | changes).items() if value is not None}, file)
        with pytest.raises(UserError, match=says):
            convert.read(folder)
    file.unlink()
    with pytest.raises(MissingFileError, match=rf"no {peft.TENSORS}"):
        convert.read(folder)
    (folder / peft.CONFIG).write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        convert.read(folder)


def test_the_tokenizer_is_the_folders_or_its_bases(folder):
    assert convert.tokenizer_file(folder) is None
    spiece = folder.parents[1] / "hf_t5_v11" / "spiece.model"
    spiece.write_bytes(b"model")
    assert spiece.samefile(convert.tokenizer_file(folder) or folder)
    (folder / "spiece.model").write_bytes(b"another")
    assert convert.tokenizer_file(folder) == folder / "spiece.model"


def test_a_base_on_the_hub_is_that_of_the_revision(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(peft.hub, "located", lambda name: asked.append(name) or folder.parents[1] / "hf_t5_v11")
    for revision, name in ((None, "me/tiny-t5"), ("v1", "me/tiny-t5@v1")):
        change(folder, base_model_name_or_path="me/tiny-t5", revision=revision)
        assert peft.base_of(folder).name == "hf_t5_v11" and asked.pop() == name
