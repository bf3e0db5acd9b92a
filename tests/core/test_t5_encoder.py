"""Sentence embeddings from T5's encoder: those of sentence-transformers, and trained to find their pairs."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from models import CONFIGS, batch

import t5x_lite
from t5x_lite import checkpoint, convert, sharding
from t5x_lite.checkpoint import saving
from t5x_lite.convert import tensors
from t5x_lite.convert.tokenizer import ByteVocabulary
from t5x_lite.errors import UserError
from t5x_lite.model.families import model_of
from t5x_lite.t5_encoder import T5EncoderConfig, network, t5_encoder
from t5x_lite.t5_encoder.pretrained import LoadedEncoder
from t5x_lite.t5_encoder.retrieval import retrieved
from t5x_lite.training import optim, step

CONFIG = CONFIGS["encoder"]


@pytest.fixture
def folder(golden, tmp_path):
    return shutil.copytree(golden("sentence_t5"), tmp_path / "sentence_t5")


def params_of(config, seed: int = 0):
    random = np.random.default_rng(seed)
    shapes = convert.abstract_params(config)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.5, x.shape), x.dtype), shapes)


def test_embeddings_are_those_of_sentence_transformers(folder):
    io, model = np.load(folder / "io.npz"), t5x_lite.load(folder)
    real = io["input_ids"] != 0
    got = model.encode(io["input_ids"])
    np.testing.assert_allclose(np.asarray(got)[real], io["encoder_last_hidden_state"][real], atol=2e-5)
    np.testing.assert_allclose(model.embed(io["input_ids"]), io["embeddings"], atol=1e-5)
    shutil.rmtree(folder / "2_Dense")
    (folder / "modules.json").unlink()
    plain = t5x_lite.load(folder)
    assert plain.config.embed_dim == 0
    np.testing.assert_allclose(plain.embed(io["input_ids"], batch_size=2), io["without_projection"], atol=1e-5)
    assert np.abs(io["embeddings"] - io["without_projection"][:, :16]).max() > 0.1


def test_what_is_written_has_the_files_of_sentence_transformers(folder, tmp_path):
    convert.convert(folder, tmp_path / "own", "t5x_lite")
    convert.convert(tmp_path / "own", tmp_path / "theirs", "huggingface")
    (config, params), (again, restored) = convert.read(folder), convert.read(tmp_path / "theirs")
    assert config == again
    jax.tree.map(np.testing.assert_array_equal, params, restored)
    modules = json.loads((tmp_path / "theirs" / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["architectures"] == ["T5EncoderModel"]
    assert "models/" not in (tmp_path / "own" / "model.gin").read_text()


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "cls"}, "only pooling_mode_mean_tokens"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "only pooling_mode_mean_tokens"),
        ("1_Pooling/config.json", None, "does not exist"),
        ("2_Dense/config.json", None, "does not exist"),
        ("modules.json", "{broken", "is not JSON"),
        ("2_Dense/config.json", {"bias": True}, "projection without bias"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Tanh"}, "projection without"),
    ],
)
def test_other_ways_to_make_an_embedding_are_errors(folder, file, changes, says):
    if changes is None:
        (folder / file).unlink()
    elif isinstance(changes, str):
        (folder / file).write_text(changes)
    else:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(UserError, match=f"{file}.*{says}"):
        t5x_lite.load(folder)


def test_embed_says_what_it_needs(folder):
    model = t5x_lite.load(folder)
    with pytest.raises(UserError, match="put it in a list"):
        model.embed("a text")
    with pytest.raises(UserError, match="has no tokenizer"):
        model.embed(["a text"])
    for row in ([3, 999, 1], [-1], [0.5], 3, None, [[3, 1]]):
        with pytest.raises(UserError, match=r"token ids"):
            model.embed([[3, 1], row])
    assert model.embed([]).shape == (0, 16)
    assert model.embed(row for row in ([3, 1], [4, 1])).shape == (2, 16)


def test_the_config_is_checked():
    with pytest.raises(UserError, match="describes an encoder"):
        dataclasses.replace(CONFIG, num_decoder_layers=1)
    with pytest.raises(UserError, match="embed_dim must be at least 0"):
        dataclasses.replace(CONFIG, embed_dim=-1)
    assert t5_encoder(tiny.CONFIG) == T5EncoderConfig(**vars(tiny.CONFIG) | {"num_decoder_layers": 0})


def test_similarities_are_products_of_embeddings():
    """The right answer comes first; equal targets and rows of padding do not count."""
    rows, params = batch(CONFIG), params_of(CONFIG)
    targets = rows["decoder_target_tokens"]
    targets[3], targets[7] = targets[1], 0
    rows = jax.tree.map(jnp.asarray, rows)
    similarities, embeddings = (jax.jit(f, static_argnums=0) for f in (network.similarities, network.forward))
    got = np.asarray(similarities(CONFIG, params, rows))[:, 0] * CONFIG.temperature
    queries = np.asarray(embeddings(CONFIG, params, rows["encoder_input_tokens"]))
    answers = np.asarray(embeddings(CONFIG, params, rows["decoder_target_tokens"]))
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1.0, atol=1e-5)
    assert not answers[7].any()
    for i in range(8):
        for k in range(8):
            j = (i + k) % 8
            if j == 7 or {i, j} == {1, 3}:
                assert got[i, k] < -1e6
            else:
                np.testing.assert_allclose(got[i, k], queries[i] @ answers[j], atol=1e-5)
    (labels, weights), model = model_of(CONFIG).targets(rows)[""], model_of(CONFIG)
    assert not np.asarray(labels).any() and np.asarray(weights).ravel().tolist() == [1.0] * 7 + [0.0]
    assert model.feature_converter(True).pack is False


@pytest.mark.parametrize("name", ["t5_classes", "umt5_classes"])
def test_classes_are_those_of_transformers_and_come_back(golden, tmp_path, name):
    """Of T5ForSequenceClassification, whose head is on its decoder; the first row is a pair."""
    values, model = np.load(golden("families") / name / "values.npz"), t5x_lite.load(golden("families") / name)
    logits = model.classify(values["encoder_input_tokens"])
    np.testing.assert_allclose(logits, values["logits"], atol=1e-4)
    if name == "umt5_classes":
        assert model.predict(values["encoder_input_tokens"]) == pytest.approx(logits[:, 0].tolist())
    else:
        assert model.predict(values["encoder_input_tokens"]) == [str(i) for i in values["logits"].argmax(-1)]
    convert.convert(golden("families") / name, tmp_path / "back", "huggingface")
    (before, after) = (
        json.loads((x / "config.json").read_text()) for x in (golden("families") / name, tmp_path / "back")
    )
    assert (
        before["architectures"] == after["architectures"]
        and before["num_decoder_layers"] == after["num_decoder_layers"]
    )
    first, second = (tensors.read_hub(x) for x in (golden("families") / name, tmp_path / "back"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        np.testing.assert_array_equal(np.asarray(second[key]), np.asarray(tensor), err_msg=key)


def test_a_text_of_several_classes_is_refused(golden, tmp_path):
    folder = shutil.copytree(golden("families") / "t5_classes", tmp_path / "several")
    hub = json.loads((folder / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (folder / "config.json").write_text(json.dumps(hub))
    with pytest.raises(UserError, match=r"config.json: problem_type is 'multi_label_classification'"):
        t5x_lite.load(folder)


CLASSIFIER = t5_encoder(tiny.CONFIG, "classify", num_labels=2, labels=("no", "yes"))


def test_an_encoder_alone_gives_classes(tmp_path):
    """The head reads the mean output: dense, tanh, dense."""
    params = params_of(CLASSIFIER)
    saving.save_params(tmp_path / "own", params, info=convert.info(CLASSIFIER))
    model = t5x_lite.load(tmp_path / "own")
    tokens = np.array([[5, 6, 7, 1, 0], [8, 9, 1, 4, 1]], np.int32)
    encoded, head = np.asarray(model.encode(tokens)), jax.tree.map(np.asarray, params["classify"])
    mean = np.array([encoded[0, :4].mean(0), encoded[1].mean(0)])
    hidden = np.tanh(mean @ head["dense"]["kernel"] + head["dense"]["bias"])
    expected = hidden @ head["out"]["kernel"] + head["out"]["bias"]
    np.testing.assert_allclose(model.classify(tokens), expected, atol=1e-4)
    assert model.predict(tokens) == [("no", "yes")[i] for i in expected.argmax(-1)]
    with pytest.raises(UserError, match="head for classes, not for embeddings"):
        model.embed(tokens)
    with pytest.raises(UserError, match="T5ForSequenceClassification has a decoder"):
        convert.convert(tmp_path / "own", tmp_path / "theirs", "huggingface")
    with pytest.raises(UserError, match="head for embeddings, not for classes"):
        LoadedEncoder(CONFIG, params_of(CONFIG)).predict(tokens)
    for whole, fits in ((tiny.CONFIG, CLASSIFIER), (tiny.CONFIG, CONFIGS["encoder classifier"])):
        names = checkpoint.flat(convert.abstract_params(whole)).keys() - checkpoint.flat(convert.abstract_params(fits))
        assert names and all(re.search(model_of(fits).head_params, name) for name in names)
    decoder = [
        name for name in checkpoint.flat(convert.abstract_params(tiny.CONFIG)) if name.startswith("decoder/layers")
    ]
    assert not any(re.search(model_of(CONFIGS["encoder classifier"]).head_params, name) for name in decoder)


def test_pairs_and_long_texts_are_cut_aloud(caplog):
    bytes_vocabulary = ByteVocabulary()
    model = LoadedEncoder(CLASSIFIER, params_of(CLASSIFIER), bytes_vocabulary)
    a, b, c, d = bytes_vocabulary.encode("abcd")
    same = model.classify([("abcd", "ab"), "abcd"], max_length=6)
    np.testing.assert_allclose(same, model.classify([[a, b, 1, a, b, 1], [a, b, c, d, 1]]), atol=1e-5)
    assert "1 of 2 texts have more than max_length = 6 tokens, and are cut" in caplog.text
    embedding = LoadedEncoder(CONFIG, params_of(CONFIG), bytes_vocabulary)
    np.testing.assert_allclose(embedding.embed(["abcd"], max_length=3), embedding.embed([[a, b, 1]]), atol=1e-5)
    with pytest.raises(UserError, match="texts or rows of token ids"):
        embedding.embed([("ab", "cd")])


@pytest.mark.slow
def test_training_on_pairs_finds_them():
    """Each input is its target with every token's id one higher."""
    config = dataclasses.replace(CONFIG, embed_dim=16)
    optimizer = optim.make_optimizer(optim.adafactor(), optim.constant(0.02))
    random = np.random.default_rng(0)
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    abstract = step.abstract_state(config, optimizer, mesh)
    state = step.init_state(config, optimizer, jax.random.key(0), abstract)
    compiled = step.Compiler(mesh).train_step(abstract, config=config, optimizer=optimizer)
    accuracy = []
    for _ in range(50):
        rows = batch(config, rows=32)
        rows["decoder_target_tokens"] = random.integers(2, 60, (32, 16)).astype(np.int32)
        rows["encoder_input_tokens"] = np.pad(rows["decoder_target_tokens"] + 1, [(0, 0), (0, 8)])
        placed = sharding.shard_batch(rows, sharding.batch_sharding(mesh))
        state, metrics = compiled(state, placed, jax.random.key(1))
        accuracy.append(float(metrics["accuracy"]))
    assert np.mean(accuracy[:5]) < 0.4 < 0.75 < np.mean(accuracy[-5:])


def test_eight_devices_give_the_loss_of_one():
    params, rows = params_of(CONFIG), batch(CONFIG)
    losses = []
    for mesh in (sharding.make_mesh(1, devices=jax.devices()[:1]), sharding.make_mesh(fsdp=4, tensor=2)):
        abstract = step.abstract_params(CONFIG, mesh)
        placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), params, abstract)
        with sharding.use_mesh(mesh):
            sums = jax.jit(step.eval_step, static_argnames="config")(placed, rows, config=CONFIG)
        losses.append(float(sums[""]["loss"]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_whole_t5_is_a_starting_point(tmp_path):
    params = params_of(tiny.CONFIG)
    saving.save_params(tmp_path / "t5", params, info=convert.info(tiny.CONFIG))
    abstract = convert.abstract_params(dataclasses.replace(CONFIG, embed_dim=0))
    heads = model_of(CONFIG).head_params
    restored = checkpoint.restore_params(tmp_path / "t5", abstract, left_out=heads)
    assert restored.keys() == {"token_embedder", "encoder"}
    jax.tree.map(np.testing.assert_array_equal, restored["encoder"], params["encoder"])


def test_metrics_of_retrieval():
    queries = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]]
    answers = np.array([[1, 0, 0, 0], [0, 0.5, 0.9, 0], [0, 0.4, 0.8, 0], [0, 0, 0.1, 0]], np.float32)
    metrics, best, similarity = retrieved(queries, answers, np.array([0, 1, 2, 3, 1]))
    assert best.tolist() == [0, 1, 1, 0, 0] and similarity[2] == np.float32(0.9)
    # Ranks 1, 1, 2, 4 (all are equally far), 4.
    assert metrics["retrieval@1"] == 40.0 and metrics["retrieval@5"] == metrics["retrieval@10"] == 100.0
    assert metrics["mrr"] == pytest.approx(100 * (1 + 1 + 0.5 + 0.25 + 0.25) / 5)
    assert retrieved(queries * np.nan, answers, np.arange(5) % 4)[0]["mrr"] == 25.0, "NaN is not near"
