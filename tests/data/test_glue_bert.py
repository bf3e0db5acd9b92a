"""GLUE for BERT: rows and segments, WordPiece as Hugging Face has it, and fine-tuning from a pre-trained encoder."""

import dataclasses
import json
import logging
import pathlib
import re

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny

import t5x_lite
from t5x_lite import convert
from t5x_lite.bert import BertConfig
from t5x_lite.bert.feature_converters import ClassifierFeatureConverter
from t5x_lite.bert.wordpiece import WordPiece
from t5x_lite.checkpoint import saving
from t5x_lite.cli import main as run
from t5x_lite.data import inspection, pipeline
from t5x_lite.data.feature_converters import pair
from t5x_lite.inference import classification
from t5x_lite.t5_encoder import t5_encoder
from t5x_lite.training import step
from t5x_lite.training.optim import adamw, constant, make_optimizer
from tasks import bert, glue_classes, vocabulary
from tasks.vocabulary import WordPieceVocabulary


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def rows(name, length=16, split="train"):
    task = seqio.TaskRegistry.get(f"glue_{name}_bert")
    return list(task.get_dataset({"inputs": length}, split, shuffle=False).as_numpy_iterator())


def test_one_sentence_two_sentences_and_a_number(corpus, bytes_vocabulary):
    cls, sep, _ = bert.special(bytes_vocabulary)
    a, b, c = bytes_vocabulary.encode("abc")
    write(
        corpus / "glue/RTE/train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tab\tc\tnot_entailment\n1\ta\t\tentailment\n",
    )
    write(corpus / "glue/RTE/test.tsv", "index\tsentence1\tsentence2\n0\ta\tb\n")
    write(corpus / "glue/SST-2/train.tsv", "sentence\tlabel\nabc\t1\n")
    write(corpus / "glue/STS-B/train.tsv", "index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.5\n")
    pair, empty = rows("rte")
    assert pair["inputs"].tolist() == [cls, a, b, sep, c, sep]
    assert pair["segments"].tolist() == [0, 0, 0, 0, 1, 1]
    assert pair["label"].tolist() == [1]
    assert pair["inputs_pretokenized"] == b"ab [SEP] c"
    assert empty["inputs"].tolist() == [cls, a, sep, sep]
    assert empty["segments"].tolist() == [0, 0, 0, 1]
    assert rows("rte", split="test")[0]["label"].tolist() == [-1]
    (single,) = rows("sst2")
    assert single["inputs"].tolist() == [cls, a, b, c, sep]
    assert not single["segments"].any()
    assert rows("sst2", 5)[0]["inputs"].tolist() == [cls, a, b, c, sep]
    (number,) = rows("stsb")
    assert number["label"].dtype == np.float32
    assert number["label"].tolist() == [2.5]
    with pytest.raises(ValueError, match="needs 5 tokens"):
        rows("rte", 4)


def cut_as_published(first, second, room):
    """_truncate_seq_pair of google-research/bert in words: pop the last of the longer, of the second where equal."""
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        (first if len(first) > len(second) else second).pop()
    return first, second


def test_what_is_too_long_is_cut_as_published(bytes_vocabulary):
    cls, sep, _ = bert.special(bytes_vocabulary)
    features = seqio.TaskRegistry.get("glue_rte_bert").output_features
    lengths = [(n, m) for n in range(1, 8) for m in range(8)]
    examples = [(np.arange(10, 10 + n), np.arange(20, 20 + m)) for n, m in lengths]
    given = tf.data.Dataset.from_generator(
        lambda: ({"first": n, "second": m} for n, m in examples),
        output_signature=dict.fromkeys(("first", "second"), tf.TensorSpec([None], tf.int32)),
    )
    for length in (5, 6, 9, 20):
        made = list(glue_classes.pairs(given, {"inputs": length}, features).as_numpy_iterator())
        for (n, m), x in zip(examples, made, strict=True):
            first, second = cut_as_published(n, m, length - 3)
            assert x["inputs"].tolist() == [cls, *first, sep, *second, sep]
            assert x["segments"].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
            for ours, theirs in zip(
                pair(n.tolist(), m.tolist(), [cls], sep, length), (x["inputs"], x["segments"]), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs)
        plain = seqio.TaskRegistry.get("glue_rte_classes").output_features
        for (n, m), x in zip(
            examples, glue_classes.pairs(given, {"inputs": length}, plain).as_numpy_iterator(), strict=True
        ):
            first, second = cut_as_published(n, m, length - 2)
            assert x["inputs"].tolist() == [*first, 1, *second, 1]
            assert x["inputs"].tolist() == pair(n.tolist(), m.tolist(), [], 1, length)[0].tolist()
            assert "segments" not in x
    single, _ = pair(range(10, 20), None, [cls], sep, 5)
    assert single.tolist() == [cls, 10, 11, 12, sep]


def test_every_task_of_glue_has_its_classes_and_metrics():
    names = (
        "cola",
        "sst2",
        "mrpc",
        "qqp",
        "stsb",
        "mnli",
        "mnli_matched",
        "mnli_mismatched",
        "qnli",
        "rte",
        "wnli",
        "ax",
    )
    for name in names:
        count = {"stsb": 1, "mnli": 3, "mnli_matched": 3, "mnli_mismatched": 3, "ax": 3}.get(name, 2)
        bert_task, task, text = (seqio.TaskRegistry.get(f"glue_{name}_{form}") for form in ("bert", "classes", "v002"))
        label = task.output_features["label"]
        assert label == bert_task.output_features["label"]
        assert label.vocabulary.vocab_size == count
        assert label.dtype == (tf.float32 if name == "stsb" else tf.int32)
        assert task.metric_fns == bert_task.metric_fns == text.metric_fns
        assert task.source is bert_task.source is text.source


def test_a_model_with_another_number_of_classes_is_refused():
    features = pipeline.find_provider("glue_mnli_bert").output_features
    two = BertConfig(**SIZES, heads=("pooler", "classify"), num_labels=2)
    with pytest.raises(ValueError, match=r"3 classes .*entailment, neutral.* --gin.BertConfig.num_labels=3"):
        two.for_task("glue_mnli_bert", features)
    three = dataclasses.replace(two, num_labels=3).for_task("glue_mnli_bert", features)
    assert three.labels == ("entailment", "neutral", "contradiction")
    other = dataclasses.replace(three, labels=("contradiction", "entailment", "neutral"))
    with pytest.raises(ValueError, match=r"its class 0 is another one. --gin.BertConfig.labels=\(\)"):
        other.for_task("glue_mnli_bert", features)
    encoder = t5_encoder(tiny.CONFIG, "classify", num_labels=3)
    with pytest.raises(ValueError, match=r"has BERT's rows.*glue_..._classes"):
        encoder.for_task("glue_mnli_bert", features)
    classes = pipeline.find_provider("glue_rte_classes").output_features
    with pytest.raises(ValueError, match=r"t5_encoder.num_labels=2, or T5EncoderConfig.num_labels"):
        encoder.for_task("glue_rte_classes", classes)


def test_tasks_of_other_classes_do_not_mix(corpus, bytes_vocabulary):
    for name in ("RTE", "WNLI"):
        write(corpus / f"glue/{name}/train.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n")
    seqio.MixtureRegistry.add("glue_bert_mix", ["glue_rte_bert", "glue_wnli_bert"], default_rate=1)
    with pytest.raises(ValueError, match="must use the same vocabulary"):
        pipeline.TrainBatches(
            "glue_bert_mix", {"inputs": 16}, batch_size=2, seed=0, converter=ClassifierFeatureConverter()
        )
    seqio.MixtureRegistry.remove("glue_bert_mix")


# WordPiece. The tokens are those of transformers' BertTokenizer (5.23) on this vocabulary.

PIECES = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the un ##aff ##able ##s cafe é café The stra ##ss ##ß ##e . , ! ' $ - ( ) 1 ##2 "
    "##3 中 国 ##中 a ##b # ° ” hello world Hello ##a i"
).split()
TEXTS = [
    "The unaffable café!",
    "unaffables, (123) straße",
    "hello\u00a0world\thello\u200bworld\u3000a",
    "中国a中 a中b",
    "Hello's $12-°# ”world”",
    "ab\u0301 CAFÉ xyz \ufffd İ",
    "a" * 100 + " " + "a" * 101 + " .",
]
EXPECTED = {  # by whether text is lower-cased
    True: [
        [5, 6, 7, 8, 10, 20],
        [6, 7, 8, 9, 19, 24, 26, 27, 28, 25, 14, 16, 17],
        [37, 38, 1, 32],
        [29, 30, 32, 29, 32, 29, 1],
        [37, 21, 1, 22, 26, 27, 23, 35, 34, 36, 38, 36],
        [32, 33, 10, 1, 41],
        [32, *[40] * 99, 1, 18],
    ],
    False: [
        [13, 6, 7, 8, 12, 20],
        [6, 7, 8, 9, 19, 24, 26, 27, 28, 25, 14, 16, 17],
        [37, 38, 1, 32],
        [29, 30, 32, 29, 32, 29, 1],
        [39, 21, 1, 22, 26, 27, 23, 35, 34, 36, 38, 36],
        [1, 1, 1, 1],
        [32, *[40] * 99, 1, 18],
    ],
}


def wordpieces(folder, lower):
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    return WordPieceVocabulary(str(folder / "vocab.txt")), WordPiece(folder / "vocab.txt")


@pytest.mark.parametrize("lower", [True, False])
def test_wordpieces_are_hugging_faces(tmp_path, lower):
    ours, without_tensorflow = wordpieces(tmp_path, lower)
    assert [list(ours.encode(text)) for text in TEXTS] == EXPECTED[lower]
    assert [without_tensorflow.encode(text) for text in TEXTS] == EXPECTED[lower]
    in_dataset = tf.data.Dataset.from_tensor_slices(TEXTS).map(ours.encode_tf)
    assert [x.tolist() for x in in_dataset.as_numpy_iterator()] == EXPECTED[lower]
    assert bert.special(ours) == (2, 3, 4)
    assert ours.vocab_size == len(without_tensorflow) == len(PIECES)
    assert ours.decode([2, 6, 7, 8, 3, 999, 0]) == without_tensorflow.decode([2, 6, 7, 8, 3, 999, 0])
    assert ours.decode([2, 6, 7, 8, 3]) == "[CLS] unaffable [SEP]"


def test_the_case_is_that_of_the_config_or_of_the_pieces(tmp_path):
    vocab, config = tmp_path / "vocab.txt", tmp_path / "tokenizer_config.json"
    for pieces, said, lower in (
        (PIECES, None, False),
        ([piece for piece in PIECES if piece not in ("The", "Hello")], None, True),
        (PIECES, {}, True),
        (PIECES, {"do_lower_case": False, "strip_accents": None}, False),
    ):
        vocab.write_text("\n".join(pieces), encoding="utf-8")
        config.unlink(missing_ok=True)
        if said is not None:
            config.write_text(json.dumps(said))
        assert (WordPieceVocabulary(str(vocab)).lower_case, WordPiece(vocab)._lower_case) == (lower, lower)


# Text and pieces of transformers 5.23's BertTokenizer, by its switches.
SWITCHES = {
    (True, None): "hello caf ##e",
    (True, False): "hello caf ##é",
    (False, True): "Hello caf ##e",
    (False, None): "Hello caf ##é",
}


@pytest.mark.parametrize(("lower", "strip"), SWITCHES)
def test_accents_and_case_are_switches_of_their_own(tmp_path, lower, strip):
    vocab = tmp_path / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "caf", "##e", "##é", "中", "文", "中文"]
    vocab.write_text("\n".join(pieces), encoding="utf-8")
    config = {"do_lower_case": lower, "strip_accents": strip}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = [pieces.index(piece) for piece in SWITCHES[lower, strip].split()]
    assert WordPiece(vocab).encode("Hello café") == list(WordPieceVocabulary(str(vocab)).encode("Hello café")) == ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenize_chinese_chars": False}))
    assert WordPiece(vocab).encode("中文") == [12]
    with pytest.raises(ValueError, match="tokenize_chinese_chars is False"):
        WordPieceVocabulary(str(vocab))


def test_what_is_no_vocab_txt_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no WordPiece vocabulary at .*absent.txt"):
        vocabulary.set_default(str(tmp_path / "absent.txt"))
    path = tmp_path / "vocab.txt"
    for text, said in (
        ("[PAD]\na\n", r"lacks \[UNK\], \[CLS\]"),
        ("a\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", "line 2"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            WordPieceVocabulary(str(path))
        with pytest.raises(ValueError, match="not a BERT vocab"):
            WordPiece(path)


def test_a_position_among_wordpieces_can_be_gone_on_from(corpus, tmp_path):
    wordpieces(tmp_path, True)
    vocabulary.set_default(str(tmp_path / "vocab.txt"))
    text = "".join(f"{i}\tHello world {i % 4}\tthe café\t{i / 3}\n" for i in range(12))
    write(corpus / "glue/STS-B/train.tsv", f"index\tsentence1\tsentence2\tscore\n{text}")

    def batches():
        return pipeline.TrainBatches(
            "glue_stsb_bert",
            {"inputs": 12},
            batch_size=2,
            seed=3,
            converter=ClassifierFeatureConverter(regression=True),
        )

    first = batches()
    for _ in range(4):
        batch = next(first)
    first.save(str(tmp_path / "position"))
    expected = [next(first) for _ in range(5)]
    again = batches()
    again.restore(str(tmp_path / "position"))
    for one, other in zip(expected, [next(again) for _ in range(5)], strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "inputs": ((2, 12), np.int32),
        "segments": ((2, 12), np.int32),
        "label": ((2, 1), np.float32),
    }
    said = inspection.describe_batch(batch, vocabulary.default_vocabulary())
    assert f"label {batch['label'][0, 0]}" in said
    assert "first:  [CLS] hello world" in said
    vocabulary.set_default(None)


# Evaluation


def test_metrics_and_predictions_are_of_the_classes(corpus, bytes_vocabulary, tmp_path):
    labels = ["entailment", "not_entailment", "not_entailment"]
    text = "".join(f"{i}\ta{i}\tb\t{label}\n" for i, label in enumerate(labels))
    write(corpus / "glue/RTE/dev.tsv", f"index\tsentence1\tsentence2\tlabel\n{text}")
    write(corpus / "glue/STS-B/dev.tsv", "index\tsentence1\tsentence2\tscore\n0\ta\tb\t1\n1\ta\tc\t2\n2\ta\td\t4\n")

    def second_class(batch):
        assert batch["inputs"].shape == batch["segments"].shape == (2, 16)
        return np.tile([0.0, np.log(3)], (2, 1))

    evaluation = classification.Evaluation("glue_rte_bert", {"inputs": 16}, batch_size=2, predictions=tmp_path)
    assert evaluation.run(second_class, step=3) == {"glue_rte_bert": {"accuracy": pytest.approx(200 / 3)}}
    first, *_ = map(json.loads, (tmp_path / "glue_rte_bert-3.jsonl").read_text().splitlines())
    assert first == {
        "inputs": "a0 [SEP] b",
        "targets": "entailment",
        "prediction": "not_entailment",
        "score": pytest.approx(np.log(0.75)),
    }

    evaluation = classification.Evaluation("glue_stsb_bert", {"inputs": 16}, batch_size=4, predictions=tmp_path)
    said = evaluation.run(lambda batch: batch["inputs"][:, 3:4] * -1.0, step=0)  # of the second sentence's letter
    assert said["glue_stsb_bert"]["spearman_corrcoef"] == pytest.approx(-100)
    assert "score" not in (tmp_path / "glue_stsb_bert-0.jsonl").read_text()
    with pytest.raises(ValueError, match=r"shape \(4, 16\), expected .* \(4, 1\)"):
        evaluation.run(lambda batch: batch["inputs"], step=0)


# The whole way, from gin

SIZES = {"d_model": 24, "d_ff": 40, "num_heads": 3, "num_layers": 1, "vocab_size": 384, "max_length": 20}
GIN = """
include 'runs/finetune_bert.gin'
Run.model = @BertConfig()
VOCABULARY = "bytes"
TASK_FEATURE_LENGTHS = {"inputs": 16}
MIXTURE_OR_TASK_NAME = "glue_rte_bert"
TRAIN_STEPS = 6
WARMUP_STEPS = 0
LEARNING_RATE = 0.01
DROPOUT_RATE = 0.0
BATCH_SIZE = 32
DTYPE = "float32"
EVAL_PERIOD = 6
CHECKPOINT_PERIOD = 6
KEEP_BEST_METRIC = "glue_rte_bert/accuracy"
MODEL_DIR = "tuned"
"""


@pytest.fixture
def command(corpus, bytes_vocabulary, monkeypatch, capsys):
    """Runs the command on pairs of a toy RTE, where what follows is what comes again."""
    monkeypatch.chdir(corpus)
    handlers = logging.getLogger().handlers[:]
    rng = np.random.default_rng(0)
    for name, count in (("train", 128), ("dev", 40)):
        text = "index\tsentence1\tsentence2\tlabel\n"
        for i in range(count):
            first, same = rng.choice(["aaa", "zzz"]), rng.random() < 0.5
            second = first if same else {"aaa": "zzz", "zzz": "aaa"}[first]
            text += f"{i}\t{first}\t{second}\t{'entailment' if same else 'not_entailment'}\n"
        write(corpus / f"glue/RTE/{name}.tsv", text)
    pathlib.Path("mine.gin").write_text(GIN + "".join(f"BertConfig.{k} = {v}\n" for k, v in SIZES.items()))

    def execute(*arguments: str, code: int = 0) -> str:
        assert run.main(["run.py", "--gin_file=mine.gin", *arguments]) == code
        out, err = capsys.readouterr()
        return out + err if code == 0 else err

    yield execute
    logging.getLogger().handlers[:] = handlers


def jsonl(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def records(folder, split):
    return [record for record in jsonl(f"{folder}/metrics.jsonl") if record["split"] == split]


@pytest.mark.slow
def test_a_pretrained_encoder_is_fine_tuned_evaluated_and_asked(command):
    pretrained = BertConfig(**SIZES)
    optimizer = make_optimizer(adamw(), constant(1.0))
    abstract = step.abstract_state(pretrained, optimizer, t5x_lite.make_mesh(1, devices=jax.devices()[:1]))
    start = step.init_state(pretrained, optimizer, jax.random.key(7), abstract).params
    saving.save_params("pretrained", start, info={"model": dataclasses.asdict(pretrained)})

    initial = "--gin.INITIAL_CHECKPOINT_PATH='pretrained'"
    said = command(initial)
    assert "keep their initial values: classify/bias, classify/kernel" in said
    assert "are not read: mlm/bias" in said
    assert "nsp/kernel" in said
    losses = [record["loss"] for record in records("tuned", "train")]
    scores = records("tuned", "validation")
    assert [record["step"] for record in scores] == [6]
    assert scores[-1].keys() >= {"classify_loss", "classify_accuracy", "accuracy"}
    assert scores[-1]["accuracy"] == pytest.approx(100 * scores[-1]["classify_accuracy"])
    assert losses[0] == pytest.approx(np.log(2), abs=0.1)

    predicted = jsonl("tuned/predictions/glue_rte_bert-6.jsonl")
    assert len(predicted) == 40
    model = t5x_lite.load("tuned")
    assert model.config.labels == ("entailment", "not_entailment")
    tokens, segments = (np.array(x) for x in zip(*(x.values() for x in _tokens(predicted)), strict=True))
    said = [model.config.labels[i] for i in np.argmax(model.classify(tokens, segments), -1)]
    assert said == [row["prediction"] for row in predicted]

    lines = [{"sentence1": "aaa", "sentence2": "zzz", "targets": "not_entailment"}, {"inputs": "aaa"}]
    pathlib.Path("ask.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ask = (initial, "--mode=infer", "--gin.INFER_INPUT='ask.jsonl'", "--gin.INFER_OUTPUT='answers.jsonl'")
    command(*ask)
    pair, single = jsonl("answers.jsonl")
    assert pair["inputs"] == "aaa [SEP] zzz"
    assert pair["targets"] == "not_entailment"
    known = {row["inputs"]: row for row in predicted}["aaa [SEP] zzz"]
    assert pair["prediction"] == known["prediction"]
    assert pair["score"] == pytest.approx(known["score"], abs=1e-4)
    assert single.keys() == {"inputs", "prediction", "score"}
    pathlib.Path("ask.jsonl").write_text('{"sentence1": "aaa"}\n')
    assert "ask.jsonl:1" in command(*ask[:-1], "--gin.INFER_OUTPUT='other.jsonl'", code=2)
    assert "--mode=score is for models that generate text" in command(initial, "--mode=score", code=2)
    said = command(initial, "--gin.BertConfig.num_labels=3", "--gin.MODEL_DIR='three'", code=2)
    assert "num_labels=2" in said


@pytest.mark.slow
def test_the_encoder_of_a_t5_learns_classes(command):
    """With and without the decoder of T5ForSequenceClassification, which comes back from Hugging Face's format."""
    sizes = {"d_model": 24, "d_ff": 40, "num_heads": 3, "head_dim": 8, "num_encoder_layers": 1, "num_decoder_layers": 1}
    sizes |= {"vocab_size": 384, "relative_buckets": 8, "relative_max_distance": 16}
    body = GIN.replace("_bert", "_classes").replace("Run.model = @BertConfig()\n", "")
    encoder = "include 'models/t5_encoder.gin'\n" + body + "".join(f"T5Config.{k} = {v}\n" for k, v in sizes.items())
    whole = sizes | {"head": "'classify'", "num_labels": 2}
    decoder = body + "Run.model = @T5EncoderConfig()\nMODEL_DIR = 'whole'\n"
    decoder += "".join(f"T5EncoderConfig.{k} = {v}\n" for k, v in whole.items())
    initial, ask = "--gin.INITIAL_CHECKPOINT_PATH=None", ("--mode=infer", "--gin.INFER_INPUT='ask.jsonl'")
    pathlib.Path("ask.jsonl").write_text(json.dumps({"sentence1": "aaa", "sentence2": "zzz"}) + '\n{"inputs": "aaa"}\n')
    for gin, folder in ((encoder, "tuned"), (decoder, "whole")):
        pathlib.Path("mine.gin").write_text(gin)
        assert "--mode=infer" in command(initial)
        (scores,) = records(folder, "validation")
        assert scores["accuracy"] == pytest.approx(100 * scores["classify_accuracy"])
        predicted = jsonl(f"{folder}/predictions/glue_rte_classes-6.jsonl")
        assert len(predicted) == 40
        model = t5x_lite.load(folder)
        assert model.config.labels == ("entailment", "not_entailment")
        texts = [tuple(row["inputs"].split(" </s> ")) for row in predicted]
        assert model.predict(texts) == [row["prediction"] for row in predicted]
        command(initial, *ask, f"--gin.INFER_OUTPUT='{folder}.jsonl'")
        pair_row, single = jsonl(f"{folder}.jsonl")
        assert pair_row["inputs"] == "aaa </s> zzz" and single["inputs"] == "aaa"
        assert pair_row["prediction"] == model.predict([("aaa", "zzz")])[0]
    pathlib.Path("ask.jsonl").write_text('{"inputs": "aaa </s> zzz"}\n')
    command(initial, *ask, "--gin.INFER_OUTPUT='again.jsonl'")
    assert jsonl("again.jsonl") == [pair_row]
    pathlib.Path("ask.jsonl").write_text('{"sentence1": "aaa </s> zzz", "sentence2": "zzz"}\n')
    command(initial, *ask, "--gin.INFER_OUTPUT='text.jsonl'")  # a column is one text, whatever it holds
    assert jsonl("text.jsonl")[0]["inputs"] == "aaa </s> zzz </s> zzz"
    pathlib.Path("ask.jsonl").write_text('{"inputs": "aaa", "sentence1": "zzz"}\n')
    assert "inputs and sentence1" in command(initial, *ask, "--gin.INFER_OUTPUT='both.jsonl'", code=2)
    with pytest.raises(ValueError, match="a tuple of two"):
        model.predict(("aaa", "zzz"))
    convert.convert("whole", "hub", "huggingface")
    assert t5x_lite.load("hub").predict(texts) == [row["prediction"] for row in predicted]
    said = command(initial, "--gin.MIXTURE_OR_TASK_NAME='glue_mnli_classes'", "--gin.MODEL_DIR='mnli'", code=2)
    assert "3 classes" in said
    said = command(initial, "--mode=inspect")
    assert re.search(r"label [01]\n  first:  (aaa|zzz)\n  second: (aaa|zzz)\n", said)


def _tokens(predicted):
    vocab = vocabulary.default_vocabulary()
    ids = bert.special(vocab)
    for row in predicted:
        first, second = (vocab.encode(text) for text in row["inputs"].split(" [SEP] "))
        inputs, segments = pair(first, second, [ids.cls], ids.sep, 16)
        yield {"inputs": np.pad(inputs, (0, 16 - len(inputs))), "segments": np.pad(segments, (0, 16 - len(segments)))}


@pytest.mark.slow
def test_from_real_text_to_mrpc_and_back_from_hugging_face(data_dir, tmp_path, monkeypatch, capsys):
    """Pre-trained on C4 and fine-tuned on MRPC by the commands that the reports name; then gone on with elsewhere."""
    monkeypatch.chdir(tmp_path)
    vocabulary.set_default(None)
    handlers = logging.getLogger().handlers[:]
    sizes = SIZES | {"vocab_size": 32128, "max_length": 64}
    common = ["DTYPE='float32'", "BATCH_SIZE=16", "EVAL_STEPS=1", "LOG_PERIOD=1", "WARMUP_STEPS=1"]
    common += [f"BertConfig.{name}={value}" for name, value in sizes.items()] + ["TASK_FEATURE_LENGTHS={'inputs': 64}"]

    def command(*arguments):
        assert run.main(["run.py", *arguments, *(f"--gin.{binding}" for binding in common)]) == 0
        return capsys.readouterr().out

    said = command(
        "--gin_file=models/bert.gin",
        "--gin_file=runs/pretrain_bert.gin",
        "--gin.MODEL_DIR='bert'",
        "--gin.TRAIN_STEPS=4",
    )
    assert records("bert", "train")[-1].keys() >= {"mlm_loss", "nsp_loss"}
    assert "--mode=infer" not in said
    hinted = [word for word in said.replace("\\\n", " ").replace('"', "").split() if word.startswith("--gin")]
    hinted = hinted[hinted.index("--gin_file=runs/finetune_bert.gin") - 1 :]  # all of one command
    said = command(*hinted, "--gin.TRAIN_STEPS=4", "--gin.EVAL_EXAMPLES=50")
    assert "--mode=infer" in said
    (scores,) = records("runs/mrpc", "validation")
    assert scores["task"] == "glue_mrpc_bert"
    assert scores.keys() >= {"f1", "accuracy", "classify_loss"}
    rows = jsonl("runs/mrpc/predictions/glue_mrpc_bert-4.jsonl")
    assert len(rows) == 50
    right = [row["targets"] == row["prediction"] for row in rows]
    assert scores["accuracy"] == pytest.approx(100 * np.mean(right))

    evaluated = command(*hinted, "--gin.TRAIN_STEPS=4", "--gin.EVAL_EXAMPLES=50", "--mode=eval")
    assert f"{scores['f1']:.4g}" in evaluated

    # Out to Hugging Face's format, in again, and asked in Python: the same predictions of the same text.
    convert.convert("runs/mrpc", "hub", "huggingface")
    again = t5x_lite.load("hub")
    assert again.config.labels == ("not_equivalent", "equivalent")
    texts = [tuple(row["inputs"].split(" [SEP] ")) for row in rows[:20]]
    cut = t5x_lite.load("runs/mrpc").predict(texts)
    assert again.predict(texts) == cut == [row["prediction"] for row in rows[:20]]
    logging.getLogger().handlers[:] = handlers
