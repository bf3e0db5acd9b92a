"""Each family of Hugging Face's T5 against what transformers computed with a tiny model, and back to its format."""

import json
import shutil

import numpy as np
import pytest
from repeats import fast
from safetensors.numpy import load_file

import t5x_lite
from t5x_lite import convert
from t5x_lite.convert import tensors
from t5x_lite.errors import UserError
from t5x_lite.model.config import T5Config

FAMILIES = ("t5", "t5_bfloat16", "t5_float16", "flan_shards", "ul2", "byt5", "mt5", "umt5", "umt5_tied")


@pytest.fixture(params=FAMILIES)
def family(request, golden):
    return golden("families") / request.param


@pytest.fixture
def values(family):
    return dict(np.load(family / "values.npz"))


def test_logits_agree_with_transformers(family, values):
    logits = t5x_lite.load(family).logits(values["encoder_input_tokens"], values["decoder_input_tokens"])
    assert logits.dtype == np.float32 and np.std(values["logits"]) > 0.5  # which are not nearly uniform
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", fast(FAMILIES, "t5"), indirect=True)
def test_greedy_tokens_agree_with_transformers(family, values):
    tokens, _ = t5x_lite.load(family).generate(values["encoder_input_tokens"], max_length=12)
    np.testing.assert_array_equal(tokens[:, 0], values["greedy"])


@pytest.mark.parametrize("family", fast(FAMILIES, "mt5"), indirect=True)
def test_best_beams_agree_with_transformers(family, values):
    model = t5x_lite.load(family)
    # With alpha=0 both rank by log-probability; see tests/golden/make_families.py.
    tokens, scores = model.generate(values["encoder_input_tokens"], "beam", max_length=12, beam_size=3, alpha=0.0)
    np.testing.assert_array_equal(tokens[:, 0], values["beam"])
    np.testing.assert_allclose(scores[:, 0], values["beam_scores"], rtol=1e-4)
    assert not np.array_equal(values["beam"], values["greedy"])


@pytest.mark.parametrize("family", fast(FAMILIES, "flan_shards", "t5_float16", "mt5", "umt5"), indirect=True)
def test_all_tensors_of_transformers_come_back(family, values, tmp_path):
    config = convert.convert(family, tmp_path / "back", "huggingface")
    back = load_file(tmp_path / "back" / "model.safetensors")
    # transformers gives the embedding several names and needs it under one.
    tied = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    assert isinstance(config, T5Config)
    tied += ["lm_head.weight"] * config.tie_embeddings
    state = {name: shape for name, _, shape in (line.partition(" ") for line in values["state"].tolist())}
    expected = {name: shape for name, shape in state.items() if name not in tied}
    assert {name: str(tensor.shape) for name, tensor in back.items()} == expected
    for name, tensor in tensors.read_hub(family).items():
        np.testing.assert_array_equal(back[name], np.asarray(tensor).astype("f4"), err_msg=name)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (family, tmp_path / "back"))
    same = ("num_decoder_layers", "feed_forward_proj", "vocab_size", "eos_token_id", "relative_attention_num_buckets")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


def edited(golden, tmp_path, name, **changes):
    """Return a copy of a family's folder with other values in config.json."""
    folder = tmp_path / "edited"
    shutil.copytree(golden("families") / name, folder)
    hub = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(hub))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "longt5"}, "model_type is 'longt5'; supported: 't5'"),
        ({"eos_token_id": 2}, r"eos_token_id is 2; only 1 is supported.*CodeT5"),
        ({"decoder_start_token_id": 2}, r"decoder_start_token_id is 2; only 0 is supported.*CodeT5"),
        ({"pad_token_id": 1}, "pad_token_id is 1; only 0 is supported"),
        ({"dense_act_fn": "silu"}, "dense_act_fn is 'silu'; only 'relu' is supported"),
        ({"feed_forward_proj": "gated-mish"}, "feed_forward_proj is 'gated-mish'; known"),
        ({"scale_decoder_outputs": None}, "scale_decoder_outputs is None; it must be true or false"),
        ({"num_decoder_layers": 3}, r"missing: 13\n    decoder.block.2.layer"),
        ({"vocab_size": 128}, r"shared.weight: \[96, 16\], the model has \[128, 16\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_configurations_are_errors_that_name_the_key(golden, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        convert.read(edited(golden, tmp_path, "t5", **changes))


@pytest.mark.parametrize(
    ("name", "changes", "is_scaled"),
    [
        ("t5", {"scale_decoder_outputs": True}, True),
        ("t5", {"scale_decoder_outputs": False}, False),
        ("ul2", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),  # as transformers 5 rewrites it
    ],
)
def test_outputs_are_scaled_where_the_config_says_so(golden, tmp_path, name, changes, is_scaled):
    config, _ = convert.read(edited(golden, tmp_path, name, **changes))
    assert isinstance(config, T5Config) and config.tie_embeddings == is_scaled
