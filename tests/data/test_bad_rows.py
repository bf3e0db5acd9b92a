"""Every kind of bad input, refused by file and line or skipped and counted, wherever it turns up."""

import gzip
import logging

import pytest
import seqio
import tensorflow as tf

from tasks import c4, readers, squad, user_files
from tests.data.test_data_sources import raw, task, write

LONG = "x" * (10 * 2**20)
GLUE_HEADER = "question\tsentence\tlabel\n"
GOOD = "q\ts\tentailment\n"


@pytest.fixture
def skip():
    readers.set_bad_rows("skip")
    yield
    readers.set_bad_rows("refuse")


@pytest.fixture
def log(caplog):
    """Gives all that was logged, as one text."""
    caplog.set_level(logging.INFO, "absl")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="'ignore' is not one of 'refuse', 'skip'"):
        readers.set_bad_rows("ignore")  # type: ignore[arg-type]


GLUE = {
    "empty line": (b"\n", "an empty line"),
    "not UTF-8": (b"caf\xe9\ts\tentailment\n", "not UTF-8"),
    "10 MB": (f"q\t{LONG}\tentailment\n".encode(), r"a line of 10\.0 MB"),
    "no sentence": (b"q\n", "no sentence, label in this row"),
    "no label": (b"q\ts\n", "no label in this row"),
    "unknown label": (b"q\ts\tperhaps\n", "unknown label 'perhaps'"),
}


@pytest.mark.parametrize("kind", GLUE)
def test_glue_refuses(corpus, kind):
    bad, says = GLUE[kind]
    write(corpus, "glue/QNLI/train.tsv", "").write_bytes((GLUE_HEADER + GOOD).encode() + bad + GOOD.encode())
    with pytest.raises(readers.BadRow, match=rf"train\.tsv:3: {says}"):
        raw(task("qnli").source)


def test_glue_skips_counts_and_keeps_the_rest(corpus, skip, log):
    lines = (GLUE_HEADER + GOOD).encode() + b"".join(bad for bad, _ in GLUE.values()) + GOOD.encode()
    write(corpus, "glue/QNLI/train.tsv", "").write_bytes(lines)
    assert [x["idx"] for x in raw(task("qnli").source)] == [0, 7]
    assert "train.tsv:3: an empty line" in log()
    assert f"train.tsv: {len(GLUE)} bad rows skipped" in log()


def test_a_wrong_header_leaves_nothing_whatever_is_set(corpus, skip, log):
    write(corpus, "glue/QNLI/train.tsv", "question\ttext\tlabel\n" + GOOD)
    with pytest.raises(ValueError, match=r"no examples in .*train\.tsv"):
        raw(task("qnli").source)
    assert "train.tsv:1: no column sentence; it has: question, text, label" in log()
    assert "train.tsv: 2 bad rows skipped" in log()


C4 = {
    "empty line": (b"\n", "an empty line"),
    "not UTF-8": (b'{"text": "\xff"}\n', "not UTF-8"),
    "10 MB": (f'{{"text": "{LONG}"}}\n'.encode(), r"a line of 10\.0 MB"),
    "not JSON": (b"{nonsense\n", "not JSON"),
    "no text": (b'{"txt": "a"}\n', "no column text"),
}
DOCUMENT = b'{"text": "a"}\n'


@pytest.mark.parametrize("kind", C4)
def test_c4_refuses(corpus, kind):
    bad, says = C4[kind]
    path = write(corpus, "c4/c4-train.00000-of-00001.json.gz", "")
    path.write_bytes(gzip.compress(DOCUMENT * 99 + bad + DOCUMENT))
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"json\.gz:100: {says}"):
        raw(c4.source)


def test_c4_skips_counts_and_keeps_the_rest(corpus, skip, log):
    path = write(corpus, "c4/c4-train.00000-of-00001.json.gz", "")
    path.write_bytes(gzip.compress(DOCUMENT * 99 + b"".join(bad for bad, _ in C4.values()) + DOCUMENT))
    for passes in (1, 2):
        assert len(raw(c4.source)) == 100
        assert log().count("json.gz:100: an empty line") == passes
        assert log().count(f"json.gz: {len(C4)} bad rows skipped") == passes, "counted afresh in each pass"


def test_a_truncated_gzip_keeps_its_whole_lines(corpus, skip, log):
    path = write(corpus, "c4/c4-train.00000-of-00001.json.gz", "")
    path.write_bytes(gzip.compress(b"".join(b'{"text": "document %d"}\n' % i for i in range(1000)))[:-50])
    found = len(raw(c4.source))
    assert 0 < found < 1000
    assert "the gzip data ends early (truncated)" in log()


@pytest.fixture
def mine(tmp_path, bytes_vocabulary):
    yield tmp_path
    if "mine" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("mine")


def inputs():
    dataset = seqio.TaskRegistry.get("mine").get_dataset({"inputs": 64, "targets": 32}, "train", shuffle=False)
    return [x["inputs_pretokenized"].decode() for x in dataset.as_numpy_iterator()]


CSV = {
    "empty line": (b"\n", "an empty line"),
    "not UTF-8": (b"caf\xe9,y\n", "not UTF-8"),
    "too short": (b"a\n", "1 fields, the header has 2"),
    "quotes": (b'"a"b,c\n', "check the quotes"),
    "10 MB": (f"{LONG[: 5 * 2**20]},{LONG[: 5 * 2**20]}\n".encode(), r"a line of 10\.0 MB"),
}


@pytest.mark.parametrize("kind", CSV)
def test_csv_refuses(mine, kind):
    bad, says = CSV[kind]
    (mine / "a.csv").write_bytes(b'inputs,targets\n"two\nlines",y\n' + bad + b"last,y\n")
    user_files.register_files("mine", f"{mine}/a.csv")
    with pytest.raises(readers.BadRow, match=rf"a\.csv:4: .*{says}"):
        inputs()


def test_csv_skips_counts_and_keeps_the_rest(mine, skip, log):
    rows = b'inputs,targets\n"two\nlines",y\n' + b"".join(bad for bad, _ in CSV.values()) + b"last,y\n"
    (mine / "a.csv").write_bytes(rows)
    (mine / "b.csv").write_text("question,answer\nq,a\n")  # a wrong header: no row of this file can be used
    (mine / "c.csv.gz").write_bytes(gzip.compress(b"inputs,targets\n" + b"many,y\n" * 10 + b"cut off,y\n")[:-12])
    user_files.register_files("mine", f"{mine}/*")
    found = inputs()
    assert found[:3] == ["two\nlines", "last", "many"]
    assert "cut off" not in found
    assert f"a.csv: {len(CSV)} bad rows skipped" in log()
    assert (
        "b.csv:1: no column inputs, which the template of the inputs, '{inputs}', needs; it has: question, answer"
        in log()
    )
    assert log().count("c.csv.gz:12: the gzip data ends early") == 1, "said once"


def test_files_without_a_good_row_are_refused_whatever_is_set(mine, skip):
    (mine / "a.jsonl").write_text('{"txt": "a"}\n\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: no good row for train"):
        user_files.register_files("mine", f"{mine}/a.jsonl")


@pytest.mark.parametrize("streamed", [False, True])
def test_jsonl_in_memory_and_streamed(mine, log, monkeypatch, streamed):
    if streamed:
        monkeypatch.setattr(user_files, "MEMORY_LIMIT", 1)
    good = '{"inputs": "a", "targets": "b"}\n'
    (mine / "a.jsonl").write_text(good + "\n" + good + '{"inputs": "a"}\n')
    user_files.register_files("mine", f"{mine}/a.jsonl")
    with pytest.raises((readers.BadRow, tf.errors.InvalidArgumentError), match=r"a\.jsonl:2: an empty line.*BAD_ROWS"):
        inputs()
    readers.set_bad_rows("skip")
    try:
        assert inputs() == ["a", "a"]
    finally:
        readers.set_bad_rows("refuse")
    assert "a.jsonl: 2 bad rows skipped" in log()


@pytest.mark.parametrize("streamed", [False, True])
def test_blank_lines_between_paragraphs_are_not_bad_but_counted(mine, log, monkeypatch, streamed):
    if streamed:
        monkeypatch.setattr(user_files, "MEMORY_LIMIT", 1)
    (mine / "a.txt").write_text("one\n\n\ntwo\n")
    source = user_files.register_files("mine", f"{mine}/a.txt", objective="span_corruption").source
    assert [x["targets"] for x in raw(source)] == [b"one", b"two"]
    assert "a.txt: 2 blank lines" in log()


def test_a_bad_question_of_squad(corpus, log):
    question = '{"id": "%s", "question": "Who?", "answers": [%s]}'
    rows = [question % ("x", '{"text": "A", "answer_start": 0}'), question % ("y", ""), '{"id": "z"}']
    text = '{"data": [{"title": "T", "paragraphs": [{"context": "A B", "qas": [' + ", ".join(rows) + "]}]}]}"
    write(corpus, "squad/train-v1.1.json", text)
    with pytest.raises(readers.BadRow, match=r"train-v1\.1\.json: question y has no answer"):
        raw(squad.source)
    readers.set_bad_rows("skip")
    try:
        assert [x["id"] for x in raw(squad.source)] == [b"x"]
    finally:
        readers.set_bad_rows("refuse")
    assert "train-v1.1.json: 2 bad rows skipped" in log()
