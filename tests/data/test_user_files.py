"""One's own files as a task."""

import gzip
import json
import re

import pytest
import seqio

from tasks import user_files, vocabulary

LENGTHS = {"inputs": 64, "targets": 32}


@pytest.fixture
def folder(tmp_path, bytes_vocabulary):
    (tmp_path / "a.jsonl").write_text(
        '{"question": "Who?", "n": 3, "answer": "A"}\n{"question": "Où?", "n": 4, "answer": "B"}\n'
    )
    (tmp_path / "b.csv").write_text('question,answer\n"Why, then?","so ""it"" is"\n"two\nlines",yes\n')
    (tmp_path / "c.tsv.gz").write_bytes(gzip.compress(b"inputs\ttargets\nx\ty\n"))
    (tmp_path / "d.txt").write_text("a paragraph of text\n\nand another one\n")
    yield tmp_path
    seqio.TaskRegistry.remove("mine")


def pairs(split="train", name="mine"):
    dataset = seqio.TaskRegistry.get(name).get_dataset(LENGTHS, split, shuffle=False)
    return [
        (x["inputs_pretokenized"].decode(), x["targets_pretokenized"].decode()) for x in dataset.as_numpy_iterator()
    ]


def test_jsonl_through_templates(folder):
    task = user_files.register_files(
        "mine", f"{folder}/*.jsonl", inputs_template="q{{{n}}}: {question}", targets_template="{answer}"
    )
    assert pairs() == [("q{3}: Who?", "A"), ("q{4}: Où?", "B")]
    assert list(task.splits) == ["train"]
    assert task.num_input_examples("train") == 2
    first = next(task.get_dataset(LENGTHS, "train", shuffle=False).as_numpy_iterator())
    assert first["targets"].tolist() == [ord("A") + 3, 1]


def test_csv_with_quotes_and_default_columns_of_tsv(folder):
    user_files.register_files("mine", f"{folder}/c.tsv.gz")
    assert pairs() == [("x", "y")]
    user_files.register_files("mine", [f"{folder}/b.csv"], inputs_template="{question}", targets_template="{answer}")
    assert pairs() == [("Why, then?", 'so "it" is'), ("two\nlines", "yes")]


def test_span_corruption_of_text(folder):
    task = user_files.register_files("mine", f"{folder}/d.txt", f"{folder}/d.txt", objective="span_corruption")
    (x,) = task.get_dataset(LENGTHS, "validation", shuffle=False, seed=0).as_numpy_iterator()
    assert set(task.splits) == {"train", "validation"}
    assert x["inputs"][-1] == x["targets"][-1] == 1
    assert (x["targets"] >= 259).sum() == (x["inputs"] >= 259).sum() > 0


def test_large_files_are_streamed_with_the_same_examples(folder, monkeypatch):
    templates = {"inputs_template": "{question}", "targets_template": "{answer}"}
    user_files.register_files("mine", f"{folder}/a.jsonl", **templates)
    in_memory = pairs()
    monkeypatch.setattr(user_files, "MEMORY_LIMIT", 10)
    task = user_files.register_files("mine", f"{folder}/a.jsonl", **templates)
    assert isinstance(task.source, seqio.FileDataSource)
    assert pairs() == in_memory
    (folder / "e.json").write_text('[{"question": "Who?", "answer": "A"}]')
    with pytest.raises(ValueError, match=r"convert it to \.jsonl"):
        user_files.register_files("mine", f"{folder}/e.json", **templates)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"train_files": "{folder}/*.parquet"}, FileNotFoundError, r"no file matches '.*/\*\.parquet'"),
        ({"train_files": "{folder}/a.jsonl"}, ValueError, r"a\.jsonl:1: no column inputs; it has: question, n, answer"),
        ({"train_files": "{folder}/d.txt"}, ValueError, "plain text has no columns"),
        ({"train_files": "{folder}/a.jsonl", "inputs_template": "none"}, ValueError, "at least one {column}"),
        ({"train_files": "{folder}/a.jsonl", "inputs_template": "{question"}, ValueError, "expected '}'"),
        ({"train_files": "{folder}/a.jsonl", "objective": "xyz"}, ValueError, "use 'text_to_text', 'span_corruption'"),
    ],
)
def test_what_is_wrong_is_said_at_once(folder, arguments, error, says):
    arguments = {k: v.replace("{folder}", str(folder)) for k, v in arguments.items()}
    with pytest.raises(error, match=says):
        user_files.register_files("mine", **arguments)


def test_bad_lines_are_named(folder):
    (folder / "bad.jsonl").write_text('{"inputs": "a", "targets": "b"}\n{"inputs": "a"}\n')
    user_files.register_files("mine", f"{folder}/bad.jsonl")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: no column targets"):
        pairs()
    (folder / "bad.csv").write_text("inputs,targets\na,b\na,b,c\n")
    user_files.register_files("mine", f"{folder}/bad.csv")
    with pytest.raises(ValueError, match=r"bad\.csv:3: 3 fields, the header has 2"):
        pairs()
    (folder / "list.jsonl").write_text(json.dumps({"inputs": ["a"], "targets": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"list\.jsonl:1: column inputs has list"):
        user_files.register_files("mine", f"{folder}/list.jsonl")


def test_the_name_of_another_task_is_not_taken(folder):
    with pytest.raises(ValueError, match="duplicate"):
        user_files.register_files("glue_cola_v002", f"{folder}/c.tsv.gz")


def written(folder, name, text):
    (folder / name).write_text(text)
    return f"{folder}/{name}"


def test_in_tsv_a_quote_is_a_character(folder):
    user_files.register_files("mine", written(folder, "q.tsv", 'inputs\ttargets\n"Hello\tgreeting\n"\tquestion\n'))
    assert pairs() == [('"Hello', "greeting"), ('"', "question")]


def test_a_tsv_without_a_header_says_what_it_needs(folder):
    with pytest.raises(
        ValueError, match=r"q\.tsv:1: no column inputs.* it has: a b, c\. If it has no header, make inputs"
    ):
        user_files.register_files("mine", written(folder, "q.tsv", "a b\tc\nd\te\n"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "inputs,inputs,targets\na,b,c\n", "the column 'inputs' more than once"),
        ("a.csv", "inputs;targets\na;b\n", "not separated by ','"),
        ("a.csv", "input,targets\na,b\n", r"Did you mean \{input\}\?"),
        ("a.jsonl", '{"inputs": "a", "inputs": "b", "targets": "c"}\n', "the key 'inputs' is there more than once"),
        ("a.jsonl", '{"inputs": NaN, "targets": "c"}\n', "NaN is not JSON"),
        ("a.jsonl", '{"inputs": null, "targets": "c"}\n', "text or a number is needed"),
        ("a.json", '[{"inputs": "a", "targets": "b"}, 3]', r"a\.json:2: expected a JSON object"),
    ],
)
def test_a_row_is_what_its_file_says_or_an_error(folder, name, text, says):
    with pytest.raises(ValueError, match=says):
        user_files.register_files("mine", written(folder, name, text))
        pairs()


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "b.json", "a.ndjson", "brackets[1].jsonl", "a b.jsonl"])
def test_formats_and_names_that_people_have(folder, name):
    rows = ['{"inputs": 1.10, "targets": 12345678901234567890}', '{"inputs": "a", "targets": 1e5}']
    text = f"[{', '.join(rows)}]" if name == "a.json" else "\n".join(rows) + "\n"
    user_files.register_files("mine", written(folder, name, text))
    assert pairs() == [("1.10", "12345678901234567890"), ("a", "1e5")], "numbers as they are written"


def test_what_is_cut_unknown_or_empty_is_counted_by_file(folder, golden, bytes_vocabulary):
    path = written(folder, "n.jsonl", '{"inputs": "%s", "targets": ""}\n{"inputs": "a", "targets": "b"}\n' % ("x" * 99))
    notes = user_files.register_files("mine", path).notes(LENGTHS)
    assert len(notes) == 2
    assert re.search(
        r"n\.jsonl: 1 inputs are cut to TASK_FEATURE_LENGTHS\['inputs'\] = 64 .* longest has 100", notes[0]
    )
    assert "1 targets are empty" in notes[1]
    vocabulary.set_default(str(golden("spm/unigram.model")))
    path = written(folder, "u.jsonl", '{"inputs": "a", "targets": "{a}"}\n{"inputs": "a", "targets": "a  b"}\n')
    task = user_files.register_files("mine", path, path)
    notes = task.notes(LENGTHS)
    assert re.search(r"u\.jsonl: 2 of \d+ tokens of the targets are <unk> \('\{', '\}'\), in 1 targets", notes[0])
    assert "1 targets come back from the vocabulary otherwise" in notes[1]
    # A model that writes each target without a mistake, as far as the vocabulary can, matches what can be matched.
    targets = [task.postprocess_fn(text, is_target=True) for text in ("{a}", "a  b")]
    assert targets == ["{a}", "a b"] and task.postprocess_fn("a  b") == "a  b"
