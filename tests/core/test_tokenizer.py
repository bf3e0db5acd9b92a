"""Tokenizers without TensorFlow: a SentencePiece model back from tokenizer.json, and ByT5's bytes."""

import base64
import json
import shutil

import pytest
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

import t5x_lite
from t5x_lite import convert
from t5x_lite.convert import tokenizer
from t5x_lite.errors import UserError


def write(folder, proto, **changed):
    """tokenizer.json as transformers writes it for a T5's SentencePiece model: with the sentinels as pieces."""
    vocab = [[piece.piece, piece.score] for piece in proto.pieces]
    vocab += [[f"<extra_id_{i}>", 0.0] for i in reversed(range(100))]
    table = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    special = [*range(3), *range(len(vocab) - 100, len(vocab))]
    said = {
        "model": {"type": "Unigram", "unk_id": 2, "byte_fallback": False, "vocab": vocab},
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": table},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Metaspace", "prepend_scheme": "always"}],
        },
        "added_tokens": [{"id": i, "content": vocab[i][0], "special": True} for i in special],
    }
    said["model"] |= changed.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(said | changed))


@pytest.fixture
def proto(golden):
    return ModelProto.FromString(golden("spm/unigram.model").read_bytes())


def test_the_sentencepiece_model_comes_back_from_tokenizer_json(proto, tmp_path, golden_json):
    write(tmp_path, proto)
    rebuilt = tokenizer.rebuilt(tmp_path)
    assert rebuilt is not None
    got = ModelProto.FromString(rebuilt)
    assert list(got.pieces) == list(proto.pieces)
    ours, true = tokenizer.beside(tmp_path), tokenizer.Vocabulary(proto.SerializeToString())
    assert isinstance(ours, tokenizer.Vocabulary) and len(ours) == len(true) == len(proto.pieces) + 100
    for case, _ in golden_json("sentencepiece")["nfkc"]["unicodedata"]:
        text = f"  {case}  ﬁ ½ <extra_id_3> \t end"
        assert ours.encode(text) == true.encode(text)
        assert ours.decode(ours.encode(text)) == true.decode(true.encode(text))


def test_a_converted_model_has_the_file_that_seqio_reads(proto, golden, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden("hf_t5_v11") / name, tmp_path / name)
    write(tmp_path, proto)
    convert.convert(tmp_path, tmp_path / "ours", "t5x_lite")
    assert ModelProto.FromString((tmp_path / "ours" / "spiece.model").read_bytes()).pieces == proto.pieces
    text = "some text <extra_id_0>"
    assert t5x_lite.load(tmp_path).vocabulary.encode(text) == t5x_lite.load(tmp_path / "ours").vocabulary.encode(text)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": {"type": "BPE"}}, "not a SentencePiece unigram"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "not a SentencePiece unigram"),
        ({"normalizer": None}, "lacks SentencePiece's character map"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}, "lacks"),
        ({"added_tokens": [{"id": 100_000, "content": "<new>"}]}, "no piece has id .* <new> has 100000"),
    ],
)
def test_other_tokenizers_are_not_guessed_at(changed, said, proto, tmp_path, caplog):
    write(tmp_path, proto, **changed)
    with pytest.raises(ValueError, match=f"{said}.*spiece.model"):
        tokenizer.sentencepiece_model(tmp_path / "tokenizer.json")
    assert tokenizer.beside(tmp_path) is None and "no tokenizer" in caplog.text


def test_an_added_token_is_a_piece_of_its_own(proto, tmp_path):
    new = len(proto.pieces) + 100
    write(tmp_path, proto)
    said = json.loads((tmp_path / "tokenizer.json").read_text())
    said["added_tokens"].append({"id": new, "content": "<new>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    vocabulary = tokenizer.beside(tmp_path)
    assert isinstance(vocabulary, tokenizer.Vocabulary) and len(vocabulary) == new + 1
    assert vocabulary.encode("<new> <extra_id_0>")[-2:] == [new, new - 1]  # the sentinel where it was


def test_byt5(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    vocabulary = tokenizer.beside(tmp_path)
    assert isinstance(vocabulary, tokenizer.ByteVocabulary) and len(vocabulary) == 384
    text = "hé <extra_id_0> x<extra_id_1>"
    tokens = [107, 198, 172, 35, 259, 35, 123, 260]  # Hugging Face's
    assert vocabulary.encode(text) == tokens
    assert vocabulary.decode([*tokens, 1, 107]) == text
    assert vocabulary.decode([198, 107, 2, 400]) == "h"  # half a letter, unknown, and no token at all
    assert vocabulary.decode(vocabulary.encode("<extra_id_125>")) == "<extra_id_125>"


def test_byt5_as_transformers_5_writes_it(tmp_path, caplog):
    """extra_ids is 0 there, and the sentinels are listed."""
    listed = {"0": "<pad>", "1": "</s>", "2": "<unk>"} | {str(259 + i): f"<extra_id_{i}>" for i in range(125)}
    config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}
    config["added_tokens_decoder"] = {number: {"content": content} for number, content in listed.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = tokenizer.beside(tmp_path)
    assert vocabulary is not None and len(vocabulary) == 384 and vocabulary.encode("<extra_id_1>") == [260]
    assert not caplog.text
    (tmp_path / "added_tokens.json").write_text('{"<sep>": 384}')
    assert tokenizer.beside(tmp_path) and "the added tokens <sep> are read as bytes" in caplog.text


def test_a_directory_with_nothing_has_no_tokenizer(tmp_path):
    assert tokenizer.beside(tmp_path) is None


# Texts and ids of transformers 5.23's T5Tokenizer with the model of tests/golden, by the files beside it.
TEXTS = (
    *("The<extra_id_0>walks", "The <extra_id_0> walks", "<extra_id_0>ly cats", "a<sep>b", "a <sep> b", "<sep>"),
    *(" two  spaces <extra_id_1>", "The<extra_id_0><extra_id_1> x", "end<extra_id_2>", "a\nb"),
)
HUGGING_FACE = {
    100: [
        *([55, 23, 319, 17, 43, 28, 7], [55, 23, 319, 17, 43, 28, 7], [319, 64, 34, 138, 137, 7]),
        *([11, 320, 81], [11, 320, 81], [320]),
        *([159, 170, 27, 79, 26, 15, 83, 7, 318], [55, 23, 319, 318, 3, 54], [3, 5, 31, 6, 317]),
        *([11, 81],),
    ],
    300: [
        *([55, 23, 519, 17, 43, 28, 7], [55, 23, 519, 17, 43, 28, 7], [519, 64, 34, 138, 137, 7]),
        *([11, 2, 24, 26, 2, 25], [11, 3, 2, 24, 26, 2, 81], [3, 2, 24, 26, 2]),
        *([159, 170, 27, 79, 26, 15, 83, 7, 518], [55, 23, 519, 518, 3, 54], [3, 5, 31, 6, 517]),
        *([11, 81],),
    ],
}


def described(folder, golden, extra_ids):
    """The golden model with Hugging Face's files beside it; with 100 sentinels, there is also a token <sep>."""
    shutil.copyfile(golden("spm/unigram.model"), folder / "spiece.model")
    (folder / tokenizer.CONFIG).write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": extra_ids}))
    if extra_ids == 100:
        (folder / tokenizer.ADDED).write_text('{"<sep>": 320}')
    return folder / "spiece.model"


@pytest.mark.parametrize("extra_ids", HUGGING_FACE)
def test_files_beside_a_model_say_its_sentinels_and_added_tokens(golden, tmp_path, extra_ids):
    vocabulary = tokenizer.Vocabulary(described(tmp_path, golden, extra_ids))
    assert [vocabulary.encode(text) for text in TEXTS] == HUGGING_FACE[extra_ids]
    assert len(vocabulary) == 220 + extra_ids + (extra_ids == 100)
    assert vocabulary.decode(vocabulary.encode("a<extra_id_1>b")) == "a <extra_id_1> b"
    assert vocabulary.cls == 220 + extra_ids - 2  # <extra_id_1>


def test_ids_that_contradict_the_model_are_named(golden, tmp_path):
    model = described(tmp_path, golden, 100)
    (tmp_path / tokenizer.ADDED).write_text('{"<sep>": 330}')
    with pytest.raises(UserError, match=r"spiece\.model give the token '<sep>' the id 330; .* it is 320"):
        tokenizer.Vocabulary(model)
    (tmp_path / tokenizer.ADDED).write_text("{")
    with pytest.raises(UserError, match=r"added_tokens\.json is not JSON"):
        tokenizer.Vocabulary(model)


def test_bytes_without_sentinels_of_their_own_use_the_last_ones():
    pretrained, descending = tokenizer.ByteVocabulary(0), tokenizer.ByteVocabulary(100, descending=True)
    assert (len(pretrained), pretrained.encode("a<extra_id_0><extra_id_10>")) == (259, [100, 258, 248])
    assert pretrained.decode([100, 258, 100]) == "a<extra_id_0>a"
    assert (len(descending), descending.encode("<extra_id_0><extra_id_99>")) == (359, [358, 259])


# What the files beside a model may hold by mistake, and the decisive words.
MISTAKES = {
    "a list": ({"added_tokens_decoder": [{"content": "<sep>", "id": 320}]}, None, "is a list, expected an object"),
    "a list of all": ([], None, "has a list, expected an object"),
    "one token": ({"additional_special_tokens": "<hl>"}, None, "is a str, expected a list"),
    "no text": ({"added_tokens_decoder": {"320": {"content": ""}}}, None, "it needs a text"),
    "no number": ({}, {"<sep>": "x"}, "must be a whole number"),
    "two ids": ({"added_tokens_decoder": {"320": "<sep>"}}, {"<sep>": 321}, "another file 321"),
    "a text": ({"extra_ids": "96"}, None, "extra_ids '96'"),
    "negative": ({"extra_ids": -1}, None, "extra_ids -1"),
    "single word": ({"added_tokens_decoder": {"320": {"content": "a", "single_word": True}}}, None, "single_word"),
}


def mistaken(folder, golden, mistake):
    config, added, _ = MISTAKES[mistake]
    shutil.copyfile(golden("spm/unigram.model"), folder / "spiece.model")
    (folder / tokenizer.CONFIG).write_text(json.dumps(config))
    if added is not None:
        (folder / tokenizer.ADDED).write_text(json.dumps(added))
    return folder / "spiece.model"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_files_beside_a_model_are_named(golden, tmp_path, mistake):
    with pytest.raises(UserError, match=MISTAKES[mistake][-1]):
        tokenizer.Vocabulary(mistaken(tmp_path, golden, mistake))


def test_special_tokens_without_ids_get_the_next_ones(golden, tmp_path):
    model = described(tmp_path, golden, 100)
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<extra_id_0>", "<hl>"]}')
    vocabulary = tokenizer.Vocabulary(model)
    assert len(vocabulary) == 322 and vocabulary.encode("<sep><hl>") == [320, 321]


# ------------------------------------------------------------------------------------------------------------- Gemma

GEMMA_FILES = {
    "model": ["tokenizer.model", "tokenizer_config.json"],
    "json": ["tokenizer.json", "tokenizer_config.json"],
    "both": ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"],
}
IMAGE = "<image_soft_token>"  # behind the pieces, which the model itself does not know


def gemma(folder, golden, files="both"):
    """A folder with files of the golden tokenizer; without tokenizer.json its config lists tokens, as published."""
    for name in GEMMA_FILES[files]:
        shutil.copyfile(golden("gemma_tokenizer") / name, folder / name)
    if files == "model":
        added = json.loads((golden("gemma_tokenizer") / "tokenizer.json").read_text())["added_tokens"]
        decoder = {str(token["id"]): {"content": token["content"], "special": token["special"]} for token in added}
        config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "added_tokens_decoder": decoder}
        (folder / tokenizer.CONFIG).write_text(json.dumps(config))
    return folder


def gemma_json(folder, golden, **changed):
    """A folder with tokenizer.json alone, with changes to its parts or to its model."""
    config = json.loads((golden("gemma_tokenizer") / "tokenizer.json").read_text())
    for key, value in changed.items():
        (config if key in config else config["model"])[key] = value
    (folder / "tokenizer.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("files", GEMMA_FILES)
def test_gemma_has_the_ids_of_transformers(golden, gemma_texts, tmp_path, files):
    vocabulary = convert.vocabulary(gemma(tmp_path, golden, files))
    assert isinstance(vocabulary, tokenizer.Vocabulary) and len(vocabulary) == 701
    for row in gemma_texts:
        assert vocabulary.encode(row["text"]) == row["ids"], row["text"]
        if not {0, 1, 2, 3} & {*row["ids"]}:
            assert vocabulary.decode(row["ids"]) == row["decoded"]
    assert vocabulary.decode([*vocabulary.encode(" two\n\n  "), 1, 603]) == " two\n\n  "
    assert (vocabulary.cls, vocabulary.sep) == (13, 12)


def test_gemma_texts_tell_transformers_from_sentencepiece(golden, gemma_texts):
    model = SentencePieceProcessor(model_file=str(golden("gemma_tokenizer") / "tokenizer.model"))
    others = {row["text"] for row in gemma_texts if model.encode(row["text"]) != row["ids"]}
    assert {"a<bos>b", "     five", f"a{IMAGE}b"} < others and len(others) < len(gemma_texts) / 2


def test_gemma_model_without_other_files(golden):
    file = golden("gemma_tokenizer") / "tokenizer.model"
    vocabulary = tokenizer.Vocabulary(file.read_bytes())
    assert len(vocabulary) == 700 and vocabulary.encode("<bos> <extra_id_0>")[:2] == [2, 603]
    assert max(vocabulary.encode("<extra_id_0> </s>")) < 700  # no sentinels of T5's


def test_gemma_model_comes_back_from_tokenizer_json(golden, tmp_path):
    true = ModelProto.FromString((golden("gemma_tokenizer") / "tokenizer.model").read_bytes())
    got = ModelProto.FromString(tokenizer.rebuilt(gemma(tmp_path, golden, "json")) or b"")
    assert [(piece.piece, piece.type) for piece in got.pieces[:700]] == [(x.piece, x.type) for x in true.pieces]
    assert [piece.piece for piece in got.pieces[700:]] == [IMAGE]
    merged = [[x for x in pieces if x.type == 1 and len(x.piece) > 1] for pieces in (got.pieces, true.pieces)]
    ours, theirs = ([x.piece for x in sorted(pieces, key=lambda x: -x.score)] for pieces in merged)
    assert ours == theirs and len(ours) > 200


def test_gemma_tab_that_transformers_names_is_a_byte(golden, tmp_path):
    vocab = json.loads((golden("gemma_tokenizer") / "tokenizer.json").read_text())["model"]["vocab"]
    vocab["\t"] = vocab.pop("<0x09>")  # as in the tokenizer.json of the first Gemmas
    vocabulary = tokenizer.beside(gemma_json(tmp_path, golden, vocab=vocab))
    assert vocabulary is not None and vocabulary.encode("a\tb") == [606, 34, 622]
    assert vocabulary.decode([606, 34, 622]) == "a\tb"


def test_gemma_token_in_place_of_a_spare_one(golden, tmp_path):
    (gemma(tmp_path, golden, "model") / "added_tokens.json").write_text('{"<cite>": 14}')
    config = json.loads((tmp_path / tokenizer.CONFIG).read_text())
    del config["added_tokens_decoder"]["14"]
    (tmp_path / tokenizer.CONFIG).write_text(json.dumps(config))
    vocabulary = convert.vocabulary(tmp_path)
    assert vocabulary is not None and vocabulary.encode("a<cite>b") == [606, 14, 622]
    assert vocabulary.decode([606, 14, 622]) == "a<cite>b" and len(vocabulary) == 701
    assert isinstance(vocabulary, tokenizer.Vocabulary) and vocabulary.cls == 12  # one sentinel less
    (tmp_path / "added_tokens.json").write_text('{"<cite>": 400}')
    with pytest.raises(UserError, match=r"tokenizer\.model give the token '<cite>' the id 400; .* it is 700"):
        convert.vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"normalizer": None}, "nor Gemma's BPE"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "nor Gemma's BPE"),
        ({"byte_fallback": False}, "nor Gemma's BPE"),
        ({"added_tokens": [{"id": 900, "content": "<new>"}]}, "no piece has id 700, but <new> has 900"),
        ({"added_tokens": [{"id": 34, "content": "<new>"}]}, "lacks some of the 256 pieces"),
    ],
)
def test_other_bpes_than_gemmas_are_named(golden, tmp_path, caplog, changed, said):
    gemma_json(tmp_path, golden, **changed)
    with pytest.raises(UserError, match=rf"tokenizer\.json.*{said}.*put the model's tokenizer\.model next to it"):
        tokenizer.sentencepiece_model(tmp_path / "tokenizer.json")
    assert tokenizer.beside(tmp_path) is None and "no tokenizer" in caplog.text


def test_merges_that_sentencepiece_would_make_besides_are_counted(golden, tmp_path, caplog):
    merges = json.loads((golden("gemma_tokenizer") / "tokenizer.json").read_text())["model"]["merges"]
    whole = next(pair for pair in merges if pair[0] == "▁t")  # "▁the" is also merged from "▁" and "the"
    assert tokenizer.rebuilt(gemma_json(tmp_path, golden)) and not caplog.text
    fewer = [" ".join(pair) for pair in merges if pair != whole]  # as strings, as earlier versions wrote them
    assert tokenizer.rebuilt(gemma_json(tmp_path, golden, merges=fewer)) and "lacks 1 of the merges" in caplog.text


@pytest.mark.parametrize("files", GEMMA_FILES)
def test_a_converted_gemma_tokenizer_is_tokenizer_model(golden, gemma_texts, tmp_path, files):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden("hf_t5_v11") / name, tmp_path / name)
    convert.convert(gemma(tmp_path, golden, files), tmp_path / "ours", "t5x_lite")
    assert not (tmp_path / "ours" / "spiece.model").exists()
    assert convert.tokenizer_file(tmp_path / "ours") == tmp_path / "ours" / "tokenizer.model"
    vocabulary = convert.vocabulary(tmp_path / "ours")
    assert vocabulary is not None and all(vocabulary.encode(row["text"]) == row["ids"] for row in gemma_texts)
