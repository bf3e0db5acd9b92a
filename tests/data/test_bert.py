"""BERT's pre-training examples: what is in a pair, what is masked, and that a position can be replayed."""

import gzip
import json

import jax
import numpy as np
import pytest
import seqio

from t5x_lite import sharding
from t5x_lite.bert import BertConfig
from t5x_lite.bert.feature_converters import PretrainingFeatureConverter
from t5x_lite.data import inspection, pipeline
from t5x_lite.training import step
from t5x_lite.training.losses import LossConfig
from t5x_lite.training.optim import adamw, constant, make_optimizer
from tasks import bert, vocabulary

LENGTHS = {"inputs": 64}
SENTENCES, DOCUMENTS = 12, 30

CONVERTER = PretrainingFeatureConverter()


@pytest.fixture
def examples(corpus, bytes_vocabulary):
    """Documents in which the letter tells the document and the number the sentence."""
    (corpus / "c4").mkdir()
    with gzip.open(corpus / "c4/c4-train.00000-of-00001.json.gz", "wt") as file:
        for i in range(DOCUMENTS):
            text = " ".join(f"{chr(0x41 + i)} says {k:02d}." for k in range(SENTENCES))
            file.write(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n")

    def read(seed=0):
        task = seqio.TaskRegistry.get("c4_v220_bert")
        return list(task.get_dataset(LENGTHS, "train", shuffle=False, seed=seed).as_numpy_iterator())

    return read


def original(x):
    return np.where(x["targets"] > 0, x["targets"], x["inputs"])


def parts(x):
    """The texts of A and B."""
    ids = bert.special(vocabulary.default_vocabulary())
    tokens = original(x)
    cls, *_ = tokens
    (first_sep, second_sep) = np.flatnonzero(tokens == ids.sep)
    assert (cls, second_sep) == (ids.cls, len(tokens) - 1)
    assert x["segments"].tolist() == [0] * (first_sep + 1) + [1] * (second_sep - first_sep)
    decode = vocabulary.default_vocabulary().decode
    return decode(tokens[1:first_sep].tolist()), decode(tokens[first_sep + 1 : second_sep].tolist())


def letter(text):
    return {c for c in text if 0x41 <= ord(c) < 0x41 + DOCUMENTS}


def test_b_follows_a_or_comes_from_another_document(examples):
    made = examples()
    labels = []
    for x in made:
        a, b = parts(x)
        assert a
        assert b
        assert len(x["inputs"]) == len(x["targets"]) <= LENGTHS["inputs"]
        (is_random,) = x["random"]
        labels.append(is_random)
        if letter(a) and letter(b):
            assert (letter(a) != letter(b)) == bool(is_random)
    assert abs(np.mean(labels) - 0.5) < 5 * np.sqrt(0.25 / len(labels)) + 0.05  # a last single sentence is random too


def test_a_seventh_is_chosen_and_four_fifths_of_that_masked(examples):
    made = [x for seed in range(4) for x in examples(seed)]
    ids = bert.special(vocabulary.default_vocabulary())
    chosen = np.concatenate([x["targets"][x["targets"] > 0] for x in made])
    given = np.concatenate([x["inputs"][x["targets"] > 0] for x in made])
    assert not np.isin(chosen, [ids.cls, ids.sep]).any()
    counts = [(x["targets"] > 0).sum() for x in made]
    assert counts == [max(1, min(round(0.15 * len(x["inputs"])), 20 * len(x["inputs"]) // 128)) for x in made]
    spread = 5 * np.sqrt(0.25 / len(chosen))
    assert abs(np.mean(given == ids.mask) - 0.8) < spread
    assert abs(np.mean(given == chosen) - 0.1) < spread


def test_a_seed_fixes_the_examples(examples):
    first, again, other = examples(1), examples(1), examples(2)
    for x, y in zip(first, again, strict=True):
        assert all(np.array_equal(x[k], y[k]) for k in x)
    assert [x["inputs"].tolist() for x in first] != [x["inputs"].tolist() for x in other]


def test_word_pieces_have_their_own_special_tokens(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    assert bert.special(seqio.BertWordPieceVocabulary(str(path))) == (2, 3, 4)
    with pytest.raises(ValueError, match="VOCABULARY_EXTRA_IDS = 3"):
        bert.special(seqio.PassThroughVocabulary(300))


@pytest.mark.exhaustive
def test_bert_trains_on_the_task_in_micro_batches_on_a_mesh(examples):
    batches = pipeline.TrainBatches("c4_v220_bert", LENGTHS, batch_size=8, seed=0, converter=CONVERTER)
    batch = next(batches)
    assert {name: x.shape for name, x in batch.items()} == batches.shapes
    assert batch["random"].shape == (8, 1) and batch["segments"].shape == (8, 64)
    text = inspection.describe_batch(batch, vocabulary.default_vocabulary())
    assert "says" in text and "the second part" in text

    config = BertConfig(d_model=16, d_ff=24, num_heads=2, num_layers=2, vocab_size=384, max_length=64, dropout_rate=0.0)
    optimizer = make_optimizer(adamw(rms_scaling=False), constant(0.02))
    mesh = sharding.make_mesh(2, 2, 1, devices=jax.devices()[:4])
    abstract = step.abstract_state(config, optimizer, mesh)
    options = {"config": config, "optimizer": optimizer, "loss": LossConfig(0.0, 0.0, "NUM_REAL_TARGET_TOKENS")}
    rows = sharding.shard_batch(batch, sharding.batch_sharding(mesh))
    curves = []
    for parts in (1, 2):
        train = step.Compiler(mesh).train_step(abstract, num_microbatches=parts, **options)
        state = step.init_state(config, optimizer, jax.random.key(0), abstract)
        curves.append([])
        for _ in range(15):
            state, metrics = train(state, rows, jax.random.key(1))
            curves[-1].append({name: float(x) for name, x in metrics.items()})
    first, last = curves[0][0], curves[0][-1]
    assert first["loss"] == pytest.approx(first["mlm_loss"] + first["nsp_loss"])
    assert last["loss"] < 0.8 * first["loss"] and abs(first["nsp_loss"] - np.log(2)) < 0.1
    assert first["target_tokens"] == np.count_nonzero(batch["targets"])
    for whole, parted in zip(*curves, strict=True):
        assert whole["loss"] == pytest.approx(parted["loss"], rel=1e-3)


def test_a_task_for_another_kind_of_model_is_refused(examples):
    with pytest.raises(ValueError, match="also needs segments, random"):
        pipeline.TrainBatches("c4_v220_lm", LENGTHS, batch_size=8, seed=0, converter=CONVERTER)
    with pytest.raises(ValueError, match="must give a length for inputs and nothing else"):
        pipeline.TrainBatches("c4_v220_bert", {**LENGTHS, "targets": 9}, batch_size=8, seed=0, converter=CONVERTER)
