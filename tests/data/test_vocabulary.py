"""The shared vocabulary: lazy, replaceable, and the same for every task."""

import copy
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import sentencepiece
import seqio
import tensorflow as tf
from core.test_tokenizer import GEMMA_FILES, HUGGING_FACE, MISTAKES, TEXTS, described, gemma, mistaken
from sentencepiece import sentencepiece_model_pb2

from t5x_lite import convert
from t5x_lite.cli import task_setup
from t5x_lite.convert import tokenizer
from t5x_lite.data import pipeline
from t5x_lite.run_config import RunConfig
from tasks import bert, objectives, ul2, vocabulary
from tasks.vocabulary import __main__ as command
from tasks.vocabulary import report, texts
from tasks.vocabulary.words import WordEncoder

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_import_reads_nothing():
    code = (
        "import tasks, seqio\n"
        "from tasks import vocabulary\n"
        "assert vocabulary._t5 is None and 't5x_lite' not in __import__('sys').modules\n"
        "assert 'glue_cola_v002' in seqio.TaskRegistry.names()\n"
    )
    environment = os.environ | {"T5X_LITE_DATA_DIR": "/nowhere"}  # would be refused if it were looked at
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPO, check=True)


def test_one_object_for_all_tasks_that_can_be_replaced(bytes_vocabulary):
    features = [
        seqio.get_mixture_or_task(name).output_features[key]
        for name in ("glue_cola_v002", "squad_v110", "c4_glue_squad_proportional")
        for key in ("inputs", "targets")
    ]
    assert {id(f.vocabulary) for f in features} == {id(vocabulary.SHARED)}
    shared = features[0].vocabulary
    assert shared.vocab_size == 256 + 3 + 100
    assert shared.extra_ids == 100
    assert shared.eos_id == 1
    assert shared.encode("a") == [100] == shared.encode_tf("a").numpy().tolist()
    assert shared.decode([100, 1, 101]) == "a"
    assert shared.decode_tf(tf.constant([100])).numpy() == b"a"
    assert shared == bytes_vocabulary
    assert shared != seqio.PassThroughVocabulary(5)


def test_copies_are_the_same_object():
    assert copy.deepcopy(vocabulary.SHARED) is vocabulary.SHARED
    assert pickle.loads(pickle.dumps(vocabulary.SHARED)) is vocabulary.SHARED
    assert hash(vocabulary.SHARED) == hash(copy.copy(vocabulary.SHARED))


def test_a_missing_model_is_named_with_the_cure(tmp_path, corpus, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no SentencePiece model at .*nothing\.model.*T5X_LITE_DATA_DIR"):
        vocabulary.set_default(str(tmp_path / "nothing.model"))
    monkeypatch.setattr(vocabulary, "T5_MODEL", str(tmp_path / "public.model"))
    with pytest.raises(
        FileNotFoundError, match=r"vocab/sentencepiece\.model does not exist.*public\.model.*VOCABULARY"
    ):
        vocabulary.default_vocabulary()


def test_what_is_not_a_model_is_refused(tmp_path):
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(ValueError, match=r"text\.model \(VOCABULARY\) is not a SentencePiece model"):
        vocabulary.set_default(str(tmp_path / "text.model"))


def test_a_model_that_has_its_own_sentinels_gets_no_others(golden, tmp_path):
    """As mT5's file, and T5X's cc_all.32000.100extra: the ids are those of a model that gets them here."""
    plain = golden("spm/unigram.model")
    proto = sentencepiece_model_pb2.ModelProto.FromString(plain.read_bytes())
    for number in reversed(range(100)):
        proto.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=proto.SentencePiece.USER_DEFINED)
    (tmp_path / "own.model").write_bytes(proto.SerializeToString())
    own, added = vocabulary.load(str(tmp_path / "own.model")), vocabulary.load(str(plain))
    assert own.vocab_size == added.vocab_size
    text = "some text <extra_id_0>"
    assert own.encode(text)[-1] == own.vocab_size - 1 == added.vocab_size - 1
    assert own.encode("some text") == added.encode("some text")


def test_ids_of_the_public_vocabulary(data_dir):
    t5 = vocabulary.default_vocabulary()
    assert t5.vocab_size == 32100
    assert t5.unk_id == 2
    assert t5.encode("translate English to German: The house is wonderful.") == [
        13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5,
    ]  # fmt: skip
    assert t5.encode("Das Haus ist wunderbar.") == [644, 4598, 229, 19250, 5]
    assert t5.encode("<extra_id_0> <extra_id_99>") == [32099, 32000]


# ------------------------------------------------------------------------------------ what other implementations gave


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_models_cut_and_join_text_as_sentencepiece_does(golden, golden_json, kind):
    expected = golden_json("sentencepiece")[kind]
    loaded = vocabulary.load(str(golden(f"spm/{kind}.model")))
    model = sentencepiece.SentencePieceProcessor(model_file=str(golden(f"spm/{kind}.model")))
    assert [model.id_to_piece(i) for i in range(expected["vocab_size"])] == expected["pieces"]
    for row in expected["rows"]:
        assert loaded.encode(row["text"]) == row["ids"] == loaded.encode_tf(row["text"]).numpy().tolist()
        assert loaded.decode(row["ids"]) == row["decoded"]
        assert model.encode(row["text"], out_type=str) == row["pieces"]
        assert model.normalize(row["text"]) == row["normalized"]
    assert all(model.normalize(text) == normalized for text, normalized in expected["nmt_nfkc"])
    sentinels = expected["seqio_extra_ids_100"]
    assert (loaded.vocab_size, loaded.eos_id) == (sentinels["vocab_size"], sentinels["eos_id"])
    assert (loaded.pad_id, loaded.unk_id) == (sentinels["pad_id"], sentinels["unk_id"])
    assert loaded.encode(sentinels["text"]) == sentinels["encode"]
    assert loaded.encode_tf(sentinels["text"]).numpy().tolist() == sentinels["encode_tf"]
    assert loaded.decode(sentinels["encode"]) == sentinels["decode"]
    assert loaded.decode([sentinels["<extra_id_0>"]]) == "<extra_id_0>"
    whole, texts_with_all_pieces = expected["lossless_on_texts_without_unk"]
    measured = report.measure(model, (row["text"] for row in expected["rows"]))
    assert (measured.returned, measured.whole) == (whole, texts_with_all_pieces)
    assert measured.texts > measured.whole  # some cannot come back: their characters have no piece


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_finds_the_same_pieces_as_the_reference(golden_json, tmp_path, kind):
    reference = golden_json("sentencepiece")
    path = tmp_path / "new" / "mine.model"
    text = "\n".join(reference["corpus"] * reference["repeat"])  # one long document, beyond SentencePiece's own limit
    assert len(text) > 4192
    vocabulary.train([text], str(path), reference[kind]["vocab_size"], kind, threads=1)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert [model.id_to_piece(i) for i in range(model.get_piece_size())] == reference[kind]["pieces"]
    assert [file.name for file in path.parent.iterdir()] == ["mine.model"]


def test_bpe_merges_the_words_of_sennrich_as_published(golden_json, tmp_path):
    toy = golden_json("sentencepiece")["bpe_toy_sennrich"]
    vocabulary.train(
        [word for word, n in toy["vocab"].items() for _ in range(n)], str(tmp_path / "toy.model"), 24, "bpe"
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "toy.model"))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    assert pieces[3:5] == ["es", "est"]  # later ones differ: SentencePiece marks where words begin, not where they end


# -------------------------------------------------------------------------------------------------------------- report

SENTENCES = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog sat"] * 20


def trained(path, lines=SENTENCES, size=20, **settings):
    vocabulary.train(lines, str(path), size, threads=1, **settings)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_report_counts_what_can_be_counted_by_hand(tmp_path):
    model = trained(tmp_path / "m.model")
    measured = report.measure(model, ["the  cat", "the q\u00b2 cat"])
    ids = [*model.encode("the cat"), *model.encode("the q\u00b2 cat")]
    assert (measured.texts, measured.words, measured.characters) == (2, 5, len("the cat") + len("the q2 cat"))
    assert measured.tokens == len(ids)
    assert measured.fertility == len(ids) / 5
    assert measured.unknown == 1  # the two characters are neighbours, and one <unk>
    assert measured.coverage == 1 - 1 / len(ids)
    assert measured.uncovered == {"q": 1, "2": 1}
    assert measured.changed == 2  # two spaces, and a superscript
    assert (measured.whole, measured.returned, measured.lossless) == (1, 1, True)
    assert measured.used == set(ids) - {2}
    assert report.pieces(model) == 20 - 3
    assert "U+0071 q (1)" in report.to_text(measured, model)


def test_a_decoder_that_loses_text_is_found(tmp_path):
    model = trained(tmp_path / "m.model")

    class Lossy:
        def __getattr__(self, name):
            return getattr(model, name)

        def decode(self, ids):
            return model.decode(ids).replace(" ", "")

    assert not report.measure(Lossy(), SENTENCES).lossless  # pyright: ignore[reportArgumentType]
    assert report.measure(model, SENTENCES).lossless


def test_bytes_spell_what_has_no_piece(tmp_path):
    model = trained(tmp_path / "m.model", size=276, byte_fallback=True)
    measured = report.measure(model, ["the \u96ea cat"])
    assert (measured.unknown, measured.bytes, measured.returned) == (0, 3, 1)
    assert measured.uncovered == {"\u96ea": 1}
    assert "single bytes" in report.to_text(measured, model)


def test_normalization_is_chosen(tmp_path):
    assert trained(tmp_path / "a.model").normalize("A\u00b2\tb") == "\u2581A2\u2581b"
    assert trained(tmp_path / "b.model", normalization="nmt_nfkc_cf").normalize("A\u00b2\tb") == "\u2581a2\u2581b"
    assert trained(tmp_path / "c.model", normalization="identity").normalize("A\u00b2\tb") == "\u2581A\u00b2\tb"


# ---------------------------------------------------------------------------------------------------------------- text


def test_text_of_a_task_is_what_its_tokens_are_made_of(corpus):
    (corpus / "glue/CoLA").mkdir(parents=True)
    (corpus / "glue/CoLA/train.tsv").write_text("gj04\t1\t\tThe sailors rode the breeze.\ncj99\t0\t*\tThe more.\n")
    assert list(texts.of_task("glue_cola_v002")) == [
        *("cola sentence: The sailors rode the breeze.", "acceptable"),
        *("cola sentence: The more.", "unacceptable"),
    ]
    with pytest.raises(ValueError, match="no split 'validation'; it has: train"):
        next(texts.of_task("glue_cola_v002", "validation"))
    with pytest.raises(ValueError, match="a mixture: name one of its tasks"):
        next(texts.of_task("glue_v002_equal"))


def test_text_of_every_kind_of_task_that_data_is_here_for(data_dir):
    (first, *_) = texts.of_task("c4_v220_span_corruption")
    raw = next(seqio.TaskRegistry.get("c4_v220_span_corruption").source.get_dataset("train", False).as_numpy_iterator())
    assert first == raw["text"].decode()
    squad = texts.of_task("squad_v110", "validation")
    assert next(squad).startswith(
        "question: Which NFL team represented the AFC at Super Bowl 50? context: Super Bowl 50"
    )
    assert next(squad) == "Denver Broncos"
    feature = seqio.Feature(seqio.PassThroughVocabulary(10))
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors({"targets": [5]}), ["train"]
    )
    seqio.TaskRegistry.add("no_text", source=source, preprocessors=[], output_features={"targets": feature})
    try:
        with pytest.raises(ValueError, match="no_text has no text: its source yields tokens"):
            next(texts.of_task("no_text"))
    finally:
        seqio.TaskRegistry.remove("no_text")


def test_text_of_files_is_read_as_everywhere_else(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "One", "body": "two  three"}\n')
    (tmp_path / "b.txt").write_text("four\n\nfive\n")
    assert list(texts.of_files([str(tmp_path / "*.jsonl")], "{title}: {body}")) == ["One: two  three"]
    assert list(texts.of_files([str(tmp_path / "b.txt")])) == ["four", "five"]


# ------------------------------------------------------------------------------------------------------------- command


def test_command_learns_from_files_and_reports(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    model = tmp_path / "out" / "mine.model"
    files = ["--files", str(tmp_path / "*.txt")]
    assert command.main(["train", f"--output={model}", "--size=40", "--type=bpe", *files]) == 0
    first = capsys.readouterr().out
    assert "mine.model: bpe, nmt_nfkc normalisation, 40 pieces (140 ids with 100 sentinels)" in first
    assert "60 texts, 360 words" in first
    assert "lossless, 60 of 60 texts are restored" in first
    assert command.main(["check", str(model), *files]) == 0
    assert capsys.readouterr().out == first
    assert vocabulary.load(str(model)).vocab_size == 140


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--size=4000"], r"this text gives at most \d+ pieces, not 4000: use a size up to \d+"),
        (["--size=9"], r"9 pieces are too few .* Use a size above \d+"),
        (["--size=-1"], "size -1"),
        (["--size=40", "--coverage=99"], r"character coverage 99\.0: must be above 0"),
        (["--size=40", "--files", "nothing*.txt"], r"no file matches 'nothing\*\.txt'"),
        (["--size=40", "--output=/dev/null/a.model"], r"cannot write /dev/null/a\.model: "),
        (["--size=40", "--output=text.txt"], r"text\.txt exists, .* trained with it"),
        (["--size=40", "--limit=0"], "at least one text"),
    ],
)
def test_command_says_in_a_line_what_is_wrong(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    assert command.main(["train", "--output=a.model", "--files", "text.txt", *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.search(says, printed), printed
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_text_that_cannot_be_read_stops_training_with_its_own_error(tmp_path):
    def broken():
        yield "the cat sat"
        raise ValueError("mine.txt:2: not UTF-8")

    with pytest.raises(ValueError, match=r"^mine\.txt:2: not UTF-8$"):
        trained(tmp_path / "m.model", broken())
    with pytest.raises(ValueError, match="every line is empty"):
        trained(tmp_path / "m.model", ["", " \n "])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra_ids", HUGGING_FACE)
def test_runs_give_the_ids_of_the_files_beside_a_model(golden, tmp_path, extra_ids):
    loaded = vocabulary.load(str(described(tmp_path, golden, extra_ids)))
    expected = HUGGING_FACE[extra_ids]
    assert [list(loaded.encode(text)) for text in TEXTS] == expected
    assert [loaded.encode_tf(tf.constant(text)).numpy().tolist() for text in TEXTS] == expected
    assert loaded.encode_tf(tf.constant(TEXTS)).to_list() == expected
    assert loaded.first_sentinel == 220 + extra_ids - 1 and vocabulary.sentinel_count(loaded) == extra_ids
    assert bert.special(loaded).mask == loaded.first_sentinel
    assert pickle.loads(pickle.dumps(loaded)) == loaded


def test_models_with_sentinels_of_their_own_have_them_for_spans(golden, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(golden("spm/unigram.model").read_bytes())  # pyright: ignore
    for i in reversed(range(100)):
        proto.pieces.add(piece=f"\u2581<extra_id_{i}>", score=0.0, type=proto.SentencePiece.USER_DEFINED)
    (tmp_path / "own.model").write_bytes(proto.SerializeToString())
    own = vocabulary.load(str(tmp_path / "own.model"))
    assert (own.vocab_size, vocabulary.sentinel_count(own)) == (320, 100)
    vocabulary.require_sentinels(own, 100)
    with pytest.raises(ValueError, match="VOCABULARY_EXTRA_IDS = 101"):
        vocabulary.require_sentinels(own, 101)
    assert vocabulary.sentinel_count(seqio.ByteVocabulary()) == 11


@pytest.mark.parametrize("extra_ids", [0, 20, 100])
@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_a_run_leaves_its_tokenizer_for_load(golden, tmp_path, kind, extra_ids):
    model = str(golden("spm/unigram.model"))
    text = "a <extra_id_7> b" if extra_ids else "a b"
    try:
        vocabulary.set_default("bytes" if kind == "bytes" else model, extra_ids)
        pipeline.keep_tokenizer("glue_cola_v002", tmp_path)
        kept = convert.vocabulary(tmp_path)
        own = vocabulary.default_vocabulary()
        assert len(kept) == own.vocab_size
        assert kept.encode("a b") == list(own.encode("a b"))
        if extra_ids:
            assert (own.vocab_size - 8) in kept.encode(text)
    finally:
        vocabulary.set_default(None)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_runs_name_mistakes_in_the_files_beside_a_model(golden, tmp_path, mistake):
    with pytest.raises(ValueError, match=MISTAKES[mistake][-1]):
        vocabulary.load(str(mistaken(tmp_path, golden, mistake)))


def test_a_tokenizer_that_is_kept_replaces_another_and_may_be_kept_over_itself(golden, tmp_path):
    (tmp_path / "vocab.txt").write_text("of another run")
    model = str(golden("spm/unigram.model"))
    try:
        for chosen in (model, str(tmp_path / "spiece.model"), "bytes"):
            vocabulary.set_default(chosen)
            pipeline.keep_tokenizer("glue_cola_v002", tmp_path)
            kept = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
            if chosen == "bytes":
                assert list(kept) == ["tokenizer_config.json"]
            else:
                assert kept == {"spiece.model": pathlib.Path(model).stat().st_size}
    finally:
        vocabulary.set_default(None)


# ------------------------------------------------------------------------------------------------------------- Gemma


@pytest.fixture
def gemma_vocabulary(golden, tmp_path):
    """The golden Gemma tokenizer in force, from tokenizer.model."""
    vocabulary.set_default(str(gemma(tmp_path, golden) / "tokenizer.model"))
    yield vocabulary.default_vocabulary()
    vocabulary.set_default(None)


@pytest.mark.parametrize("files", GEMMA_FILES)
def test_runs_give_gemma_the_ids_of_transformers(golden, gemma_texts, tmp_path, files):
    model = gemma(tmp_path, golden, files) / "tokenizer.model"
    if files == "json":
        model.write_bytes(tokenizer.rebuilt(tmp_path) or b"")
    loaded = vocabulary.load(str(model))
    assert (loaded.vocab_size, loaded.extra_ids, loaded.eos_id, loaded.pad_id) == (701, 0, 1, 0)
    inputs, expected = [row["text"] for row in gemma_texts], [row["ids"] for row in gemma_texts]
    assert [list(loaded.encode(text)) for text in inputs] == expected
    assert [loaded.encode_tf(tf.constant(text)).numpy().tolist() for text in inputs[:20]] == expected[:20]
    assert vocabulary.block_encoder(loaded)(tf.constant(inputs)).to_list() == expected
    for row in gemma_texts:
        if not {0, 1, 2, 3} & {*row["ids"]}:
            assert loaded.decode(row["ids"]) == row["decoded"]
    assert pickle.loads(pickle.dumps(loaded)) == loaded


def test_gemma_model_alone_finds_special_tokens_and_has_no_extra_ids(golden, tmp_path):
    model = golden("gemma_tokenizer") / "tokenizer.model"
    (tmp_path / "any.model").write_bytes(model.read_bytes())
    loaded = vocabulary.load(str(tmp_path / "any.model"))
    assert loaded.vocab_size == 700 and list(loaded.encode("a<bos>  ")) == [606, 2, 20]
    assert loaded.encode_tf(tf.constant("a<bos>  ")).numpy().tolist() == [606, 2, 20]
    with pytest.raises(ValueError, match=r"VOCABULARY_EXTRA_IDS = 100: .*any\.model is a Gemma model.*leave it unset"):
        vocabulary.load(str(tmp_path / "any.model"), 100)
    vocabulary.load(str(tmp_path / "any.model"), 0)
    (tmp_path / "added_tokens.json").write_text('{"<cite>": 400}')
    with pytest.raises(ValueError, match=r"any\.model give the token '<cite>' the id 400; .* it is 700"):
        vocabulary.load(str(tmp_path / "any.model"))


def test_gemma_words_are_not_looked_up_in_a_dictionary(golden):
    assert not WordEncoder(vocabulary.load(str(golden("gemma_tokenizer") / "tokenizer.model"))).fits


def test_report_of_a_gemma_model_that_restores_spaces(golden):
    model = sentencepiece.SentencePieceProcessor(model_file=str(golden("gemma_tokenizer") / "tokenizer.model"))
    measured = report.measure(model, ["  two  spaces ", "\U0001f600"])
    assert (measured.changed, measured.returned, measured.bytes) == (0, 2, 4)


def test_gemma_sentinels_are_its_spare_pieces(gemma_vocabulary):
    shared = vocabulary.SHARED
    assert vocabulary.sentinel_count(shared) == 10 and (shared.first_sentinel, shared.last_sentinel) == (14, 5)
    assert gemma_vocabulary.tokenizer.id_to_piece(14) == "<unused9>"
    vocabulary.require_sentinels(shared, 10)
    with pytest.raises(ValueError, match=r"has 10: real pieces would be overwritten. Use longer spans"):
        vocabulary.require_sentinels(shared, 11)
    assert bert.special(shared) == bert.Special(cls=13, sep=12, mask=14)


def gemma_examples(objective, lengths, vocab, **settings):
    texts = tf.data.Dataset.from_generator(
        lambda: ({"targets": np.arange(300, 690, dtype=np.int32)} for _ in range(4)),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)},
    )
    features = {name: seqio.Feature(vocab) for name in ("inputs", "targets")}
    with seqio.utils.map_seed_manager(3):
        return list(objective(texts, lengths, features, **settings).as_numpy_iterator())


@pytest.mark.parametrize("objective", [objectives.span_corruption, ul2.ul2])
def test_gemma_spans_are_marked_by_spare_pieces(gemma_vocabulary, objective):
    settings = {"denoisers": [d for d in ul2.UL2 if d.noise_density < 0.5]} if objective is ul2.ul2 else {}
    made = gemma_examples(objective, {"inputs": 64, "targets": 40}, vocabulary.SHARED, **settings)
    counts = set()
    for example in made:
        for side in example["inputs"], example["targets"]:
            sentinels = side[side < 300].tolist()
            assert sentinels == list(range(14, 14 - len(sentinels), -1)) and len(sentinels) <= 10
            counts.add(len(sentinels))
    assert max(counts) > 2
    if objective is objectives.span_corruption:
        with pytest.raises(ValueError, match=r"marks up to 33 spans.*has 10"):
            gemma_examples(objective, {"inputs": 600, "targets": 200}, vocabulary.SHARED)


def test_gemma_spans_beyond_its_sentinels_share_the_last(gemma_vocabulary):
    made = gemma_examples(objectives.iid_denoising, {"inputs": 300, "targets": 300}, vocabulary.SHARED)
    sentinels = [token for token in made[0]["inputs"].tolist() if token < 300]
    assert sentinels[:10] == list(range(14, 4, -1)) and set(sentinels[10:]) == {5}


def test_a_run_leaves_its_gemma_tokenizer_for_load(golden, gemma_texts, gemma_vocabulary, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "spiece.model").write_text("of another run")
    pipeline.keep_tokenizer("glue_cola_v002", tmp_path / "run")
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept == {"tokenizer.model", "tokenizer_config.json", "added_tokens.json"}
    again = vocabulary.load(str(convert.tokenizer_file(tmp_path / "run")))
    loaded = convert.vocabulary(tmp_path / "run")
    for row in gemma_texts:
        assert loaded.encode(row["text"]) == list(again.encode(row["text"])) == row["ids"]


def test_a_gemma_token_in_place_of_a_spare_piece_is_no_sentinel(golden, tmp_path):
    shutil.copyfile(golden("gemma_tokenizer") / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<cite>": 14, "he": 283}')
    loaded = vocabulary.load(str(tmp_path / "tokenizer.model"))
    assert list(loaded.encode("a<cite>b")) == [606, 14, 622] and loaded.vocab_size == 700
    assert loaded.decode([606, 14, 622]) == "a<cite>b"
    assert list(loaded.encode("the")) == [605, 283]  # an added token is found before pieces are merged
    assert (vocabulary.sentinel_count(loaded), loaded.first_sentinel) == (9, 13)


@pytest.mark.parametrize("files", GEMMA_FILES)
def test_a_run_uses_the_gemma_tokenizer_beside_its_checkpoint(golden, tmp_path, files):
    (gemma(tmp_path, golden, files) / "config.json").write_text("{}")
    settings = {"vocabulary": None, "model_dir": None, "initial_checkpoint_path": str(tmp_path)}
    run = mock.Mock(spec=RunConfig, **settings)
    if files == "json":
        with pytest.raises(
            ValueError, match=r"tokenizer\.json, which SeqIO does not read: set VOCABULARY to .* convert it"
        ):
            task_setup._vocabulary_of(run)
    else:
        assert task_setup._vocabulary_of(run) == str(tmp_path / "tokenizer.model")
