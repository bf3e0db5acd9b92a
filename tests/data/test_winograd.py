"""Winograd schemas and SuperGLUE's files: odd cases of WSC and WNLI, and rows that are wrong."""

import json

import pytest

from tasks import closed_book, readers, super_glue, winograd


def test_wsc_marks_the_pronoun_between_single_spaces():
    assert winograd._wsc_inputs("Ann told Bo  that she left .", "she", 5) == ["wsc: Ann told Bo  that *she* left ."]
    assert winograd._wsc_inputs("Nobody told them", "them", 2) == ["wsc: Nobody told *them* "]


def test_wsc_finds_a_pronoun_one_word_later_or_before_punctuation():
    assert winograd._wsc_inputs("they want to use it , now", "it", 3) == ["wsc: they want to use *it* , now"]
    assert winograd._wsc_inputs('"Good for him," he said. ', "him", 2) == ['wsc: "Good for *him* ," he said.']
    for place in (0, 1, 9):
        with pytest.raises(ValueError, match="WSC"):
            winograd._wsc_inputs("Ann saw that she left", "she", place)


def test_wnli_finds_what_stands_for_the_pronoun():
    for premise, hypothesis, inputs, target in (
        ("The gull ate it. It was cold.", "The bun was cold.", "wsc: The gull ate it. *It* was cold.", "The bun"),
        ("Bo lent Al a cap, as he was cold.", "Bo was cold.", "wsc: Bo lent Al a cap, as *he* was cold.", "Bo"),
        ("I saw her.", "I saw the queen's.", "wsc: I saw *her* .", "the queen"),
    ):
        assert winograd._wnli_text(premise, hypothesis) == [inputs, target]
    with pytest.raises(ValueError, match="no pronoun"):
        winograd._wnli_text("Ann left.", "Ann left.")


def read(tmp_path, read_rows, *rows, split="train"):
    path = tmp_path / "train.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_rows([str(path)], split)


WSC = {"text": "Ann said she\nleft", "label": True, "idx": 0}


def test_wsc_spans_are_mended_as_tfds_does(tmp_path):
    target = {"span1_text": "ann.", "span1_index": 0, "span2_text": "She", "span2_index": 2}
    columns = read(tmp_path, winograd.read_wsc, WSC | {"target": target})
    assert columns["span1_text"].tolist() == [b"Ann"]
    assert columns["span2_text"].tolist() == [b"she"]
    with pytest.raises(readers.BadRow, match=r"train\.jsonl:1: 'Bo' is not in the text"):
        read(tmp_path, winograd.read_wsc, WSC | {"target": target | {"span1_text": "Bo"}})


def test_dpr_records_have_five_lines(tmp_path):
    record = "Ann told Bo that he left.\nhe\nAnn,Bo\nBo\n\n"
    assert read(tmp_path, winograd.read_dpr, record.rstrip("\n"), "", "")["label"].tolist() == [1]
    with pytest.raises(readers.BadRow, match=r"train\.jsonl:1: expected sentence"):
        read(tmp_path, winograd.read_dpr, record.replace("he\n", "", 1))
    with pytest.raises(readers.BadRow, match=r"train\.jsonl:3: candidates 'Ann,Bo' and the right one 'Al'"):
        read(tmp_path, winograd.read_dpr, record.replace("\nBo\n", "\nAl\n"))


CB = {"premise": "p", "hypothesis": "h", "label": "neutral", "idx": 0}
RECORD = {
    "idx": 0,
    "passage": {"text": "abc", "entities": [{"start": 1, "end": 1}]},
    "qas": [{"query": "q", "idx": 0, "answers": [{"text": "b"}]}],
}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (CB | {"label": "maybe"}, "unknown label 'maybe'; there are entailment, contradiction, neutral"),
        ({k: v for k, v in CB.items() if k != "label"}, "no label"),
        (
            {k: v for k, v in CB.items() if k != "premise"},
            "no premise where it belongs; there is: hypothesis, label, idx",
        ),
        (CB | {"idx": "x"}, "idx is 'x'; a whole number is needed"),
        ([CB], "expected a JSON object, got list"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, says):
    (config,) = (config for config in super_glue.CONFIGS if config.name == "cb")
    with pytest.raises(readers.BadRow, match=rf"train\.jsonl:2: {says}"):
        read(tmp_path, lambda paths, split: super_glue.read(paths, split, config), CB, row)


def test_a_wrong_row_of_record_is_named(tmp_path):
    assert read(tmp_path, super_glue.read_record, RECORD)["entities"].to_list() == [[b"b"]]
    passage = RECORD["passage"] | {"entities": [{"start": 2, "end": 3}]}
    with pytest.raises(readers.BadRow, match=r"train\.jsonl:1: an entity that is not in the passage of 3 characters"):
        read(tmp_path, super_glue.read_record, RECORD | {"passage": passage})
    questions = [{"query": "q", "idx": 0}]
    with pytest.raises(readers.BadRow, match="a question without answers"):
        read(tmp_path, super_glue.read_record, RECORD | {"qas": questions})
    test_set = read(tmp_path, super_glue.read_record, RECORD | {"qas": questions}, split="test")
    assert test_set["answers"].to_list() == [[]]


def test_web_questions_answers_are_descriptions(tmp_path):
    path = tmp_path / "train.json"
    value = '(list (description "Bonn (city)") (description Köln))'
    path.write_text(json.dumps([{"utterance": "where", "targetValue": value, "url": "u"}]))
    assert [*closed_book.wq_rows(str(path))] == [("0", "where", "Bonn (city)", ["Bonn (city)", "Köln"])]
    path.write_text(json.dumps([{"utterance": "where", "targetValue": "(list)", "url": "u"}]))
    with pytest.raises(readers.BadRow, match=r"train\.json:1: no \(description"):
        list(closed_book.wq_rows(str(path)))
