"""Whatever the files of a task hold, reading them gives examples, or says what is wrong in which file."""

import contextlib
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
import seqio

from tasks import c4, cnn_dailymail, glue, readers, squad, tables, user_files

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

settings = hypothesis.settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
actions = st.sampled_from(["refuse", "skip"])
texts = st.text(max_size=6) | st.sampled_from(["\ud800", "a\0b", "\ufeff", "é", "nan", "1e999", "9" * 5000])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(["digits", "brackets"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


def rows_of(*columns):
    """Objects that have the columns more often than not, with values that are texts more often than not."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(columns, texts | values)) | st.fixed_dictionaries(
        dict.fromkeys(columns, texts)
    )


def as_json(value) -> bytes:
    """With what no encoder would write in its place: a number of any length, brackets of any depth."""
    return json.dumps(value).encode().replace(b'"digits"', b"9" * 5000).replace(b'"brackets"', b"[" * 100_000)


def json_lines(*columns):
    return st.lists((rows_of(*columns) | values).map(as_json) | st.binary(max_size=9), max_size=4).map(b"\n".join)


def table(columns, delimiter, fields):
    """A header, most often the right one, and rows, most often of the right length."""
    size = len(columns)
    row = st.lists(fields, min_size=size, max_size=size) | st.lists(fields, max_size=size + 1)
    header = st.just(list(columns)) | st.lists(st.sampled_from(columns) | fields, max_size=size)
    lines = st.tuples(header, st.lists(row, max_size=4)).map(lambda parts: [parts[0], *parts[1]])
    return lines.map(lambda rows: "\n".join(map(delimiter.join, rows)).encode("utf-8", "surrogatepass"))


def damaged(contents):
    """Contents as they are, or cut, or with a byte changed."""

    def harm(parts):
        content, place, byte = parts
        at = place % (len(content) + 1)
        return (content, content[:at], content[:at] + bytes([byte]) + content[at + 1 :])[place % 3]

    return st.tuples(contents, st.integers(0, 10**6), st.integers(0, 255)).map(harm) | contents


def answers_or_says(path, action, read):
    readers.set_bad_rows(action)
    try:
        read()
    except (ValueError, OSError) as error:
        assert str(path) in str(error), repr(error)
        str(error).encode()
    finally:
        readers.set_bad_rows("refuse")


@pytest.fixture
def mine(tmp_path, bytes_vocabulary):
    yield tmp_path
    with contextlib.suppress(ValueError):
        seqio.TaskRegistry.remove("fuzzed")


def columnar(write):
    """A file of two columns of texts, numbers or lists, written by `write` (table, file)."""

    def content(columns):
        file = io.BytesIO()
        write(pa.table(columns), file)
        return file.getvalue()

    clean = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    column = st.one_of(
        *(st.lists(st.none() | kind, min_size=2, max_size=2) for kind in (clean, st.floats(), st.lists(clean)))
    )
    return st.fixed_dictionaries({"inputs": column, "targets": column}).map(content)


def stream(rows, file):
    with pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)


def zstd(content):
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as file:
        file.write(content)
    return packed.getvalue().to_pybytes()


PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}
FORMATS = {
    ".parquet": columnar(pa.parquet.write_table),
    ".arrow": columnar(stream),
    ".json": json_lines("inputs", "targets") | st.lists(rows_of("inputs", "targets") | values, max_size=3).map(as_json),
    ".txt": json_lines("text"),
    ".jsonl": json_lines("inputs", "targets"),
    ".csv": table(("inputs", "targets"), ",", texts | st.sampled_from(['"', '"a"', '"a\nb"', "\r", ""])),
    ".tsv": table(("inputs", "targets"), "\t", texts | st.sampled_from(['"', ""])),
}


@pytest.mark.parametrize("ending", FORMATS)
@settings
@hypothesis.given(st.data())
def test_ones_own_files(mine, ending, data):
    content = data.draw(damaged(FORMATS[ending]))
    packing = "" if ending in tables.ENDINGS else data.draw(st.sampled_from(list(PACKERS)))
    path = mine / f"a{ending}{packing}"
    path.write_bytes(data.draw(damaged(st.just(PACKERS[packing](content)))) if packing else content)
    objective = "span_corruption" if ending == ".txt" else "text_to_text"

    def read():
        task = user_files.register_files("fuzzed", str(path), objective=objective)
        assert task.num_input_examples("train")

    answers_or_says(path, data.draw(actions), read)


labels = texts | st.sampled_from(["entailment", "not_entailment", "0", "1", "4.25", "-1"])
GLUE = {config.name: config for config in glue.CONFIGS}


@pytest.mark.parametrize("name", ["cola", "stsb", "mrpc", "qqp", "rte"])
@settings
@hypothesis.given(st.data())
def test_glue(tmp_path, name, data):
    config = GLUE[name]
    columns = ("index", "#1 ID", "#2 ID", *config.text.values(), config.label_column)
    for file in ("train.tsv", *(["msr_paraphrase_train.txt"] if name == "mrpc" and data.draw(st.booleans()) else [])):
        (tmp_path / file).write_bytes(data.draw(damaged(table(columns, "\t", labels | texts))))
    path = tmp_path / "train.tsv"

    def read():
        found = glue.read([str(path)], "train", config)
        assert len({len(column) for column in found.values()}) == 1

    answers_or_says(tmp_path, data.draw(actions), read)


@settings
@hypothesis.given(damaged(json_lines("text", "timestamp", "url")), actions)
def test_c4(tmp_path, content, action):
    path = str(tmp_path / "c4-train.json")

    def read():
        for number, line in enumerate(content.split(b"\n"), start=1):
            with readers.Skipped(path):
                parsed = c4._document(path, number, readers.decode_line(path, number, line))
                assert [text.encode() for text in parsed]

    answers_or_says(path, action, read)


answers = st.lists(st.fixed_dictionaries({"text": texts | values, "answer_start": st.integers() | values}), max_size=2)
questions = st.fixed_dictionaries({}, optional={"id": texts | values, "question": texts | values, "answers": answers})
paragraphs = st.fixed_dictionaries({}, optional={"context": texts | values, "qas": st.lists(questions, max_size=2)})
articles = st.fixed_dictionaries({"paragraphs": st.lists(paragraphs | values, max_size=2)}, optional={"title": values})
corpora = st.fixed_dictionaries({"data": st.lists(articles | values, max_size=2) | values}) | values


@settings
@hypothesis.given(damaged(st.one_of(corpora).map(as_json)), actions)
def test_squad(tmp_path, content, action):
    path = tmp_path / "train-v1.1.json"
    path.write_bytes(content)
    answers_or_says(path, action, lambda: squad.read([str(path)], "train"))


@settings
@hypothesis.given(damaged(table(("id", "article", "highlights"), ",", texts)), actions)
def test_cnn_dailymail(tmp_path, content, action):
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    answers_or_says(path, action, lambda: cnn_dailymail.read([str(path)], "train"))
